"""Line charts as inline SVG: readable ticks, gaps where a value is missing, few points that keep every extreme."""

import math
from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

from markupsafe import Markup, escape

WIDTH, HEIGHT = 340, 200
TOP, BASE, RIGHT = 10, 160, 322  # of the plotted area
MAX_POINTS = 400
HUGE = 1e300  # beyond it, differences overflow
MINUS = "\N{MINUS SIGN}"
UNITS = ((1e15, 0.0, ""), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"), (1e-3, 1.0, ""))  # from, divisor, suffix

Point = tuple[float, float | None]


class Series(NamedTuple):
    """A line, or with ``marks`` separate dots; ``colour`` is a class of the page's style that sets ``--colour``.

    With ``intervals``, one for each point or None, the points are marked, too, and whiskers show them.
    """

    name: str
    colour: str
    points: Sequence[Point]  # (x, y) by rising x; None is a gap
    marks: bool = False
    intervals: Sequence[tuple[float, float] | None] = ()

    @property
    def last(self) -> str:
        """The newest value as the legend shows it; empty if there is none."""
        return next((readable(y) for _, y in reversed(self.points) if y is not None), "")


class _Axes(NamedTuple):
    """The values at the edges of the plot, and where they lie in pixels."""

    left: float
    xs: tuple[float, float]
    ys: tuple[float, float]

    def x(self, value: float) -> float:
        return self.left + (value - self.xs[0]) / (self.xs[1] - self.xs[0]) * (RIGHT - self.left)

    def y(self, value: float) -> float:
        return BASE - (value - self.ys[0]) / (self.ys[1] - self.ys[0]) * (BASE - TOP)


def line_chart(
    series: Sequence[Series], *, label: str, include: tuple[float, ...] = (), smooth: bool = False, axis: str = "step"
) -> Markup:
    """Draw every series by step, or by what else ``axis`` names.

    Args:
        series: the lines and dots; those without any value are left out.
        label: what a screen reader says.
        include: values that the vertical axis must reach.
        smooth: draw lines thin, and a thick running mean over them.
        axis: what the horizontal axis counts.

    Returns:
        The SVG, or an empty string if there is no value at all.
    """
    series = [one._replace(points=[(x, _clamp(y)) for x, y in one.points]) for one in series if one.last]
    values = [y for one in series for _, y in one.points if y is not None]
    values += [end for one in series for interval in one.intervals if interval is not None for end in interval]
    if not values:
        return Markup("")
    xs = [x for one in series for x, _ in one.points]
    first, last = min(xs), max(xs)
    ticks = _ticks(*_ends(min(*values, *include, values[0]), max(*values, *include, values[0])), 4)
    labels = _labels(ticks)
    left = 12 + 6.8 * max(len(text) for text in labels)
    axes = _Axes(left, (first, last) if first < last else (first - 1, first + 1), (ticks[0], ticks[-1]))
    drawn = "".join(
        f'<g class="{escape(one.colour)}">{_marks(one, axes) if one.marks else _line(one, axes, smooth)}'
        f"{_whiskers(one, axes)}</g>"
        for one in series
    )
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{_grid(axes, ticks, labels)}{_steps(axes, first, last)}"
        f'<text class="axis" x="{(left + RIGHT) / 2:.1f}" y="{HEIGHT - 6}">{escape(axis)}</text>{drawn}</svg>'
    )


def readable(value: float) -> str:
    """Write a number as a person would: about four digits, with k, M or G where that is shorter."""
    for bound, divisor, suffix in UNITS[1:]:
        if divisor > 1 and UNITS[0][0] > abs(value) >= bound:
            return f"{value / divisor:.4g}{suffix}".replace("-", MINUS)
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e").replace("-", MINUS)


