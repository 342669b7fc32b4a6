"""95 % intervals of shares and means whose pairs come in groups (all pairs of one image stand or fall together)."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Z = 1.959964
"""Quantile of the normal distribution for 95 %."""

MIN_GROUPS = 20
"""Below, what varies from group to group cannot be told, and a cross-validated number is one about the split."""

PRIOR = 0.1
"""Weight of the guess that all pairs of an image agree, against the sum of share (1 - share) over the images: about
that of one more image where nine in ten pairs are right. It counts where few images show any failure at all."""


def percent(values: np.ndarray, groups: np.ndarray) -> dict[str, float | list[float] | int | None]:
    """Return the mean of values in [0, 1] as ``value`` in percent, its 95 % ``interval`` [low, high], and ``pairs``.

    Args:
        values: of each pair, (P,).
        groups: equal numbers for pairs that stand or fall together, (P,).

    Wilson's interval at the effective number of pairs, with Student's t for the number of groups (E. L. Korn and
    B. I. Graubard, Survey Methodology 24 (1998) 193; N. Dean and M. Pagano, J. Surv. Stat. Methodol. 3 (2015) 484).
    The effective number is the number of pairs over Kish's design effect, whose correlation within groups is drawn
    towards 1 by :data:`PRIOR`: the plain estimate is far too small where nearly all pairs agree. Where every group
    holds one pair, the interval is Wilson's own. Both are None for no values.
    """
    count = len(values)
    if count == 0:
        return {"value": None, "interval": None, "pairs": 0}
    share = float(np.mean(values))
    _, sizes = np.unique(groups, return_counts=True)
    if len(sizes) == count:
        low, high = wilson(share, count)
    else:
        from scipy.stats import t

        low, high = wilson(share, _effective_number(values, groups, sizes), float(t.ppf(0.975, max(len(sizes) - 1, 1))))
    return {"value": 100 * share, "interval": [100 * low, 100 * high], "pairs": count}


def _effective_number(values: np.ndarray, groups: np.ndarray, sizes: np.ndarray) -> float:
    """Return the number of independent pairs whose mean varies as much as that of ``values``."""
    count, num_groups, share = len(values), len(sizes), float(np.mean(values))
    largest_effect = float((sizes**2).sum()) / count  # where pairs of a group are always equal
    spread = share * (1 - share)
    within = 0.0
    if spread > 0:
        effect = _variance_of_ratio(values, np.ones(count), groups) * count / spread
        within = min(max((effect - 1) / (largest_effect - 1), 0.0), 1.0)
    spread *= num_groups
    correlation = (within * spread + PRIOR) / (spread + PRIOR)
    return count / (1 + (largest_effect - 1) * correlation)


def wilson(share: float, count: float, quantile: float = Z) -> tuple[float, float]:
    """Return Wilson's score interval of a share among ``count`` independent trials (JASA 22 (1927) 209), in [0, 1].

    It is a 95 % interval unless ``quantile``, of the standard normal distribution, says else.
    """
    centre = (share + quantile**2 / (2 * count)) / (1 + quantile**2 / count)
    reach = quantile / (1 + quantile**2 / count) * math.sqrt(share * (1 - share) / count + quantile**2 / (4 * count**2))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def relative_gap(values: np.ndarray, base: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    """Return how much larger the mean of ``values`` (P,) is than that of ``base`` (P,), in percent of the latter.

    The interval is the delta method's, with Student's t for the number of groups; None for fewer than
    :data:`MIN_GROUPS`.
    """
    num_groups = len(np.unique(groups))
    if len(base) == 0 or base.sum() == 0:
        return {"value": None, "interval": None, "groups": num_groups}
    gap = float(values.sum() / base.sum() - 1)
    if num_groups < MIN_GROUPS:
        return {"value": 100 * gap, "interval": None, "groups": num_groups}
    from scipy.stats import t

    reach = float(t.ppf(0.975, num_groups - 1)) * math.sqrt(_variance_of_ratio(values, base, groups))
    return {"value": 100 * gap, "interval": [100 * (gap - reach), 100 * (gap + reach)], "groups": num_groups}


def _variance_of_ratio(values: np.ndarray, base: np.ndarray, groups: np.ndarray) -> float:
    """Return the cluster-robust variance of ``sum(values) / sum(base)``; groups are drawn, not pairs."""
    ratio = values.sum() / base.sum()
    _, number = np.unique(groups, return_inverse=True)
    residuals = np.bincount(number, weights=values - ratio * base)
    count = len(residuals)
    return float((residuals**2).sum() / base.sum() ** 2 * count / max(count - 1, 1))


def bootstrap(
    statistic: Callable[[np.ndarray], float], groups: np.ndarray, seed: int, resamples: int = 1000
) -> list[float]:
    """Return the 95 % percentile interval of a statistic over resampled groups.

    Args:
        statistic: its value for weights of the pairs (P,) float64: how often each was drawn.
        groups: group of each pair (P,).
        seed: of the draws.
        resamples: how many.
    """
    generator = np.random.default_rng(seed)
    _, number = np.unique(groups, return_inverse=True)
    count = int(number.max()) + 1
    drawn = []
    for _ in range(resamples):
        times = np.bincount(generator.integers(0, count, count), minlength=count)
        drawn.append(statistic(times[number].astype(float)))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return [float(low), float(high)]
