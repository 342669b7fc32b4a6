"""The page of vapr compare: held-out figures of several runs, what differs between them, and their curves overlaid."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vapr.pages.chart import Point, Series, line_chart, readable, swatch
from vapr.pages.page import folding_table, page, write_page
from vapr.pages.runs_side_by_side import Run, in_words, rows_of

COLOURS = (("#1f6feb", "#5b9dff"), ("#c2570c", "#f0883e"), ("#1a7f4b", "#4cc38a"), ("#8a3ffc", "#c39bff"),
           ("#b3261e", "#ff8a80"), ("#0b7285", "#3bc9db"))  # fmt: skip
"""On a light and on a dark page."""

DASHES = ("none", "7 3", "2 3", "9 3 2 3")
"""So that lines can be told apart without colours; they change with every run, colours after that."""


def write_compare_page(path: Path, runs: Sequence[Run], result: dict[str, Any]) -> None:
    """Write the page of runs and what :func:`vapr.pages.runs_side_by_side.compare` says, whole or not at all."""
    notes = "".join(f'<p class="wrong">{html.escape(note)}</p>' for note in result["notes"])
    body = (
        f"<h1>{html.escape(', '.join(run.name for run in runs))}</h1>"
        '<p class="soft">Figures on held-out pairs, at the last evaluation of each run and at the one with the lowest '
        f"loss.</p>{notes}"
        f'<div class="box tall">{folding_table(*rows_of(runs))}</div>'
        f"{_differences(runs, result['differences'])}<h2>Held-out figures by step</h2>"
        f'<div class="curves two">{_curves(runs)}</div>'
    )
    write_page(path, page("vapr compare", body, css=_css(len(runs))))


def _differences(runs: Sequence[Run], differences: dict[str, list[Any]]) -> str:
    if not differences:
        return "<h2>Config</h2><p>The configs are the same.</p>"
    rows = [[key, *(in_words(value) for value in values)] for key, values in differences.items()]
    table = folding_table(["key", *(run.name for run in runs)], rows)
    return f'<h2>What differs in the configs</h2><div class="box tall">{table}</div>'


def _curves(runs: Sequence[Run]) -> str:
    names = dict.fromkeys(figure.name for run in runs for figure in run.figures)
    boxes = []
    for name in names:
        series = [Series(run.name, f"run-{n}", _points(run, name)) for n, run in enumerate(runs)]
        series = [one for one in series if any(y is not None for _, y in one.points)]
        if chart := line_chart(series, label=f"{name} on held-out pairs by step"):
            boxes.append(f'<div class="box"><h3>{html.escape(name)}</h3>{_legend(series)}{chart}</div>')
    return "".join(boxes)


def _points(run: Run, name: str) -> list[Point]:
    figure = next((figure for figure in run.figures if figure.name == name), None)
    if figure is None:
        return []
    return [(float(row["step"]), figure.mean([row], "eval/")) for row in run.evaluation]


def _legend(series: Sequence[Series]) -> str:
    entries = []
    for one in series:
        last = next(y for _, y in reversed(one.points) if y is not None)
        entries.append(f"<span>{swatch(one.colour)}{html.escape(one.name)} {readable(last)}</span> ")
    return f'<p class="legend">{"".join(entries)}</p>'


def _css(count: int) -> str:
    light, dark = (
        "".join(f".run-{n} {{ --colour:{COLOURS[n % len(COLOURS)][shade]}; }}" for n in range(count))
        for shade in (0, 1)
    )
    dashes = "".join(f".run-{n} .mean {{ stroke-dasharray:{DASHES[n % len(DASHES)]}; }}" for n in range(count))
    return f"{light}{dashes} @media screen and (prefers-color-scheme: dark) {{ {dark} }}"
