"""Means of shares that were measured on different questions, such as the mean over categories."""

import math
from collections.abc import Sequence

from vapr.evaluation.scoring.figures import NONE, Figure


def mean_of(parts: Sequence[Figure], weights: Sequence[float] | None = None) -> Figure:
    """Return the weighted mean of independent shares; nothing if one of them was not measured.

    The interval recovers variances from the limits of the shares' own intervals, so it is as sound near 0 and 1 as
    those are (G. Y. Zou, W. Huang and X. Zhang, Comput. Stat. Data Anal. 53 (2009) 1080).

    Args:
        parts: the shares.
        weights: of each, with sum 1; None for equal ones.
    """
    weights = weights or [1 / len(parts)] * len(parts)
    if not parts or any(part.value is None for part in parts):
        return NONE
    value, below, above = 0.0, 0.0, 0.0
    for part, weight in zip(parts, weights, strict=True):
        assert part.value is not None
        low, high = part.interval or (part.value, part.value)
        value += weight * part.value
        below += (weight * (part.value - low)) ** 2
        above += (weight * (high - part.value)) ** 2
    interval = (max(0.0, value - math.sqrt(below)), min(1.0, value + math.sqrt(above)))
    return Figure(value, interval, sum(part.count for part in parts))
