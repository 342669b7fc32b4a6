"""Two models on the same questions: does the one answer more of them, and how small a difference could be told?

Only questions that one model gets right and the other wrong (*discordant* ones) tell the two apart.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr
from scipy.stats import binomtest, chi2

from vapr.evaluation.scoring.figures import NONE, Figure, numbered, of_counts
from vapr.intervals import Z

EXACT_BELOW = 25
"""Discordant questions below which McNemar's test is the exact binomial one."""

FLIPS = 20_000
"""Draws of :func:`sign_flip`; its smallest p is one over them."""


def mcnemar(right_a: np.ndarray, right_b: np.ndarray) -> dict[str, Any]:
    """Test whether two models get equally many questions right, taking questions as independent.

    The exact binomial test below :data:`EXACT_BELOW` discordant questions, else chi-square with A. L. Edwards'
    correction (Psychometrika 13 (1948) 185). Where pictures have several questions, see :func:`sign_flip`.

    Args:
        right_a: whether model A is right, (P,) bool.
        right_b: whether model B is, on the same questions in the same order, (P,) bool.

    Returns:
        ``only_a`` and ``only_b``, how many only the one gets right; ``p``, two-sided; ``test``, exact or chi2.
    """
    a, b = np.asarray(right_a, dtype=bool), np.asarray(right_b, dtype=bool)
    assert a.shape == b.shape
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    discordant = only_a + only_b
    if discordant < EXACT_BELOW:
        p = float(binomtest(only_a, discordant).pvalue) if discordant else 1.0
        return {"only_a": only_a, "only_b": only_b, "p": p, "test": "exact"}
    statistic = max(abs(only_a - only_b) - 1, 0) ** 2 / discordant
    return {"only_a": only_a, "only_b": only_b, "p": float(chi2.sf(statistic, df=1)), "test": "chi2"}


def sign_flip(a: np.ndarray, b: np.ndarray, groups: Sequence[Hashable], seed: int = 0) -> float:
    """Return the two-sided p of no difference, where questions about one picture stand or fall together.

    Without a difference, the sum of b - a over a picture's questions is as likely to have the other sign; the signs of
    all pictures are drawn anew :data:`FLIPS` times (E. J. G. Pitman, Suppl. J. R. Stat. Soc. 4 (1937) 119). Where
    each picture has one question, this is McNemar's exact test, but for the draws.

    Args:
        a: value of each answer of model A in [0, 1], (P,).
        b: of model B, (P,).
        groups: the picture of each question, (P,).
        seed: of the draws.
    """
    if len(a) == 0:
        return 1.0
    sums = np.bincount(numbered(groups), weights=np.asarray(b, dtype=float) - np.asarray(a, dtype=float))
    sizes, times = np.unique(np.abs(sums).round(9), return_counts=True)
    # Pictures whose sums are equally large are interchangeable: what is drawn is how many of them are positive.
    positive = np.random.default_rng(seed).binomial(times, 0.5, size=(FLIPS, len(times)))
    drawn = np.abs((2 * positive - times) @ sizes)
    return float((1 + (drawn >= abs(sums.sum()) - 1e-9).sum()) / (1 + FLIPS))


def difference(a: np.ndarray, b: np.ndarray, groups: Sequence[Hashable], seed: int = 0) -> Figure:
    """Return the mean of b minus that of a, with the interval of a bootstrap over pictures.

    Where no picture differs there is nothing to draw from: the interval is then that of A. Agresti and Y. Min (Stat.
    Med. 24 (2005) 729) for as many questions as there are pictures.

    Args:
        a: value of each answer of model A in [0, 1], (P,).
        b: of model B, (P,).
        groups: the picture of each question, (P,).
        seed: of the draws.
    """
    if len(a) == 0:
        return NONE
    numbers = numbered(groups)
    change = np.asarray(b, dtype=float) - np.asarray(a, dtype=float)
    if not np.bincount(numbers, weights=change).any():
        reach = Z / (numbers.max() + 3)
        return Figure(0.0, (-reach, reach), len(change))
    counts = np.column_stack([change, np.ones(len(change))])
    return of_counts(counts, numbers, {"difference": lambda c: c[:, 0] / c[:, 1]}, seed)["difference"]


def power(discordant_share: float, n: int, difference: float) -> float:
    """Return the chance that McNemar's test tells a difference of two shares at p < 0.05.

    R. J. Connor, Biometrics 43 (1987) 207, after O. S. Miettinen, Biometrics 24 (1968) 339:
    Phi((|d| sqrt(n) - z sqrt(s)) / sqrt(s - d^2)).

    Args:
        discordant_share: share s of the questions that only one model gets right; at least ``|difference|``.
        n: number of questions.
        difference: d, of the shares right.
    """
    return _told(discordant_share, n, difference)


def detectable_difference(discordant_share: float, n: int, power: float = 0.8) -> float:
    """Return the smallest difference of two shares that :func:`power` tells with this chance.

    Where so few questions are discordant that not even all in favour of one model would do, the discordant share is
    taken to grow with the difference. 1 where even that is too small, with fewer than four questions.

    Args:
        discordant_share: share of the questions that only one model gets right.
        n: number of questions.
        power: the chance.
    """
    if _told(discordant_share, n, 1.0) < power:
        return 1.0
    return float(brentq(lambda difference: _told(discordant_share, n, difference) - power, 0.0, 1.0, xtol=1e-9))


def _told(share: float, n: int, difference: float) -> float:
    share = max(share, abs(difference))
    if share == 0 or n == 0:
        return 0.0
    ahead = abs(difference) * math.sqrt(n) - Z * math.sqrt(share)
    spread = math.sqrt(max(share - difference**2, 0.0))
    return float(ndtr(ahead / spread)) if spread else float(ahead > 0)
