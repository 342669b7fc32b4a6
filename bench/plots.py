"""Plots of microbenchmark rows: time and share of the ceiling against the number of rows, a panel for each shape."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

Row = dict[str, Any]

OURS = ("#08306b", "#2171b5", "#4292c6", "#6baed6", "#9ecae1")
MARKERS = "o^vDP"
PEERS = ("#d94801", "#238b45", "#6a51a3", "#cb181d", "#8c6d31", "#dd3497", "#525252")


def draw_op(name: str, rows_name: str, rows: list[Row], folder: Path) -> list[Path]:
    """One PNG for each pass; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    measured = [row for row in rows if "ceiling_share" in row]
    styles = styles_of(list(dict.fromkeys(row["provider"] for row in measured)))
    files = []
    for number, of_pass in enumerate(dict.fromkeys(row["pass"] for row in measured)):
        here = [row for row in measured if row["pass"] == of_pass]
        file = folder / f"{name}_{number}_{of_pass.replace(' + ', '_').replace(' ', '_')}.png"
        draw_pass(f"{name}, {of_pass}", rows_name, here, styles, file)
        files.append(file)
    return files


def styles_of(providers: list[str]) -> dict[str, dict[str, Any]]:
    """vapr's lines are blue and solid, the default one thickest; each peer has a colour of its own and is dashed."""
    ours = [name for name in providers if name.startswith("vapr")]
    peers = [name for name in providers if not name.startswith("vapr")]
    styles: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(ours):
        width = 2.6 if name == "vapr" else 1.3
        line = {"color": OURS[number % len(OURS)], "linewidth": width, "linestyle": "-", "zorder": 3}
        styles[name] = {**line, "marker": MARKERS[number % len(MARKERS)], "markersize": 4.5}
    for number, name in enumerate(peers):
        line = {"color": PEERS[number % len(PEERS)], "linewidth": 1.4, "linestyle": "--", "zorder": 2}
        styles[name] = {**line, "marker": "s", "markersize": 3.5}
    return styles


def draw_pass(title: str, rows_name: str, rows: list[Row], styles: dict[str, dict[str, Any]], file: Path) -> None:
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure, axes = plt.subplots(
        2, len(shapes), figsize=(max(8.5, 3.3 * len(shapes)), 7), sharex="col", sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for column, shape in enumerate(shapes):
        here = [row for row in rows if row["shape"] == shape]
        draw_panel(axes[0, column], here, styles, "seconds_p50", 1e3)
        draw_panel(axes[1, column], here, styles, "ceiling_share", 100)
        # The shape again under its name, so that a plot can be read on its own.
        sizes = ", ".join(f"{key} {here[0][key]:,}" for key in here[0] if len(key) == 1)
        axes[0, column].set_title(f"{shape}\n{sizes}", fontsize=10)
        axes[0, column].set_yscale("log")
        axes[1, column].axhline(100, color="#999999", linewidth=0.8)
        axes[1, column].set_xlabel(rows_name)
    axes[1, 0].set_ylim(bottom=0)  # once all panels, which share it, hold their lines
    axes[0, 0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0, 0].yaxis.set_minor_locator(NullLocator())
    axes[0, 0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes[0, 0].set_ylabel("ms of a call")
    axes[1, 0].set_ylabel("% of ceiling")
    lines = {line.get_label(): line for panel in axes.flat for line in panel.get_lines() if line.get_label() in styles}
    names = [name for name in styles if name in lines]
    handles = [lines[name] for name in names]
    figure.legend(
        handles, names, loc="outside lower center", ncols=min(6 if len(shapes) > 2 else 4, len(names)), frameon=False
    )
    dirty = "" if not rows[0]["commit"].endswith("-dirty") else " (dirty)"
    where = f"{rows[0]['device']}, {rows[0]['dtype']}, commit {rows[0]['commit'].removesuffix('-dirty')[:8]}{dirty}"
    legend = f"above: median, band from p20 to p80; below: {ceiling_label(rows[0])}"
    figure.suptitle(f"{title}\n{where}\n{legend}", fontsize=9.5)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def ceiling_label(row: Row) -> str:
    if "tflops" in row:
        return f"{row['flops']} operations, of the {row['matmul_tflops']:.3g} TFLOP/s of a square matrix product"
    return f"bytes that have to move, of the {row['copy_gb_per_second']:,.0f} GB/s of a copy"


def draw_panel(panel: Axes, rows: list[Row], styles: dict[str, dict[str, Any]], key: str, scale: float) -> None:
    numbers = sorted({row["rows"] for row in rows})
    for name, style in styles.items():
        line = sorted((row for row in rows if row["provider"] == name), key=lambda row: row["rows"])
        x = [row["rows"] for row in line]
        panel.plot(x, [scale * row[key] for row in line], label=name, **style)
        if key == "seconds_p50":
            low, high = ([scale * row[f"seconds_{p}"] for row in line] for p in ("p20", "p80"))
            panel.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_locator(FixedLocator(numbers))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    panel.grid(True, color="#e5e5e5", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
