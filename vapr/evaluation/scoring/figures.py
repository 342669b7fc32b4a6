"""Figures with 95 % intervals. Questions about one picture stand or fall together, so intervals are clustered by it."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vapr.intervals import percent, wilson

RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Figure:
    """A value with its 95 % interval; both None where there is nothing to measure."""

    value: float | None
    interval: tuple[float, float] | None
    count: int  # questions (or groups) behind it

    def as_dict(self) -> dict[str, Any]:
        return {"value": self.value, "interval": self.interval and list(self.interval), "count": self.count}


NONE = Figure(None, None, 0)


def numbered(groups: Sequence[Hashable]) -> np.ndarray:
    """Return a number for each group, equal ones for equal groups, (P,) int64."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)


def share(holds: Sequence[bool | float] | np.ndarray, groups: Sequence[Hashable] | np.ndarray | None = None) -> Figure:
    """Return the mean of values in [0, 1] with Wilson's interval, widened for groups (:mod:`vapr.intervals`).

    Args:
        holds: of each question, (P,).
        groups: the picture of each question, (P,); None if all are independent.
    """
    values = np.asarray(holds, dtype=float)
    if len(values) == 0:
        return NONE
    if groups is None:
        return Figure(float(values.mean()), wilson(float(values.mean()), len(values)), len(values))
    measured = percent(values, groups if isinstance(groups, np.ndarray) else numbered(groups))
    low, high = measured["interval"]  # type: ignore[misc]
    return Figure(float(values.mean()), (low / 100, high / 100), len(values))


def of_counts(
    counts: np.ndarray, groups: np.ndarray, statistics: Mapping[str, Callable[[np.ndarray], np.ndarray]], seed: int = 0
) -> dict[str, Figure]:
    """Return statistics of summed counts, with percentile intervals of a bootstrap over groups.

    Groups with equal counts are interchangeable, so what is drawn is how often each *kind* of group appears: the same
    distribution as drawing groups, at a cost that does not grow with their number.

    Args:
        counts: of each question, (P, K).
        groups: number of each question's picture, (P,).
        statistics: by name, functions of summed counts (R, K) that return (R,), NaN where undefined.
        seed: of the draws.
    """
    if len(counts) == 0:
        return dict.fromkeys(statistics, NONE)
    sums = np.zeros((int(groups.max()) + 1, counts.shape[1]))
    np.add.at(sums, groups, counts)
    present = np.bincount(groups, minlength=len(sums)) > 0
    kinds, times = np.unique(sums[present], axis=0, return_counts=True)
    num_groups = int(times.sum())
    drawn = np.random.default_rng(seed).multinomial(num_groups, times / num_groups, size=RESAMPLES) @ kinds
    total = counts.sum(axis=0, keepdims=True).astype(float)
    figures = {}
    with np.errstate(divide="ignore", invalid="ignore"):
        for name, statistic in statistics.items():
            value = float(statistic(total)[0])
            spread = statistic(drawn)
            spread = spread[np.isfinite(spread)]
            known = math.isfinite(value)
            interval = np.percentile(spread, [2.5, 97.5]) if known and len(spread) else None
            figures[name] = Figure(
                value if known else None,
                None if interval is None else (float(interval[0]), float(interval[1])),
                len(counts),
            )
    return figures
