"""The demo's page: one file with inline CSS, SVG and PNG, readable on a laptop and a phone, without scripts."""

import base64
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from vapr.audit.report_text import figure_rows
from vapr.data.pair import PreferencePair
from vapr.data.sources import read_pairs
from vapr.demo.claims import claims, headline
from vapr.demo.outcome import POLICIES, figure_table, share_text
from vapr.pages.bars import Bar, Limit, bar_chart
from vapr.pages.chart import Series, line_chart
from vapr.pages.curves import column, read_metrics, saved_share
from vapr.pages.page import write_page
from vapr.pages.word_diff import word_diff

Result = Mapping[str, Any]

NUM_EXAMPLES = {"fixed": 9, "still wrong": 6, "broken": 6, "garbled": 6}
PAIRS_SHOWN = 2
"""Of each category."""


def write_report(out: Path, result: Result) -> Path:
    """Write ``out/report.html`` from the result of a demo and what its runs left; returns its path."""
    path = out / "report.html"
    sets = result["audit"]["sets"]
    heads, audit_rows = figure_rows(sets)
    write_page(
        path,
        "demo_report.html",
        headline=headline(result),
        claims=claims(result),
        cards=_cards(result),
        bars=list(_bars(result)),
        figures=figure_table(result),
        scaling=_scaling(result),
        pairs=[(pair, *word_diff(_said(pair.chosen), _said(pair.rejected))) for pair in _some_pairs(out)],
        editing=result["editing"],
        audit=(heads, audit_rows),
        answers=_answers(result["answers"]),
        policies=POLICIES,
        picture=lambda name: _png(out / name),
        said=_said,
        curves=list(_curves(result)),
        facts=_facts(result),
        sizes=result["sizes"],
        out=out,
    )
    return path


def _cards(result: Result) -> list[tuple[str, Markup, str]]:
    """Return name, change and note of the figures that stand large on the page."""
    before, after = (result["policies"][name] for name in ("sft", "dpo"))
    overall, yes, truth = (lambda one: one["accuracy"]["overall"]), (lambda one: one["yes"]["yes_rate"]), before["yes"]
    entries = (
        ("Right answers", overall, f"{overall(before)['count']:,} questions on pictures never seen"),
        ("Says “Yes”", yes, f"truth: {truth['gold_yes_rate']['value']:.0%} of {truth['questions']:,} yes/no questions"),
    )
    return [
        (name, Markup("{:.1%} <i>→</i> {:.1%}").format(of(before)["value"], of(after)["value"]), note)
        for name, of, note in entries
    ]


def _bars(result: Result) -> Iterable[tuple[str, Markup]]:
    """Yield title and chart: accuracy of every policy, overall and by category, and the share of "Yes"."""
    policies = result["policies"]
    for category in policies["sft"]["accuracy"]:
        yield category, _chart({name: one["accuracy"][category] for name, one in policies.items()}, category)
    truth = 100 * policies["sft"]["yes"]["gold_yes_rate"]["value"]
    rates = {name: one["yes"]["yes_rate"] for name, one in policies.items()}
    yield "says “Yes” (line: how often it is true)", _chart(rates, "share of yes", Limit(round(truth, 1), "soft"))


def _chart(figures: Mapping[str, Any], label: str, *limits: Limit) -> Markup:
    bars = [
        Bar(POLICIES[name], 100 * one["value"], [100 * end for end in one["interval"]], share_text(one))
        if one["value"] is not None
        else Bar(POLICIES[name], None, None, "-")
        for name, one in figures.items()
    ]
    return bar_chart(bars, (0.0, 100.0), limits, label)


def _scaling(result: Result) -> list[list[str]]:
    """Return rows: pairs, accuracy and share of "Yes" for no data and the three sizes."""
    rows = []
    for name in ("sft", "dpo-quarter", "dpo-half", "dpo"):
        one = result["policies"][name]
        pairs = 0 if name == "sft" else result["trainings"][name]["num_pairs"]
        rows.append([f"{pairs:,}", share_text(one["accuracy"]["overall"]), share_text(one["yes"]["yes_rate"])])
    return rows


