"""Bars with intervals and limits, and histograms, as inline SVG."""

import html
from collections.abc import Sequence
from typing import NamedTuple

from vapr.pages.chart import readable

WIDTH = 360
ROW = 46
NAME_LENGTH = 32


class Bar(NamedTuple):
    """One value with its interval and how it is written; no value: only ``text``."""

    name: str
    value: float | None
    interval: Sequence[float] | None
    text: str


class Limit(NamedTuple):
    """A line across the bars; ``colour`` is a variable of the page's style."""

    value: float
    colour: str


def bar_chart(bars: Sequence[Bar], axis: tuple[float, float], limits: Sequence[Limit], label: str) -> str:
    """One SVG with a bar for each value from the axis's beginning; values below it have none."""
    height = len(bars) * ROW + 22
    drawn = "".join(_bar(bar, n * ROW, axis) for n, bar in enumerate(bars))
    lines = "".join(
        f'<line x1="{_x(limit.value, axis):.1f}" x2="{_x(limit.value, axis):.1f}" y1="18" y2="{height - 16}" '
        f'stroke="var(--{limit.colour})" stroke-dasharray="4 3"/><text x="{_x(limit.value, axis):.1f}" '
        f'y="{height - 3}" text-anchor="middle">{limit.value:g}</text>'
        for limit in limits
    )
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(label)}">{drawn}{lines}</svg>'


def _x(value: float, axis: tuple[float, float]) -> float:
    inside = min(max(value, axis[0]), axis[1])
    return 6 + (inside - axis[0]) / (axis[1] - axis[0]) * (WIDTH - 12)


def _bar(bar: Bar, top: int, axis: tuple[float, float]) -> str:
    name = bar.name if len(bar.name) <= NAME_LENGTH else f"…{bar.name[1 - NAME_LENGTH :]}"
    text = f'<text x="6" y="{top + 13}">{html.escape(name)}</text>'
    value = f'<text x="{WIDTH - 6}" y="{top + 13}" text-anchor="end">{html.escape(bar.text)}</text>'
    if bar.value is None:
        return text + value
    left, right = _x(axis[0], axis), _x(bar.value, axis)
    shape = (
        f'<rect x="{left:.1f}" y="{top + 19}" width="{max(right - left, 1):.1f}" height="14" rx="3" '
        'fill="var(--after)"/>'
    )
    whisker = ""
    if bar.interval is not None:
        low, high = (_x(value, axis) for value in bar.interval)
        ends = "".join(f"M{x:.1f} {top + 22}v8" for x in (low, high))
        whisker = f'<path d="M{low:.1f} {top + 26}H{high:.1f}{ends}" class="whisker"/>'
    return text + value + shape + whisker


def histogram(edges: Sequence[float], counts: Sequence[int], ticks: Sequence[float], label: str) -> str:
    """One SVG of counts between edges, the tallest bar as high as the plot; ``ticks`` are written below."""
    base, top, tallest = 150, 18, max(*counts, 1)
    axis = (edges[0], edges[-1])
    bars = []
    for count, first, last in zip(counts, edges[:-1], edges[1:], strict=True):
        left, right = _x(first, axis), _x(last, axis)
        height = max(count / tallest * (base - top), 1)
        if count:
            bars.append(
                f'<rect x="{left + 0.5:.1f}" y="{base - height:.1f}" width="{max(right - left - 1, 0.5):.1f}" '
                f'height="{height:.1f}" fill="var(--after)"/>'
            )
    marks = "".join(_tick(tick, axis, top, base) for tick in ticks)
    note = f'<text x="{WIDTH - 6}" y="12" text-anchor="end">tallest: {tallest:,} pairs</text>'
    drawn = "".join(bars)
    return f'<svg viewBox="0 0 {WIDTH} 172" role="img" aria-label="{html.escape(label)}">{marks}{drawn}{note}</svg>'


def _tick(tick: float, axis: tuple[float, float], top: int, base: int) -> str:
    x = _x(tick, axis)
    anchor = "start" if x < 20 else "end" if x > WIDTH - 20 else "middle"
    return (
        f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{base + 4}"/>'
        f'<text x="{x:.1f}" y="{base + 18}" text-anchor="{anchor}">{readable(tick)}</text>'
    )
