"""The demo's page: one file with inline CSS, SVG and PNG, readable on a laptop and a phone, without scripts."""

import base64
import html
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CSS = """
:root { --ink:#1b2430; --soft:#5b6777; --line:#dde3ea; --card:#fff; --page:#f4f6f9; --before:#9aa7b8; --after:#1f6feb;
  --good:#1a7f4b; --bad:#b3261e; --font:system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
* { box-sizing:border-box; }
body { margin:0; background:var(--page); color:var(--ink); font:16px/1.5 var(--font); }
main { max-width:1060px; margin:0 auto; padding:28px 18px 60px; }
h1 { font-size:1.7rem; line-height:1.2; margin:0 0 6px; }
h2 { font-size:1.15rem; margin:34px 0 10px; }
p { margin:6px 0 12px; max-width:75ch; }
.soft { color:var(--soft); font-size:.92rem; }
.cards { display:grid; gap:14px; grid-template-columns:repeat(auto-fit, minmax(240px, 1fr)); }
.card, .box, .item { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:16px 18px; }
.big { font-size:1.75rem; font-weight:650; white-space:nowrap; }
.big i { font-style:normal; color:var(--soft); font-weight:400; }
svg { display:block; width:100%; height:auto; }
svg text { font:12px var(--font); fill:var(--ink); }
.bars { max-width:720px; }
.curves { display:grid; gap:14px; grid-template-columns:repeat(auto-fit, minmax(min(400px, 100%), 1fr)); }
.curves h3 { font-size:.92rem; margin:0 0 6px; font-weight:600; }
.legend { margin:0 0 8px; font-size:.9rem; }
.legend b { display:inline-block; width:12px; height:12px; border-radius:3px; margin:0 6px 0 14px; }
.legend b:first-child { margin-left:0; }
.grid { display:grid; gap:12px; grid-template-columns:repeat(auto-fill, minmax(280px, 1fr)); }
.item { display:flex; gap:12px; padding:12px; font-size:.9rem; line-height:1.4; }
.item img { width:96px; height:96px; border-radius:6px; flex:none; }
.q { font-weight:600; margin-bottom:4px; }
.right { color:var(--good); } .wrong { color:var(--bad); }
table { border-collapse:collapse; width:100%; font-size:.92rem; }
td, th { text-align:left; padding:6px 10px 6px 0; border-bottom:1px solid var(--line); vertical-align:top; }
td:last-child { overflow-wrap:anywhere; }
code { background:#eaeef3; padding:1px 5px; border-radius:4px; font-size:.88em; overflow-wrap:anywhere; }
"""

NUM_EXAMPLES = {"fixed": 9, "still wrong": 6, "broken": 6}


def write_report(out: Path, result: dict[str, Any]) -> Path:
    """Write ``out/report.html`` from the result of a demo and the two runs' metrics; returns its path."""
    runs = {stage: read_metrics(out / f"{stage}-run" / "metrics.jsonl") for stage in ("sft", "dpo")}
    body = "".join(
        (_headline(result), _categories(result), _curves(runs), _examples(out, result), _facts(out, result, runs))
    )
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>vapr demo</title>'
        f"<style>{CSS}</style></head><body><main>{body}</main></body></html>\n"
    )
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The training steps of a run."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "loss" in row]


def _headline(result: dict[str, Any]) -> str:
    overall, yes = result["accuracy"]["overall"], result["yes_share"]
    existence = result["accuracy"]["existence"]
    notes = (
        f"{overall['questions']:,} questions on pictures never seen",
        f"{existence['questions']:,} questions, half of them about something that is not there",
        f"truth: {yes['truth']:.0%} of the yes/no questions",
    )
    cards = (
        ("Right answers", overall["before"], overall["after"], notes[0]),
        ("Right on yes/no questions", existence["before"], existence["after"], notes[1]),
        ("Says “Yes”", yes["before"], yes["after"], notes[2]),
    )
    shown = "".join(
        f'<div class="card"><div class="soft">{name}</div><div class="big">{before:.1%} <i>→</i> {after:.1%}</div>'
        f'<div class="soft">{note}</div></div>'
        for name, before, after, note in cards
    )
    return (
        f"<h1>vapr demo: {_verdict(result)}</h1>"
        "<p>A tiny Qwen2.5-VL with random weights was taught to answer questions on drawn shapes (<code>sft</code>), "
        f"on data where the answer to {result['sizes']['yes_share']:.0%} of the yes/no questions is “Yes” and the rest "
        "are easy “No”s. Then it was aligned with DPO on hard negatives: the right answer, and the same with one word "
        f"wrong (plus {result['sizes']['sft_weight']:g} x the sft loss, which keeps other answers in place). All "
        "numbers come from greedy answers of the saved Hugging Face models to questions on held-out pictures, counted "
        "by exact match.</p>"
        f'<div class="cards">{shown}</div>'
    )


