"""The page of a study: accuracy and yes rate against data size, and a table of every combination."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vapr.pages.chart import MINUS, Series, line_chart
from vapr.pages.compare import COLOURS, DASHES
from vapr.pages.page import write_page

HEADS = ["data", "loss", "pairs", "runs", "accuracy", "less the base's", "says yes", "truth is yes", "unparsed"]

DASH = "\N{EN DASH}"
"""What stands where a table has nothing to say."""

CHARTS = (("accuracy", "accuracy"), ("yes rate", "yes_rate"))


def write_study_report(path: Path, result: dict[str, Any]) -> None:
    """Write the page of what :func:`vapr.study.run_study.run_study` returns, whole or not at all."""
    lines = list(dict.fromkeys((row["data"], row["loss"]) for row in result["cells"]))
    write_page(
        path,
        "study.html",
        name=path.resolve().parent.name,
        lines=[(*COLOURS[n % len(COLOURS)], DASHES[n % len(DASHES)]) for n in range(len(lines))],
        counted=counted(result["cells"]),
        failed=[(_name(cell), cell["why"]) for cell in result["cells"] if cell["state"] == "failed"],
        seeds=_on_seeds(result["cells"]),
        measures=[
            (f"{name}: {measure['questions']:,} questions", _charts(measure, lines), table(measure))
            for name, measure in result["measures"].items()
        ],
        parsing=result["parsing"],
    )


def counted(cells: Sequence[dict[str, Any]]) -> str:
    """Say how many runs are trained, have failed and are left."""
    states = [cell["state"] for cell in cells]
    counts = [f"{states.count(state):,} {state}" for state in ("trained", "failed", "left") if state in states]
    return f"{len(cells):,} runs: {', '.join(counts)}."


def table(measure: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of the table of a measure, the base first."""
    rows = [["base", "", "0", "", *_cells(measure["base"])]]
    for group in measure["groups"]:
        place = [group["data"], group["loss"], f"{group['size']:,}", str(len(group["seeds"]))]
        rows.append([*place, *_cells(group["figures"])])
    used = [n for n in range(len(HEADS)) if n < 5 or any(row[n] for row in rows)]
    return [HEADS[n] for n in used], [[row[n] or DASH for n in used] for row in rows]


def _cells(figures: dict[str, Any]) -> list[str]:
    return [
        _share(figures["accuracy"]),
        _points(figures.get("difference")),
        _share(figures["yes_rate"]),
        _share(figures["gold_yes_rate"], interval=False),
        _share(figures["unparsed_rate"], interval=False),
    ]


def _share(figure: dict[str, Any], *, interval: bool = True) -> str:
    if figure["value"] is None:
        return ""
    text = f"{figure['value']:.1%}"
    if interval and figure["interval"]:
        low, high = figure["interval"]
        text += f" [{100 * low:.1f}, {100 * high:.1f}]"
    return text


def _points(figure: dict[str, Any] | None) -> str:
    if not figure or figure["value"] is None:
        return ""
    text = f"{100 * figure['value']:+.1f}"
    if figure["interval"]:
        low, high = figure["interval"]
        text += f" [{100 * low:+.1f}, {100 * high:+.1f}]" + (" not told apart" if low <= 0 <= high else "")
    return text.replace("-", MINUS)


def _charts(measure: dict[str, Any], lines: Sequence[tuple[str, str]]) -> list[tuple[str, list[Series], Any]]:
    """Return title, series and drawing of each figure that has values; every line begins at the base, 0 pairs."""
    charts = []
    for title, key in CHARTS:
        base = measure["base"][key]
        if base["value"] is None:
            continue
        series = []
        for n, (data, loss) in enumerate(lines):
            groups = [group for group in measure["groups"] if (group["data"], group["loss"]) == (data, loss)]
            points = [(0.0, base), *sorted(((float(g["size"]), g["figures"][key]) for g in groups), key=lambda p: p[0])]
            series.append(
                Series(
                    f"{data} {loss}", f"run-{n}", [(x, figure["value"]) for x, figure in points],
                    intervals=[figure["interval"] and tuple(figure["interval"]) for _, figure in points],
                )
            )  # fmt: skip
        if key == "yes_rate":
            ends = (0.0, max(x for one in series for x, _ in one.points))
            series.append(Series("truth", "before", [(x, measure["base"]["gold_yes_rate"]["value"]) for x in ends]))
        charts.append((title, series, line_chart(series, label=f"{title} by number of pairs", axis="pairs")))
    return charts


def _on_seeds(cells: Sequence[dict[str, Any]]) -> str:
    if len({cell["seed"] for cell in cells}) > 1:
        return "They hold what the questions leave open and what differs from seed to seed."
    return "There is one seed: how much another one would change is not in them."


def _name(cell: dict[str, Any]) -> str:
    return f"{cell['data']} {cell['loss']} {cell['size']:,} seed {cell['seed']}"
