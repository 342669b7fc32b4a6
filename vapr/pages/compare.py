"""The page of vapr compare: held-out figures of several runs, what differs between them, and their curves overlaid."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from vapr.pages.chart import Point, Series, line_chart
from vapr.pages.page import write_page
from vapr.pages.runs_side_by_side import Run, config_rows, figure_rows

COLOURS = (("#1f6feb", "#5b9dff"), ("#c2570c", "#f0883e"), ("#1a7f4b", "#4cc38a"), ("#8a3ffc", "#c39bff"),
           ("#b3261e", "#ff8a80"), ("#0b7285", "#3bc9db"))  # fmt: skip
"""On a light and on a dark page."""

DASHES = ("none", "7 3", "2 3", "9 3 2 3")
"""So that lines can be told apart without colours; they change with every run, colours after that."""


def write_compare_page(path: Path, runs: Sequence[Run], result: dict[str, Any]) -> None:
    """Write the page of runs and of what :func:`vapr.pages.runs_side_by_side.compare` says, whole or not at all."""
    write_page(
        path,
        "compare.html",
        names=[run.name for run in runs],
        lines=[(*COLOURS[n % len(COLOURS)], DASHES[n % len(DASHES)]) for n in range(len(runs))],
        notes=result["notes"],
        figures=figure_rows(runs),
        differences=config_rows(result["differences"]),
        curves=_curves(runs),
    )


def _curves(runs: Sequence[Run]) -> list[tuple[str, list[Series], Markup]]:
    """Return title, lines and chart of each figure that has a value."""
    curves = []
    for name in dict.fromkeys(figure.name for run in runs for figure in run.figures):
        series = [Series(run.name, f"run-{n}", _points(run, name)) for n, run in enumerate(runs)]
        if svg := line_chart(series, label=f"{name} on held-out pairs by step"):
            curves.append((name, series, svg))
    return curves


def _points(run: Run, name: str) -> list[Point]:
    return [
        (float(row["step"]), figure.mean([row], "eval/"))
        for figure in run.figures
        if figure.name == name
        for row in run.evaluation
    ]
