"""Means of shares that were measured on different questions, such as the mean over categories."""

import math
from collections.abc import Sequence

from vapr.evaluation.scoring.figures import NONE, Figure
from vapr.intervals import Z, wilson


def mean_of(parts: Sequence[Figure], weights: Sequence[float] | None = None) -> Figure:
    """Return the weighted mean of independent shares; nothing if one of them was not measured.

    The interval is Wilson's at the number of independent questions that the mean is worth, 1 / sum(weight^2 / number),
    where the number of each share is the one that its own interval tells. It is sound near 0 and 1, where each
    share's own spread shows as none.

    Args:
        parts: the shares.
        weights: of each, with sum 1; None for equal ones.
    """
    values = [part.value for part in parts if part.value is not None]
    if not parts or len(values) < len(parts):
        return NONE
    weights = weights or [1 / len(parts)] * len(parts)
    value = min(1.0, math.fsum(weight * share for weight, share in zip(weights, values, strict=True)))
    spread = math.fsum(weight**2 / _number(part) for weight, part in zip(weights, parts, strict=True))
    return Figure(value, wilson(value, 1 / spread), sum(part.count for part in parts))


def _number(part: Figure) -> float:
    """Return the number of independent questions at which Wilson's interval is as wide as that of a share.

    Half the width h of Wilson's interval obeys h^2 (1 + a)^2 = a p (1 - p) + a^2 / 4 with a = Z^2 / number.
    """
    assert part.value is not None and part.interval is not None
    squared = ((part.interval[1] - part.interval[0]) / 2) ** 2
    half, rest = (part.value * (1 - part.value) - 2 * squared) / 2, 0.25 - squared
    return Z**2 * rest / (math.sqrt(half**2 + squared * rest) - half)