def _verdict(result: dict[str, Any]) -> str:
    """What happened, in words that fit the numbers."""
    overall, yes = result["accuracy"]["overall"], result["yes_share"]
    gain = 100 * (overall["after"] - overall["before"])
    bias = [100 * abs(yes[when] - yes["truth"]) for when in ("before", "after")]
    change = f"DPO {'added' if gain >= 0 else 'cost'} {abs(gain):.1f} points of accuracy"
    if bias[1] < bias[0]:
        return f"{change} and cut the “Yes” bias from {bias[0]:.0f} to {bias[1]:.0f} points"
    return f"{change}; the “Yes” bias did not shrink ({bias[0]:.0f} to {bias[1]:.0f} points)"


def _categories(result: dict[str, Any]) -> str:
    rows = list(result["accuracy"].items())
    height, left, width = 46, 72, 440
    bars = []
    for n, (name, row) in enumerate(rows):
        y = n * height + 4
        bars.append(f'<text x="0" y="{y + 22}">{html.escape(name)}</text>')
        for offset, when in ((0, "before"), (17, "after")):
            length = max(1.0, row[when] * (width - left - 60))
            bars.append(
                f'<rect x="{left}" y="{y + offset}" width="{length:.1f}" height="14" rx="3" fill="var(--{when})"/>'
                f'<text x="{left + length + 6:.1f}" y="{y + offset + 11.5}">{row[when]:.1%}</text>'
            )
    return (
        '<h2>By kind of question</h2><div class="box bars"><p class="legend">'
        '<b style="background:var(--before)"></b>after sft<b style="background:var(--after)"></b>after DPO</p>'
        f'<svg viewBox="0 0 {width} {len(rows) * height}" role="img" aria-label="accuracy by kind of question">'
        f"{''.join(bars)}</svg></div>"
    )


def _curves(runs: dict[str, list[dict[str, Any]]]) -> str:
    plots = (
        ("sft: loss", runs["sft"], "loss", "var(--before)"),
        ("DPO: loss", runs["dpo"], "loss", "var(--after)"),
        ("DPO: margin of chosen over rejected", runs["dpo"], "rewards/margins", "var(--after)"),
        ("DPO: share of pairs with a positive margin", runs["dpo"], "rewards/accuracies", "var(--after)"),
    )
    boxes = "".join(
        f'<div class="box"><h3>{title}</h3>{line_plot([row[key] for row in rows], colour)}</div>'
        for title, rows, key, colour in plots
    )
    return (
        f'<h2>Training</h2><div class="curves">{boxes}</div><p class="soft">Thin: every step. Thick: mean of the steps '
        "around it. The sft stage starts with one shape in a picture and goes on to three, so its loss can rise.</p>"
    )