def _some_pairs(out: Path) -> list[PreferencePair]:
    """Return the first edited pairs of each category, one a picture."""
    seen: Counter[str] = Counter()
    pictures: set[str] = set()
    shown = []
    for pair in read_pairs(out / "pairs"):
        category, picture = str(pair.category), str(pair.images[0])
        if seen[category] < PAIRS_SHOWN and picture not in pictures:
            seen[category] += 1
            pictures.add(picture)
            shown.append(pair)
    return sorted(shown, key=lambda pair: str(pair.category))


def _said(messages: Any) -> str:
    return "".join(part["text"] for part in messages[-1]["content"] if part["type"] == "text")


def _answers(answers: Iterable[Mapping[str, Any]]) -> list[tuple[str, int, list[Mapping[str, Any]]]]:
    """Return name, number and first examples of answers that DPO fixed, left wrong, broke or garbled."""
    groups: dict[str, list[Mapping[str, Any]]] = {name: [] for name in NUM_EXAMPLES}
    for one in answers:
        right = tuple(one["said"][name] == one["truth"] for name in ("sft", "dpo"))
        name = {(False, True): "fixed", (False, False): "still wrong", (True, False): "broken"}.get(right)
        if name:
            groups[name].append(one)
        if one["said"]["dpo"] is None:
            groups["garbled"].append(one)
    return [
        (name.capitalize(), len(members), _in_turn(members)[: NUM_EXAMPLES[name]]) for name, members in groups.items()
    ]


def _in_turn(answers: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return one answer a picture, in file order and the kinds of question in turn, so that the choice is not ours."""
    seen: Counter[str] = Counter()
    pictures: set[str] = set()
    ranked = []
    for one in answers:
        if one["picture"] not in pictures:
            pictures.add(one["picture"])
            seen[one["category"]] += 1
            ranked.append((seen[one["category"]], one))
    return [one for _, one in sorted(ranked, key=lambda entry: entry[0])]


def _png(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _curves(result: Result) -> Iterable[tuple[str, Markup]]:
    """Yield title and curve of what each training logged."""
    for stage, key, title, colour in (
        ("sft", "loss", "sft: loss", "before"),
        ("dpo", "rewards/margins", "DPO: margin of chosen over rejected", "after"),
        ("dpo", "logps/chosen", "DPO: log-prob of the chosen answer", "after"),
        ("length-biased", "rewards/margins", "DPO on length-biased: margin", "after"),
    ):
        rows = read_metrics(Path(result["trainings"][stage]["run"]) / "metrics.jsonl")[0]
        yield title, line_plot([row[key] for row in rows], colour)


def line_plot(values: list[float], colour: str) -> Markup:
    """Draw one value per step with its running mean; the vertical axis leaves out the first peak."""
    # The first steps of an untrained model would flatten everything after them.
    ranked = sorted(values)
    top = min(ranked[-1], 1.3 * ranked[int(0.92 * (len(ranked) - 1))]) if ranked[0] >= 0 else ranked[-1]
    points = [(n + 1, min(value, top)) for n, value in enumerate(values)]
    return line_chart([Series("", colour, points)], label="one value per step", include=(0.0,), smooth=True)


def _facts(result: Result) -> list[tuple[str, str]]:
    """Return names and values of the table at the end."""
    sizes, seconds = result["sizes"], result["seconds"]
    facts = []
    for name, training in result["trainings"].items():
        rows = read_metrics(Path(training["run"]) / "metrics.jsonl")[0]
        facts.append((
            POLICIES.get(name, "sft on easy pictures"),
            f"{sum(column(rows, 'pairs')):,.0f} pairs, {len(rows):,} steps, learning rate {training['lr']:g}, "
            f"{', '.join(f'{key} {value}' for key, value in training['loss'].items())}; "
            f"{sum(column(rows, 'tokens')):,.0f} tokens computed, {saved_share(rows):.0%} of the plain layout's saved "
            f"by sharing; {seconds['trainings'][name]:.0f} s with loading",
        ))  # fmt: skip
    return [
        *facts,
        ("held out", f"{len(result['answers']):,} questions on {sizes['held_out_pictures']:,} pictures"),
        ("seed", str(result["seed"])),
        ("wall time", f"{seconds['total']:.0f} s in total"),
    ]
