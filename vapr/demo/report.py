"""The demo's page: one file with inline CSS, SVG and PNG, readable on a laptop and a phone, without scripts."""

import base64
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from vapr.pages.chart import Series, line_chart
from vapr.pages.curves import Rows, column, read_metrics, saved_share
from vapr.pages.page import write_page

NUM_EXAMPLES = {"fixed": 9, "still wrong": 6, "broken": 6}


def write_report(out: Path, result: dict[str, Any]) -> Path:
    """Write ``out/report.html`` from the result of a demo and the two runs' metrics; returns its path."""
    runs = {stage: read_metrics(out / f"{stage}-run" / "metrics.jsonl")[0] for stage in ("sft", "dpo")}
    path = out / "report.html"
    write_page(
        path,
        "demo_report.html",
        verdict=_verdict(result),
        sizes=result["sizes"],
        cards=_cards(result),
        accuracy=result["accuracy"],
        curves=[
            (title, line_plot([row[key] for row in runs[stage]], colour))
            for title, stage, key, colour in (
                ("sft: loss", "sft", "loss", "before"),
                ("DPO: loss", "dpo", "loss", "after"),
                ("DPO: margin of chosen over rejected", "dpo", "rewards/margins", "after"),
                ("DPO: share of pairs with a positive margin", "dpo", "rewards/accuracies", "after"),
            )
        ],
        answers=_answers(result["answers"]),
        picture=partial(_picture, out),
        facts=_facts(result, runs),
        out=out,
    )
    return path


def _cards(result: dict[str, Any]) -> list[tuple[str, Markup, str]]:
    """Return name, change and note of the figures that stand large on the page."""
    overall, existence, yes = result["accuracy"]["overall"], result["accuracy"]["existence"], result["yes_share"]
    entries = (
        ("Right answers", overall, f"{overall['questions']:,} questions on pictures never seen"),
        (
            "Right on yes/no questions",
            existence,
            f"{existence['questions']:,} questions, half of them about something that is not there",
        ),
        ("Says “Yes”", yes, f"truth: {yes['truth']:.0%} of the yes/no questions"),
    )
    return [
        (name, Markup("{:.1%} <i>→</i> {:.1%}").format(share["before"], share["after"]), note)
        for name, share, note in entries
    ]


def _verdict(result: dict[str, Any]) -> str:
    """Say what happened, in words that fit the numbers."""
    overall, yes = result["accuracy"]["overall"], result["yes_share"]
    gain = 100 * (overall["after"] - overall["before"])
    bias = [100 * abs(yes[when] - yes["truth"]) for when in ("before", "after")]
    change = f"DPO {'added' if gain >= 0 else 'cost'} {abs(gain):.1f} points of accuracy"
    if bias[1] < bias[0]:
        return f"{change} and cut the “Yes” bias from {bias[0]:.0f} to {bias[1]:.0f} points"
    return f"{change}; the “Yes” bias did not shrink ({bias[0]:.0f} to {bias[1]:.0f} points)"


def line_plot(values: list[float], colour: str) -> Markup:
    """Draw one value per step with its running mean; the vertical axis leaves out the first peak."""
    # The first steps of an untrained model would flatten everything after them.
    ranked = sorted(values)
    top = min(ranked[-1], 1.3 * ranked[int(0.92 * (len(ranked) - 1))]) if ranked[0] >= 0 else ranked[-1]
    points = [(n + 1, min(value, top)) for n, value in enumerate(values)]
    return line_chart([Series("", colour, points)], label="one value per step", include=(0.0,), smooth=True)


def _answers(answers: Iterable[dict[str, str]]) -> list[tuple[str, int, list[dict[str, str]]]]:
    """Return name, number and first examples of each group of answers that were wrong before or after DPO."""
    groups: dict[str, list[dict[str, str]]] = {name: [] for name in NUM_EXAMPLES}
    for one in answers:
        right = one["before"] == one["truth"], one["after"] == one["truth"]
        name = {(False, True): "fixed", (False, False): "still wrong", (True, False): "broken"}.get(right)
        if name:
            groups[name].append(one)
    return [
        (name.capitalize(), len(members), _in_turn(members)[: NUM_EXAMPLES[name]]) for name, members in groups.items()
    ]


def _in_turn(answers: Iterable[dict[str, str]]) -> list[dict[str, str]]:
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


def _picture(out: Path, example: dict[str, str]) -> str:
    return f"data:image/png;base64,{base64.b64encode((out / example['picture']).read_bytes()).decode()}"


def _facts(result: dict[str, Any], runs: dict[str, Rows]) -> list[tuple[str, str]]:
    """Return names and values of the table at the end."""
    sizes, seconds = result["sizes"], result["seconds"]
    stages = {
        name: f"{sum(column(rows, 'pairs')):,.0f} pairs on {sizes[f'{name}_pictures']:,} pictures, {len(rows):,} "
        f"steps, learning rate {sizes[f'{name}_lr']:g}; {sum(column(rows, 'tokens')):,.0f} tokens computed, "
        f"{saved_share(rows):.0%} of the plain layout's saved by sharing; {seconds[name]:.0f} s with loading"
        for name, rows in runs.items()
    }
    loss = f"beta {sizes['beta']:g}, plus {sizes['sft_weight']:g} x the sft loss of the chosen answer"
    overall = result["accuracy"]["overall"]["questions"]
    return [
        ("sft", stages["sft"]),
        ("DPO", f"{stages['dpo']}; {loss}"),
        ("held out", f"{overall:,} questions on {sizes['held_out_pictures']:,} pictures"),
        ("seed", str(result["seed"])),
        ("wall time", f"{seconds['total']:.0f} s in total"),
    ]
