"""The demo's page: one file with inline CSS, SVG and PNG, readable on a laptop and a phone, without scripts."""

import base64
import html
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vapr.pages.chart import Series, line_chart, swatch
from vapr.pages.curves import read_metrics
from vapr.pages.page import page, write_page

NUM_EXAMPLES = {"fixed": 9, "still wrong": 6, "broken": 6}


def write_report(out: Path, result: dict[str, Any]) -> Path:
    """Write ``out/report.html`` from the result of a demo and the two runs' metrics; returns its path."""
    runs = {stage: read_metrics(out / f"{stage}-run" / "metrics.jsonl")[0] for stage in ("sft", "dpo")}
    body = "".join(
        (_headline(result), _categories(result), _curves(runs), _examples(out, result), _facts(out, result, runs))
    )
    path = out / "report.html"
    write_page(path, page("vapr demo", body))
    return path


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
        f"<span>{swatch('before', 'bar')}after sft</span> <span>{swatch('after', 'bar')}after DPO</span></p>"
        f'<svg viewBox="0 0 {width} {len(rows) * height}" role="img" aria-label="accuracy by kind of question">'
        f"{''.join(bars)}</svg></div>"
    )


def _curves(runs: dict[str, list[dict[str, Any]]]) -> str:
    plots = (
        ("sft: loss", runs["sft"], "loss", "before"),
        ("DPO: loss", runs["dpo"], "loss", "after"),
        ("DPO: margin of chosen over rejected", runs["dpo"], "rewards/margins", "after"),
        ("DPO: share of pairs with a positive margin", runs["dpo"], "rewards/accuracies", "after"),
    )
    boxes = "".join(
        f'<div class="box"><h3>{title}</h3>{line_plot([row[key] for row in rows], colour)}</div>'
        for title, rows, key, colour in plots
    )
    return (
        f'<h2>Training</h2><div class="curves two">{boxes}</div><p class="soft">Thin: every step. Thick: mean of the '
        "steps around it. The sft stage starts with one shape in a picture and goes on to three, so its loss "
        "can rise.</p>"
    )


def line_plot(values: list[float], colour: str) -> str:
    """An inline SVG of one value per step, with its running mean; the vertical axis leaves out the first peak."""
    # The first steps of an untrained model would flatten everything after them.
    ranked = sorted(values)
    top = min(ranked[-1], 1.3 * ranked[int(0.92 * (len(ranked) - 1))]) if ranked[0] >= 0 else ranked[-1]
    points = [(n + 1, min(value, top)) for n, value in enumerate(values)]
    return line_chart([Series("", colour, points)], label="one value per step", include=(0.0,), smooth=True)


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