def thinned(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """Keep at most ``most`` of the points: the ends, and of each stretch its smallest and largest value and a gap."""
    if len(points) <= most:
        return list(points)
    num_stretches = (most - 2) // 3
    kept = {0, len(points) - 1}
    for n in range(num_stretches):
        stretch = range(n * len(points) // num_stretches, (n + 1) * len(points) // num_stretches)
        known = [(y, i) for i in stretch if (y := points[i][1]) is not None]
        if known:
            kept |= {min(known)[1], max(known)[1]}
        if len(known) < len(stretch):
            kept.add(next(i for i in stretch if points[i][1] is None))
    return [points[i] for i in sorted(kept)]


def running_mean(points: Sequence[Point], reach: int) -> list[Point]:
    """Replace each value by the mean of the values up to ``reach`` places around it; gaps stay."""
    sums = [0.0, *accumulate(y or 0.0 for _, y in points)]
    counts = [0, *accumulate(y is not None for _, y in points)]
    means: list[Point] = []
    for n, (x, y) in enumerate(points):
        first, stop = max(0, n - reach), min(len(points), n + reach + 1)
        means.append((x, None if y is None else (sums[stop] - sums[first]) / (counts[stop] - counts[first])))
    return means


def _line(one: Series, axes: _Axes, smooth: bool) -> str:
    if not smooth or len(one.points) < 20:
        return _polylines(thinned(one.points), axes, "mean")
    mean = thinned(running_mean(one.points, max(2, len(one.points) // 40)), MAX_POINTS // 2)
    return _polylines(thinned(one.points), axes, "step") + _polylines(mean, axes, "mean")


def _polylines(points: Sequence[Point], axes: _Axes, kind: str) -> str:
    drawn = []
    for missing, group in groupby(points, key=lambda point: point[1] is None):
        if missing:
            continue
        places = [f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in group if y is not None]
        if len(places) == 1:  # a line of one point would not show
            x, y = places[0].split(",")
            drawn.append(f'<circle class="dot" cx="{x}" cy="{y}" r="{3 if kind == "mean" else 1}"/>')
        else:
            drawn.append(f'<polyline class="{kind}" points="{" ".join(places)}"/>')
    return "".join(drawn)


def _marks(one: Series, axes: _Axes) -> str:
    points = [(x, y) for x, y in thinned(one.points, MAX_POINTS // 2) if y is not None]
    radius = 4 if len(points) <= 30 else 2.5
    return "".join(f'<circle class="mark" cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="{radius}"/>' for x, y in points)


def _whiskers(one: Series, axes: _Axes) -> str:
    drawn = ""
    for (x, y), interval in zip(one.points, one.intervals, strict=False):
        if y is None or interval is None:
            continue
        low, high = (axes.y(value) for value in interval)
        left, right = axes.x(x) - 3, axes.x(x) + 3
        ends = "".join(f"M{left:.1f} {place:.1f}H{right:.1f}" for place in (low, high))
        drawn += f'<path class="spread" d="M{axes.x(x):.1f} {low:.1f}V{high:.1f}{ends}"/>'
    return drawn + (_marks(one, axes) if one.intervals and not one.marks else "")


def _grid(axes: _Axes, ticks: Sequence[float], labels: Sequence[str]) -> str:
    lines = []
    for tick, text in zip(ticks, labels, strict=True):
        y = axes.y(tick)
        kind = "zero" if tick == 0 and ticks[0] < 0 else "rule"
        lines.append(
            f'<line class="{kind}" x1="{axes.left:.1f}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{axes.left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
        )
    return "".join(lines)


def _steps(axes: _Axes, first: float, last: float) -> str:
    ticks = [tick for tick in _ticks(first, max(last, first + 1), 5, smallest=1) if first <= tick <= last]
    # So that a short run names its ends, and no two labels meet.
    ticks = ticks if len(ticks) > 1 else sorted({first, last})
    return "".join(
        f'<line class="rule" x1="{axes.x(tick):.1f}" x2="{axes.x(tick):.1f}" y1="{BASE}" y2="{BASE + 4}"/>'
        f'<text x="{axes.x(tick):.1f}" y="{BASE + 18}" text-anchor="middle">{text}</text>'
        for tick, text in zip(ticks, _labels(ticks), strict=True)
    )


def _clamp(value: float | None) -> float | None:
    if value is None or math.isnan(value):
        return None
    return 0.0 if abs(value) < 1 / HUGE else max(-HUGE, min(HUGE, value))


def _ends(low: float, high: float) -> tuple[float, float]:
    """Return the ends of an axis. One value (but for rounding) is shown with zero, so that its size can be seen."""
    if high - low > 1e-6 * max(abs(low), abs(high)):
        return low, high
    return min(low, 0.0), max(high, 0.0) or float(low == 0)


def _ticks(low: float, high: float, intervals: int, smallest: float = 0.0) -> list[float]:
    """Return round numbers from at or below ``low`` to at or above ``high``."""
    rough = (high - low) / intervals
    power = 10.0 ** math.floor(math.log10(rough))
    step = max(smallest, next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999))
    return [n * step for n in range(math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6) + 1)]


def _labels(ticks: Sequence[float]) -> list[str]:
    """Write the ticks in one unit, with as many decimals as their distance needs."""
    largest = max(abs(tick) for tick in ticks)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else max(largest, 1.0)
    divisor, suffix = next(((d, s) for bound, d, s in UNITS if largest >= bound), (0.0, ""))
    if largest and not divisor:
        exponent = math.floor(math.log10(largest))
        divisor, suffix = 10.0**exponent, f"e{exponent}"
    divisor = divisor or 1.0
    decimals = max(0, -math.floor(math.log10(step / divisor) + 1e-6))
    texts = [f"{tick / divisor:.{decimals}f}" for tick in ticks]
    return [("0" if float(text) == 0 else text + suffix).replace("-", MINUS) for text in texts]