def line_plot(values: list[float], colour: str) -> str:
    """An inline SVG of one value per step, with its running mean; the vertical axis leaves out the first peak."""
    smooth = _running_mean(values, max(1, len(values) // 40))
    # The first steps of an untrained model would flatten everything after them.
    ranked = sorted(values)
    top = min(ranked[-1], 1.3 * ranked[int(0.92 * (len(ranked) - 1))]) if ranked[0] >= 0 else ranked[-1]
    bottom = min(0.0, ranked[0])
    span = (top - bottom) or 1.0
    width, height, left, base = 320, 170, 44, 148

    def points(series: list[float]) -> str:
        step = (width - left - 6) / max(1, len(series) - 1)
        scaled = (max(0.0, min(1.0, (value - bottom) / span)) for value in series)
        return " ".join(f"{left + n * step:.1f},{base - 138 * share:.1f}" for n, share in enumerate(scaled))

    ticks = "".join(
        f'<line x1="{left}" x2="{width - 6}" y1="{base - 138 * t:.0f}" y2="{base - 138 * t:.0f}" stroke="var(--line)"/>'
        f'<text x="{left - 6}" y="{base - 138 * t + 4:.0f}" text-anchor="end">{bottom + t * span:.2g}</text>'
        for t in (0, 0.5, 1)
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img">{ticks}'
        f'<polyline fill="none" stroke="{colour}" stroke-width="1" opacity=".35" points="{points(values)}"/>'
        f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{points(smooth)}"/>'
        f'<text x="{left}" y="{height - 4}">step 1</text>'
        f'<text x="{width - 6}" y="{height - 4}" text-anchor="end">{len(values)}</text></svg>'
    )


def _running_mean(values: list[float], reach: int) -> list[float]:
    means = []
    for n in range(len(values)):
        near = values[max(0, n - reach) : n + reach + 1]
        means.append(sum(near) / len(near))
    return means


def _examples(out: Path, result: dict[str, Any]) -> str:
    groups: dict[str, list[dict[str, str]]] = {name: [] for name in NUM_EXAMPLES}
    for one in result["answers"]:
        right = one["before"] == one["truth"], one["after"] == one["truth"]
        name = {(False, True): "fixed", (False, False): "still wrong", (True, False): "broken"}.get(right)
        if name:
            groups[name].append(one)
    sections = []
    for name, members in groups.items():
        shown = _one_of_each(members)[: NUM_EXAMPLES[name]]
        items = "".join(_example(out, one) for one in shown) or '<p class="soft">None.</p>'
        sections.append(
            f"<h2>{name.capitalize()}: {len(members)}</h2>"
            + (f'<p class="soft">The first {len(shown)}: one question a picture, kinds in turn.</p>' if shown else "")
            + f'<div class="grid">{items}</div>'
        )
    return "".join(sections)


def _one_of_each(members: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """File order, one question a picture, the kinds of question in turn: so that the choice is not ours."""
    seen: dict[str, int] = {}
    pictures: set[str] = set()
    ranked = []
    for one in members:
        if one["picture"] in pictures:
            continue
        pictures.add(one["picture"])
        seen[one["category"]] = seen.get(one["category"], 0) + 1
        ranked.append((seen[one["category"]], one))
    return [one for _, one in sorted(ranked, key=lambda entry: entry[0])]


def _example(out: Path, one: dict[str, str]) -> str:
    def answer(when: str) -> str:
        kind = "right" if one[when] == one["truth"] else "wrong"
        return f'<span class="{kind}">{html.escape(one[when]) or "(nothing)"}</span>'

    png = base64.b64encode((out / one["picture"]).read_bytes()).decode()
    return (
        f'<div class="item"><img alt="" src="data:image/png;base64,{png}"><div>'
        f'<div class="q">{html.escape(one["question"])}</div>truth: {html.escape(one["truth"])}<br>'
        f"after sft: {answer('before')}<br>after DPO: {answer('after')}</div></div>"
    )


def _facts(out: Path, result: dict[str, Any], runs: dict[str, list[dict[str, Any]]]) -> str:
    sizes, seconds = result["sizes"], result["seconds"]
    overall = result["accuracy"]["overall"]["questions"]

    def stage(name: str) -> str:
        rows = runs[name]
        pairs, tokens, saved = (sum(row[key] for row in rows) for key in ("pairs", "tokens", "tokens_saved"))
        return (
            f"{pairs:,} pairs on {sizes[f'{name}_pictures']:,} pictures, {len(rows):,} steps, learning rate "
            f"{sizes[f'{name}_lr']:g}; {tokens:,} tokens computed, {saved / max(1, tokens + saved):.0%} of the plain "
            f"layout's saved by sharing; {seconds[name]:.0f} s with loading"
        )

    sft_config, dpo_config, again = (html.escape(str(out / name)) for name in ("sft.yaml", "dpo.yaml", "again"))
    rows = (
        ("sft", stage("sft")),
        (
            "DPO",
            f"{stage('dpo')}; beta {sizes['beta']:g}, plus {sizes['sft_weight']:g} x the sft loss of the chosen answer",
        ),
        ("held out", f"{overall:,} questions on {sizes['held_out_pictures']:,} pictures"),
        ("seed", str(result["seed"])),
        ("wall time", f"{seconds['total']:.0f} s in total"),
        ("configs", f"<code>{sft_config}</code>, <code>{dpo_config}</code>"),
        ("repeat", f"<code>vapr train {dpo_config} --set run_dir={again}</code>"),
    )
    cells = "".join(f"<tr><th>{name}</th><td>{text}</td></tr>" for name, text in rows)
    return (
        f'<h2>What was run</h2><div class="box"><table>{cells}</table></div><p class="soft">One seed of one tiny '
        "model on drawn pictures: it shows that every part works together, not how much DPO brings to a real model.</p>"
    )
