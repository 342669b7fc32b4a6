"""Figures of questions whose truth is yes or no, "Yes" bias included.

Counts are of six kinds: said yes, said no, unparsed; where the truth is yes, and where it is no. An unparsed answer is
wrong: it lowers accuracy and recall, and is neither a "yes" nor a "no". The positive class is "yes".
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.special import ndtri

from vapr.evaluation.scoring.figures import NONE, Figure, numbered, of_counts, share
from vapr.intervals import Z

YES_YES, YES_NO, YES_UNPARSED, NO_YES, NO_NO, NO_UNPARSED = range(6)
"""Columns of the counts: the truth, then what was said."""


def counts_of(gold: Sequence[str], said: Sequence[str | None]) -> np.ndarray:
    """Return which of the six kinds each answer is, (P, 6) of 0 and 1; neither yes nor no is unparsed."""
    kinds = {"yes": 0, "no": 1}
    columns = [3 * (truth == "no") + kinds.get(answer or "", 2) for truth, answer in zip(gold, said, strict=True)]
    return np.eye(6)[np.array(columns, dtype=np.int64)]


def figures_of(
    gold: Sequence[str], said: Sequence[str | None], groups: Sequence[Hashable], seed: int = 0,
    only: Sequence[str] | None = None,
) -> dict[str, Figure]:  # fmt: skip
    """Return accuracy, precision, recall, F1 both ways, yes rates, errors, and the measures of signal detection.

    ``gap`` is the predicted minus the true yes rate; ``fpr`` is "yes" where the truth is no, ``fnr`` anything but "yes"
    where it is yes. ``d_prime`` and ``criterion`` are of the parsed answers, z(hits) - z(false alarms) and minus their
    mean, with half an answer added to each kind (M. J. Hautus, Behav. Res. Methods 27 (1995) 46); a criterion below 0
    leans to "yes". Intervals of shares are Wilson's, widened for ``groups``, the pictures; those of the others are a
    bootstrap over pictures, and where that knows no spread (all right, or all the same answer), what the shares'
    intervals allow. ``only`` names the figures that are wanted.
    """
    counts, pictures = counts_of(gold, said), numbered(groups)
    names = [*STATISTICS, *SHARES] if only is None else only
    figures = of_counts(counts, pictures, {name: STATISTICS[name] for name in names if name in STATISTICS}, seed)
    for name in ("f1", "f1_no", "balanced_accuracy", "gap"):
        figure = figures.get(name, NONE)
        if figure.interval is not None and figure.interval[1] - figure.interval[0] < 1e-9:
            figures[name] = replace(figure, interval=_allowed(name, figure, counts, pictures))
    return figures | {name: _share_of(name, counts, pictures) for name in names if name in SHARES}


def _share_of(name: str, counts: np.ndarray, pictures: np.ndarray) -> Figure:
    of, over = SHARES[name]
    among = counts[:, over].any(axis=1)
    held = np.asarray(counts[among][:, of].any(axis=1))
    return replace(share(held, pictures[among]), count=len(counts))


def _allowed(name: str, figure: Figure, counts: np.ndarray, pictures: np.ndarray) -> tuple[float, float]:
    """Return the interval of a figure that its shares' intervals allow."""
    if name == "gap":  # A. Agresti and Y. Min, Stat. Med. 24 (2005) 729, with no discordant answer
        value, reach = figure.value or 0.0, Z / (int(pictures.max()) + 3)
        return max(value - reach, -1.0), min(value + reach, 1.0)

    def ends(of: str) -> tuple[float, float]:
        return _share_of(of, counts, pictures).interval or (0.0, 1.0)

    if name == "balanced_accuracy":
        yes, no = ends("recall"), ends("recall_no")
        return (yes[0] + no[0]) / 2, (yes[1] + no[1]) / 2
    recall, precision = ends(name.replace("f1", "recall")), ends(name.replace("f1", "precision"))
    low, high = (2 * p * r / (p + r) if p + r else 0.0 for p, r in zip(precision, recall, strict=True))
    return low, high


def unparsed_as(gold: Sequence[str], said: Sequence[str | None]) -> dict[str, dict[str, float | None]]:
    """Return what the yes rate and the errors are where unparsed answers count as yes, as no, or are left out."""
    counts = counts_of(gold, said).sum(axis=0) if len(gold) else np.zeros(6)
    moved = {}
    for name in ("yes", "no", "drop"):
        c = counts.copy()
        if name != "drop":
            c[[YES_YES, NO_YES] if name == "yes" else [YES_NO, NO_NO]] += c[[YES_UNPARSED, NO_UNPARSED]]
        c[[YES_UNPARSED, NO_UNPARSED]] = 0
        moved[name] = {key: _share(c, *SHARES[key]) for key in ("accuracy", "yes_rate", "fpr", "fnr")}
        moved[name]["f1"] = float(_f1(c[None])[0]) if c[[YES_YES, NO_YES, *YES]].any() else None
    return moved


def _share(c: np.ndarray, of: Sequence[int], over: Sequence[int]) -> float | None:
    return float(c[list(of)].sum() / c[list(over)].sum()) if c[list(over)].sum() else None


def yes_bias(gold: Sequence[str], said: Sequence[str | None], figures: Mapping[str, Figure]) -> dict[str, Any]:
    """Return the figures of :func:`figures_of` and :func:`unparsed_as`, as JSON holds them."""
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
    "f1": _f1,
    "f1_no": _f1_no,
    "gap": lambda c: _yes_rate(c) - _yes(c) / _all(c),
    "balanced_accuracy": lambda c: (c[:, YES_YES] / _yes(c) + c[:, NO_NO] / _no(c)) / 2,
    "d_prime": lambda c: np.subtract(*_z(c)),
    "criterion": lambda c: -np.add(*_z(c)) / 2,
}
"""Figures that are no shares, as functions of counts (R, 6)."""

YES, NO = [YES_YES, YES_NO, YES_UNPARSED], [NO_YES, NO_NO, NO_UNPARSED]
SHARES = {
    "accuracy": ([YES_YES, NO_NO], [*YES, *NO]),
    "precision": ([YES_YES], [YES_YES, NO_YES]),
    "recall": ([YES_YES], YES),
    "precision_no": ([NO_NO], [NO_NO, YES_NO]),
    "recall_no": ([NO_NO], NO),
    "yes_rate": ([YES_YES, NO_YES], [*YES, *NO]),
    "no_rate": ([YES_NO, NO_NO], [*YES, *NO]),
    "gold_yes_rate": (YES, [*YES, *NO]),
    "fpr": ([NO_YES], NO),
    "fnr": ([YES_NO, YES_UNPARSED], YES),
    "unparsed_rate": ([YES_UNPARSED, NO_UNPARSED], [*YES, *NO]),
}
"""Figures that are shares: of which kinds, among which."""


def statistic(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """Return a figure as a function of counts (R, 6) that returns (R,), NaN where it is undefined."""
    if name in STATISTICS:
        return STATISTICS[name]
    of, over = SHARES[name]
    return lambda c: c[:, of].sum(axis=1) / c[:, over].sum(axis=1)
