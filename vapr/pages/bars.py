"""Bars with intervals and limits, and histograms, as inline SVG."""

from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

from vapr.pages.chart import readable

WIDTH = 360
ROW = 46
NAME_LENGTH = 32

Axis = tuple[float, float]


class Bar(NamedTuple):
    """A value with its interval and how it is written; without a value only ``text`` is shown."""

    name: str
    value: float | None
    interval: Sequence[float] | None
    text: str


class Limit(NamedTuple):
    """A line across the bars; ``colour`` is a variable of the page's style."""

    value: float
    colour: str


def bar_chart(bars: Sequence[Bar], axis: Axis, limits: Sequence[Limit], label: str) -> Markup:
    """Draw a bar for each value from the axis's beginning, and the limits across them; values below it have none."""
    height = len(bars) * ROW + 22
    drawn = "".join(_bar(bar, n * ROW, axis) for n, bar in enumerate(bars))
    for limit in limits:
        x = _x(limit.value, axis)
        drawn += (
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="18" y2="{height - 16}" stroke="var(--{limit.colour})" '
            f'stroke-dasharray="4 3"/><text x="{x:.1f}" y="{height - 3}" text-anchor="middle">{limit.value:g}</text>'
        )
    return _svg(height, label, drawn)


def histogram(edges: Sequence[float], counts: Sequence[int], ticks: Sequence[float], label: str) -> Markup:
    """Draw counts between edges, the tallest bar as high as the plot; ``ticks`` are written below."""
    base, top, tallest = 150, 18, max(*counts, 1)
    axis = (edges[0], edges[-1])
    drawn = ""
    for tick in ticks:
        x = _x(tick, axis)
        anchor = "start" if x < 20 else "end" if x > WIDTH - 20 else "middle"
        drawn += (
            f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{base + 4}"/>'
            f'<text x="{x:.1f}" y="{base + 18}" text-anchor="{anchor}">{readable(tick)}</text>'
        )
    for count, first, last in zip(counts, edges[:-1], edges[1:], strict=True):
        left, right = _x(first, axis), _x(last, axis)
        height = max(count / tallest * (base - top), 1)
        if count:
            drawn += (
                f'<rect x="{left + 0.5:.1f}" y="{base - height:.1f}" width="{max(right - left - 1, 0.5):.1f}" '
                f'height="{height:.1f}" fill="var(--after)"/>'
            )
    return _svg(172, label, f'{drawn}<text x="{WIDTH - 6}" y="12" text-anchor="end">tallest: {tallest:,} pairs</text>')


def _svg(height: int, label: str, drawn: str) -> Markup:
    return Markup(f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{drawn}</svg>')


def _x(value: float, axis: Axis) -> float:
    inside = min(max(value, axis[0]), axis[1])
    return 6 + (inside - axis[0]) / (axis[1] - axis[0]) * (WIDTH - 12)


def _bar(bar: Bar, top: int, axis: Axis) -> str:
    name = bar.name if len(bar.name) <= NAME_LENGTH else f"…{bar.name[1 - NAME_LENGTH :]}"
    drawn = (
        f'<text x="6" y="{top + 13}">{escape(name)}</text>'
        f'<text x="{WIDTH - 6}" y="{top + 13}" text-anchor="end">{escape(bar.text)}</text>'
    )
    if bar.value is not None:
        width = max(_x(bar.value, axis) - 6, 1)
        drawn += f'<rect x="6.0" y="{top + 19}" width="{width:.1f}" height="14" rx="3" fill="var(--after)"/>'
    if bar.interval is not None:
        low, high = (_x(value, axis) for value in bar.interval)
        ends = "".join(f"M{x:.1f} {top + 22}v8" for x in (low, high))
        drawn += f'<path d="M{low:.1f} {top + 26}H{high:.1f}{ends}" class="whisker"/>'
    return drawn
