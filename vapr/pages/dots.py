"""Dots with intervals in groups, as inline SVG: one row a model, one group a benchmark."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

from vapr.pages.chart import MINUS

WIDTH, LEFT, RIGHT = 360, 10, 350
HEAD, ROW = 24, 34
NAME_LENGTH = 34

SHAPES = (
    "M0 -4.6A4.6 4.6 0 1 1 0 4.6A4.6 4.6 0 1 1 0 -4.6Z",
    "M-4.2 -4.2H4.2V4.2H-4.2Z",
    "M0 -5.6L5.6 0L0 5.6L-5.6 0Z",
    "M0 -5.4L5.2 4H-5.2Z",
)
"""Circle, square, diamond and triangle, so that dots can be told apart without colours."""


class Dot(NamedTuple):
    """A value with its interval and how it is written; ``number`` chooses shape and class (``run-0``, ...)."""

    name: str
    number: int
    value: float | None
    interval: Sequence[float] | None
    text: str


def dot_chart(
    groups: Sequence[tuple[str, Sequence[Dot]]], *, label: str, bounds: tuple[float, float], zero: bool = False
) -> Markup:
    """Draw a row for each dot, under its group's name.

    Args:
        groups: name and dots of each.
        label: what a screen reader says.
        bounds: values that the axis never goes beyond.
        zero: whether the axis must show zero, with a line.

    Returns:
        The SVG, or an empty string if there is no value at all.
    """
    dots = [dot for _, members in groups for dot in members if dot.value is not None]
    if not dots:
        return Markup("")
    values = [value for dot in dots for value in (dot.value, *(dot.interval or ())) if value is not None]
    ticks = _ticks(min(*values, values[0], *([0.0] if zero else [])), max(*values, values[0], *([0.0] if zero else [])),
                   bounds)  # fmt: skip
    axis = (ticks[0], ticks[-1])
    drawn, top = [], 0
    for name, members in groups:
        drawn.append(f'<text x="{LEFT - 6}" y="{top + 17}" class="head">{escape(_short(name))}</text>')
        top += HEAD
        for dot in members:
            drawn.append(_row(dot, top, axis))
            top += ROW
    grid = "".join(_tick(tick, axis, top, zero) for tick in ticks)
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {top + 22}" role="img" aria-label="{escape(label)}">{grid}{"".join(drawn)}</svg>'
    )


def shape(number: int) -> Markup:
    """Draw the dot of a model for the legend."""
    return Markup(
        f'<svg class="swatch run-{number}" viewBox="-13 -6 26 12" aria-hidden="true">'
        f'<path class="mark" d="{SHAPES[number % len(SHAPES)]}"/></svg>'
    )


def _row(dot: Dot, top: int, axis: tuple[float, float]) -> str:
    drawn = (
        f'<text x="{LEFT}" y="{top + 11}">{escape(_short(dot.name))}</text>'
        f'<text x="{RIGHT + 4}" y="{top + 11}" text-anchor="end">{escape(dot.text)}</text>'
    )
    y = top + 22
    if dot.interval is not None:
        low, high = (_x(value, axis) for value in dot.interval)
        ends = "".join(f"M{x:.1f} {y - 4}v8" for x in (low, high))
        drawn += f'<path d="M{low:.1f} {y}H{high:.1f}{ends}" class="whisker"/>'
    if dot.value is not None:
        drawn += (
            f'<path class="mark run-{dot.number}" transform="translate({_x(dot.value, axis):.1f} {y})" '
            f'd="{SHAPES[dot.number % len(SHAPES)]}"/>'
        )
    return drawn


def _tick(tick: float, axis: tuple[float, float], base: int, zero: bool) -> str:
    x = _x(tick, axis)
    anchor = "start" if x < LEFT + 12 else "end" if x > RIGHT - 12 else "middle"
    kind = "zero" if zero and tick == 0 else "rule"
    return (
        f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{HEAD - 4}" y2="{base + 4}"/>'
        f'<text x="{x:.1f}" y="{base + 18}" text-anchor="{anchor}">{f"{tick:g}".replace("-", MINUS)}</text>'
    )


def _x(value: float, axis: tuple[float, float]) -> float:
    inside = min(max(value, axis[0]), axis[1])
    return LEFT + (inside - axis[0]) / (axis[1] - axis[0]) * (RIGHT - LEFT)


def _short(name: str) -> str:
    return name if len(name) <= NAME_LENGTH else f"…{name[1 - NAME_LENGTH :]}"


def _ticks(low: float, high: float, bounds: tuple[float, float]) -> list[float]:
    """Return at most seven round numbers around the values, within bounds where those allow two."""
    low, high = max(low, bounds[0]), min(high, bounds[1])
    rough = max((high - low) / 5, 1e-6)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if first == last:
        first, last = (first, last + 1) if (last + 1) * step <= bounds[1] else (first - 1, last)
    return [round(n * step, 9) for n in range(first, last + 1)]
