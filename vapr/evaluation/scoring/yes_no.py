"""Figures of questions whose truth is yes or no, "Yes" bias included.

Counts are of six kinds: said yes, said no, unparsed; where the truth is yes, and where it is no. An unparsed answer is
wrong: it lowers accuracy and recall, and is neither a "yes" nor a "no". The positive class is "yes".
"""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from scipy.special import ndtri

from vapr.evaluation.scoring.figures import Figure, numbered, of_counts

YES_YES, YES_NO, YES_UNPARSED, NO_YES, NO_NO, NO_UNPARSED = range(6)
"""Columns of the counts: the truth, then what was said."""

COMMON = ("accuracy", "precision", "recall", "f1", "yes_rate", "gold_yes_rate")


def counts_of(gold: Sequence[str], said: Sequence[str | None]) -> np.ndarray:
    """Return which of the six kinds each answer is, (P, 6) of 0 and 1."""
    kinds = {"yes": 0, "no": 1, None: 2}
    columns = [3 * (truth == "no") + kinds[answer] for truth, answer in zip(gold, said, strict=True)]
    return np.eye(6)[np.array(columns, dtype=np.int64)]


def figures_of(
    gold: Sequence[str], said: Sequence[str | None], groups: Sequence[Hashable], seed: int = 0
) -> dict[str, Figure]:
    """Return accuracy, precision, recall, F1 both ways, yes rates, errors, and the measures of signal detection.

    ``gap`` is the predicted minus the true yes rate; ``fpr`` is "yes" where the truth is no, ``fnr`` anything but "yes"
    where it is yes. ``d_prime`` and ``criterion`` are of the parsed answers, z(hits) - z(false alarms) and minus their
    mean, with half an answer added to each kind (M. J. Hautus, Behav. Res. Methods 27 (1995) 46); a criterion below 0
    leans to "yes". Intervals are a bootstrap over ``groups``, the pictures.
    """
    return of_counts(counts_of(gold, said), numbered(groups), STATISTICS, seed)


def unparsed_as(gold: Sequence[str], said: Sequence[str | None]) -> dict[str, dict[str, float | None]]:
    """Return what the yes rate and the errors are where unparsed answers count as yes, as no, or are left out."""
    counts = counts_of(gold, said).sum(axis=0) if len(gold) else np.zeros(6)
    moved = {}
    for name in ("yes", "no", "drop"):
        c = counts.copy()
        if name != "drop":
            c[[YES_YES, NO_YES] if name == "yes" else [YES_NO, NO_NO]] += c[[YES_UNPARSED, NO_UNPARSED]]
        c[[YES_UNPARSED, NO_UNPARSED]] = 0
        keys = ("accuracy", "yes_rate", "fpr", "fnr", "f1")
        with np.errstate(divide="ignore", invalid="ignore"):
            values = {key: float(STATISTICS[key](c[None])[0]) for key in keys}
        moved[name] = {key: None if np.isnan(value) else value for key, value in values.items()}
    return moved


def yes_bias(
    gold: Sequence[str], said: Sequence[str | None], groups: Sequence[Hashable], seed: int = 0
) -> dict[str, Any]:
    """Return all figures of :func:`figures_of` and :func:`unparsed_as`, as JSON holds them."""
    figures = figures_of(gold, said, groups, seed)
    return {
        "questions": len(gold),
        **{name: figure.as_dict() for name, figure in figures.items()},
        "unparsed_as": unparsed_as(gold, said),
    }


def _all(c: np.ndarray) -> np.ndarray:
    return c.sum(axis=1)


def _yes(c: np.ndarray) -> np.ndarray:
    return c[:, YES_YES : YES_UNPARSED + 1].sum(axis=1)


def _no(c: np.ndarray) -> np.ndarray:
    return c[:, NO_YES : NO_UNPARSED + 1].sum(axis=1)


def _yes_rate(c: np.ndarray) -> np.ndarray:
    return (c[:, YES_YES] + c[:, NO_YES]) / _all(c)


def _f1(c: np.ndarray) -> np.ndarray:
    """2 TP / (2 TP + FP + misses): 0 where nothing is right, also where no answer is yes."""
    return 2 * c[:, YES_YES] / (c[:, YES_YES] + c[:, NO_YES] + _yes(c))


def _f1_no(c: np.ndarray) -> np.ndarray:
    return 2 * c[:, NO_NO] / (c[:, NO_NO] + c[:, YES_NO] + _no(c))


def _z(c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    hits = ndtri((c[:, YES_YES] + 0.5) / (c[:, YES_YES] + c[:, YES_NO] + 1))
    alarms = ndtri((c[:, NO_YES] + 0.5) / (c[:, NO_YES] + c[:, NO_NO] + 1))
    known = (c[:, YES_YES] + c[:, YES_NO] > 0) & (c[:, NO_YES] + c[:, NO_NO] > 0)
    return np.where(known, hits, np.nan), np.where(known, alarms, np.nan)


STATISTICS = {
    "accuracy": lambda c: (c[:, YES_YES] + c[:, NO_NO]) / _all(c),
    "precision": lambda c: c[:, YES_YES] / (c[:, YES_YES] + c[:, NO_YES]),
    "recall": lambda c: c[:, YES_YES] / _yes(c),
    "f1": _f1,
    "f1_no": _f1_no,
    "yes_rate": _yes_rate,
    "no_rate": lambda c: (c[:, YES_NO] + c[:, NO_NO]) / _all(c),
    "gold_yes_rate": lambda c: _yes(c) / _all(c),
    "gap": lambda c: _yes_rate(c) - _yes(c) / _all(c),
    "fpr": lambda c: c[:, NO_YES] / _no(c),
    "fnr": lambda c: 1 - c[:, YES_YES] / _yes(c),
    "unparsed_rate": lambda c: (c[:, YES_UNPARSED] + c[:, NO_UNPARSED]) / _all(c),
    "balanced_accuracy": lambda c: (c[:, YES_YES] / _yes(c) + c[:, NO_NO] / _no(c)) / 2,
    "d_prime": lambda c: np.subtract(*_z(c)),
    "criterion": lambda c: -np.add(*_z(c)) / 2,
}
"""What :func:`figures_of` returns, as functions of counts (R, 6)."""
