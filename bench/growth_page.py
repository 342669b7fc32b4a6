"""docs/growth.md and its plots, from the rows of bench.growth and bench.data_path.

The page's sentences and plots are made of the newest run of each device and sweep, so that no figure in them is typed.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.record import REPOSITORY

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 40, 46
COLOURS = ("#2171b5", "#d94801", "#238b45")

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Sweep:
    """One plot: what stands on its axis, and what is said of it."""

    name: str
    axis: str
    note: str


SWEEPS = (
    Sweep(
        "pack_tokens", "tokens a pack may have",
        "The same pairs in more or fewer packs. Attention goes along a pair's own paths, so it costs what the\n"
        "pairs are long, not what the pack is.",
    ),
    Sweep(
        "image_tokens", "tokens an image",
        "Longer sequences: every token attends to those before it, and Qwen's tower has layers in which all patches\n"
        "of an image attend to each other, so FLOPs grow faster than tokens.",
    ),
    Sweep(
        "completion_tokens", "tokens a completion",
        "Chosen and rejected differ in one word, and what stands before it is computed once. Every completion token "
        "reaches the LM head.",
    ),
    Sweep(
        "pairs_per_image", "pairs an image, share: image",
        "An image's tokens are computed once for all of its pairs.",
    ),
    Sweep(
        "rows", "rows in the file",
        "The data path alone, without a model (rows of `bench.data_path`): of 1,000 rows no image comes twice, so\n"
        "every one is decoded and processed there; from 10,000 on some are remembered.",
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Line:
    """The points of a sweep on one device, by growing value."""

    device: str
    commit: str
    values: list[float]
    seconds: list[float]  # a pair
    low: list[float]  # the 20th percentile
    high: list[float]  # the 80th
    tokens: list[float]  # a pair; empty for the data path
    flops: list[float]  # a pair; empty for the data path


def write_page(folder: Path, results: Path | None = None) -> list[Path]:
    """Write a plot for each sweep into ``folder`` and the block of ``folder``.md; return the files."""
    lines = read_lines(results or Path(os.environ.get("OUT") or REPOSITORY / "bench" / "results"))
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for sweep in SWEEPS:
        if lines[sweep.name]:
            files.append(folder / f"{sweep.name}.svg")
            files[-1].write_text(draw(sweep, lines[sweep.name]), encoding="utf-8")
    page = folder.with_name(f"{folder.name}.md")
    before, rest = page.read_text(encoding="utf-8").split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    page.write_text(f"{before}{BEGIN}\n{describe(lines, folder.name)}\n{END}{after}", encoding="utf-8")
    return [*files, page]


def read_lines(results: Path) -> dict[str, list[Line]]:
    """A line for each sweep and device. Rows of bench.data_path lie in the repository, wherever the others are."""
    growth = [row for row in _rows(results / "growth.jsonl") if "seconds_per_pair" in row]
    path = [row for row in _rows(REPOSITORY / "bench" / "results" / "data_path.jsonl") if row["provider"] == "vapr"]
    lines: dict[str, list[Line]] = {sweep.name: [] for sweep in SWEEPS}
    for sweep in SWEEPS:
        of_sweep = path if sweep.name == "rows" else [row for row in growth if row["sweep"] == sweep.name]
        for device in dict.fromkeys(row["device"] for row in of_sweep):
            rows = [row for row in of_sweep if row["device"] == device]
            newest = [row for row in rows if row["run"] == rows[-1]["run"]]
            lines[sweep.name].append(_data_path_line(newest) if sweep.name == "rows" else _step_line(newest))
    return lines


def _rows(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def _step_line(rows: list[Row]) -> Line:
    rows = sorted(rows, key=lambda row: row["value"])
    fields = ("seconds_p50", "seconds_p20", "seconds_p80", "tokens", "flops")
    each = ([row[field] / row["pairs"] for row in rows] for field in fields)
    return Line(rows[-1]["device"], rows[-1]["commit"], [row["value"] for row in rows], *each)


def _data_path_line(rows: list[Row]) -> Line:
    rows = sorted(rows, key=lambda row: row["rows"])
    seconds = [1 / row["pairs_per_second"] for row in rows]
    values = [row["rows"] for row in rows]
    return Line(rows[-1]["device"], rows[-1]["commit"], values, seconds, seconds, seconds, [], [])


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Return e of y = a x^e, by least squares of the logarithms."""
    log_x, log_y = ([math.log(value) for value in values] for values in (x, y))
    mean_x, mean_y = sum(log_x) / len(log_x), sum(log_y) / len(log_y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(log_x, log_y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in log_x)


def describe(lines: dict[str, list[Line]], folder: str) -> str:
    """The block of the page: a plot and its sentences for each sweep."""
    parts = []
    for sweep in SWEEPS:
        parts.append(f"## By {sweep.axis}\n\n{sweep.note}")
        if not lines[sweep.name]:
            parts[-1] += "\n\nNot measured yet."
            continue
        sentences = "\n".join(f"- {sentence(line)}" for line in lines[sweep.name])
        parts[-1] += f"\n\n![Time a pair by {sweep.axis}]({folder}/{sweep.name}.svg)\n\n{sentences}"
    return "\n\n".join(parts)


def sentence(line: Line) -> str:
    """Say how time a pair grows, and how far tokens and counted FLOPs explain it."""
    dirty = " (dirty)" if line.commit.endswith("-dirty") else ""
    where = f"{line.device}, commit {line.commit[:8]}{dirty}"
    first, last = (_number(1e3 * line.seconds[place]) for place in (0, -1))
    text = (
        f"{where}: from {line.values[0]:,} to {line.values[-1]:,} a pair's time goes from {first} to {last} ms, "
        f"as x to the power of {exponent(line.values, line.seconds):.2f}"
    )
    if not line.tokens:
        return f"{text}."
    if max(line.tokens) < 1.05 * min(line.tokens):
        return f"{text}; tokens and FLOPs a pair stay what they are ({line.tokens[-1]:,.0f} tokens)."
    by_tokens = exponent(line.tokens, line.seconds)
    return (
        f"{text}. A pair's packed tokens go from {line.tokens[0]:,.0f} to {line.tokens[-1]:,.0f}: its time goes as "
        f"tokens to the power of {by_tokens:.2f}, its counted FLOPs of {exponent(line.tokens, line.flops):.2f}."
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def draw(sweep: Sweep, lines: list[Line]) -> str:
    """The plot as SVG: both axes logarithmic, a dot for each median, a bar from p20 to p80, the fit dashed."""
    values = sorted({value for line in lines for value in line.values})
    seconds = [value for line in lines for value in (*line.low, *line.high)]
    bottom, top = _decimals(1e3 * min(seconds), down=True), _decimals(1e3 * max(seconds), down=False)

    def x(value: float) -> float:
        share = math.log(value / values[0]) / math.log(values[-1] / values[0])
        return LEFT + 14 + share * (WIDTH - LEFT - RIGHT - 28)

    def y(ms: float) -> float:
        return TOP + math.log(top / ms) / math.log(top / bottom) * (HEIGHT - TOP - BOTTOM)

    title = f"ms a pair by {sweep.axis}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="12" role="img" aria-label="{title}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="16" font-weight="bold">{title}</text>',
    ]
    for tick in _ticks(bottom, top):
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}" stroke="#e5e7eb"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    below = HEIGHT - BOTTOM + 18
    parts += [f'<text x="{x(value):.1f}" y="{below}" text-anchor="middle">{value:,}</text>' for value in values]
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{sweep.axis}</text>')
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<text x="{LEFT}" y="{32 + 13 * number}" fill="{colour}">{line.device}</text>')
        ends = (line.values[0], line.values[-1])
        fitted = [f"{x(value):.1f} {y(_clip(1e3 * _fit(line, value), bottom, top)):.1f}" for value in ends]
        parts.append(f'<path d="M{"L".join(fitted)}" stroke="{colour}" stroke-dasharray="4 4"/>')
        for value, ms, low, high in zip(line.values, line.seconds, line.low, line.high, strict=True):
            bar = f"M{x(value):.1f} {y(1e3 * low):.1f}V{y(1e3 * high):.1f}"
            parts.append(f'<path d="{bar}" stroke="{colour}" stroke-width="2"/>')
            parts.append(f'<circle cx="{x(value):.1f}" cy="{y(1e3 * ms):.1f}" r="4" fill="{colour}"/>')
    return "\n".join([*parts, "</svg>\n"])


def _fit(line: Line, value: float) -> float:
    """Seconds of the fitted power law at a value; it goes through the geometric means."""
    power = exponent(line.values, line.seconds)
    means = [math.exp(sum(map(math.log, numbers)) / len(numbers)) for numbers in (line.values, line.seconds)]
    return means[1] * (value / means[0]) ** power


def _clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def _decimals(value: float, *, down: bool) -> float:
    """The next of 1, 2, 5, 10, ... below or above a value."""
    power = 10.0 ** math.floor(math.log10(value))
    steps = [power * step for step in (1, 2, 5, 10)]
    return max(step for step in steps if step <= value) if down else min(step for step in steps if step > value)


def _ticks(bottom: float, top: float) -> list[float]:
    powers = range(math.floor(math.log10(bottom)), math.ceil(math.log10(top)) + 1)
    ticks = [step * 10.0**power for power in powers for step in (1, 2, 5)]
    return [tick for tick in ticks if bottom * 0.999 <= tick <= top * 1.001]
