"""Read the scores that a judge's review states, and combine those of many."""

import re
from collections.abc import Hashable, Sequence

import numpy as np

from vapr.evaluation.scoring.answers import after_reasoning
from vapr.evaluation.scoring.figures import NONE, Figure, numbered, of_counts, share

Verdict = tuple[float, ...]
"""The score of the answer, and where the review also scores the reference answer, that score after it."""

YES_NO = {"yes": 1.0, "no": 0.0}


def read_scores(review: str, pattern: re.Pattern[str], low: float, high: float) -> Verdict | None:
    """Return the scores that a review states; None if it states none, one outside the range, or two that differ.

    Args:
        review: what the judge said; reasoning in ``<think>`` blocks is passed over.
        pattern: finds the score as its group ``score``, or its first, and perhaps the group ``reference``.
        low: the lowest score there is.
        high: the highest.
    """
    found = [_scores(match) for match in pattern.finditer(after_reasoning(review))]
    if len(set(found)) != 1 or found[0] is None:
        return None
    return found[0] if all(low <= score <= high for score in found[0]) else None


def read_yes_no(review: str, pattern: re.Pattern[str]) -> Verdict | None:
    """Return 1 for yes and 0 for no; None if the review says neither, or both."""
    found = {match[_score_group(pattern)] for match in pattern.finditer(after_reasoning(review))}
    said = {YES_NO.get((word or "").lower()) for word in found}
    value = next(iter(said)) if len(said) == 1 else None
    return None if value is None else (value,)


def _score_group(pattern: re.Pattern[str]) -> int:
    return pattern.groupindex.get("score", 1)


def _scores(match: re.Match[str]) -> Verdict | None:
    groups = [_score_group(match.re)]
    if "reference" in match.re.groupindex:
        groups.append(match.re.groupindex["reference"])
    try:
        return tuple(float(match[group]) for group in groups)
    except (TypeError, ValueError):  # a group that took no part, or no number
        return None


def mean(verdicts: Sequence[Verdict], pictures: Sequence[Hashable], seed: int = 0, *, place: int = 0) -> Figure:
    """Return the mean score, with a bootstrap over pictures; ``place`` 1 takes the reference's scores."""
    if not verdicts:
        return NONE
    counts = np.array([(verdict[place], 1.0) for verdict in verdicts])
    return of_counts(counts, numbered(pictures), {"mean": lambda c: c[:, 0] / c[:, 1]}, seed)["mean"]


def ratio(verdicts: Sequence[Verdict], pictures: Sequence[Hashable], seed: int = 0) -> Figure:
    """Return 100 times the mean score over the reference's mean score, with a bootstrap over pictures."""
    if not verdicts:
        return NONE
    in_percent = {"ratio": lambda c: 100 * c[:, 0] / c[:, 1]}
    return of_counts(np.array(verdicts), numbered(pictures), in_percent, seed)["ratio"]


def share_within(
    verdicts: Sequence[Verdict], pictures: Sequence[Hashable], at_least: float = -np.inf, below: float = np.inf
) -> Figure:
    """Return the share of scores that are at least the one and below the other, with Wilson's interval."""
    return share([at_least <= verdict[0] < below for verdict in verdicts], pictures)
