"""How far a model leans to "yes" before it says a word: probabilities at the first answer token.

Moving the threshold between "yes" and "no" until both errors are equal tells bias from ability: what is gained there
was bias, what is still wrong is not.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vapr.errors import UserError
from vapr.evaluation.scoring.figures import Figure, numbered
from vapr.evaluation.scoring.prediction import Prediction

RESAMPLES = 400
KEYS = ("log_p_yes", "log_p_no")


def logit_view(predictions: Sequence[Prediction], gold: Sequence[str], seed: int = 0) -> dict[str, Any] | None:
    """Return what the logits of "yes" and "no" say; None if no prediction has them.

    Args:
        predictions: with ``log_p_yes`` and ``log_p_no`` in ``meta``, the logs of their probabilities; those without
            are counted as ``without``.
        gold: "yes" or "no" of each.
        seed: of the bootstrap over pictures.

    Returns:
        ``p_yes_minus_p_no``: their mean. ``accuracy_unshifted``: of the likelier of the two. ``threshold_shift``: what
        log P(yes) - log P(no) must exceed for "yes" so that FPR and FNR come closest; above 0 the model leans to "yes".
        ``accuracy_shifted`` and ``error_shifted``, the mean of FPR and FNR, are those at this threshold. All as
        :class:`Figure` holds them. Thresholds need both truths and are None otherwise.

    Raises:
        UserError: for a value that is no log of a probability.
    """
    having = [
        i for i, prediction in enumerate(predictions) if all(prediction.meta.get(key) is not None for key in KEYS)
    ]
    if not having:
        return None
    logs = np.array([[_log(predictions[i], key) for key in KEYS] for i in having])  # (P, 2)
    truth = np.array([gold[i] == "yes" for i in having])
    groups = numbered([predictions[i].image for i in having])
    order = np.argsort(logs[:, 0] - logs[:, 1], kind="stable")
    logs, truth, groups = logs[order], truth[order], groups[order]
    measured = _measure(logs, truth, np.ones(len(having)))
    generator, count = np.random.default_rng(seed), int(groups.max()) + 1
    drawn = [
        _measure(logs, truth, np.bincount(generator.integers(0, count, count), minlength=count)[groups].astype(float))
        for _ in range(RESAMPLES)
    ]
    figures = {}
    for name, value in measured.items():
        spread = [one[name] for one in drawn if math.isfinite(one[name])]
        known = math.isfinite(value) and len(spread) > 0
        low, high = np.percentile(spread, [2.5, 97.5]) if known else (0.0, 0.0)
        interval = (float(low), float(high)) if known else None
        figures[name] = Figure(value if math.isfinite(value) else None, interval, len(having)).as_dict()
    return {"questions": len(having), "without": len(predictions) - len(having), **figures}


def _measure(logs: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """Return the figures for answers drawn ``weights`` times (P,), sorted by their margin; NaN where undefined."""
    margin = logs[:, 0] - logs[:, 1]  # (P,), rising
    total, yes, no = weights.sum(), weights[truth].sum(), weights[~truth].sum()
    said_yes = margin > 0
    p_yes, p_no = np.exp(logs).T
    figures = {
        "p_yes_minus_p_no": float((weights * (p_yes - p_no)).sum() / total),
        "accuracy_unshifted": float(weights[said_yes == truth].sum() / total),
        **dict.fromkeys(("threshold_shift", "accuracy_shifted", "error_shifted"), math.nan),
    }
    if yes == 0 or no == 0:
        return figures
    # The threshold may lie between two different margins, or beyond either end: "no" for the first k answers.
    cuts = np.concatenate(([0], np.flatnonzero(np.diff(margin)) + 1, [len(margin)]))
    missed = np.concatenate(([0.0], np.cumsum(weights * truth)))[cuts]
    denied = np.concatenate(([0.0], np.cumsum(weights * ~truth)))[cuts]
    fnr, fpr = missed / yes, 1 - denied / no
    apart = np.abs(fpr - fnr)
    level = np.flatnonzero(apart <= apart.min() + 1e-12)  # cuts between which nobody is drawn are the same cut
    best = level[len(level) // 2]
    figures["threshold_shift"] = _between(margin, int(cuts[best]))
    figures["accuracy_shifted"] = float((denied[best] + yes - missed[best]) / total)
    figures["error_shifted"] = float((fpr[best] + fnr[best]) / 2)
    return figures


def _between(margin: np.ndarray, cut: int) -> float:
    """Return the middle of the margins on both sides of a cut; at an end, the margin there."""
    low, high = margin[max(cut - 1, 0)], margin[min(cut, len(margin) - 1)]
    return float((low + high) / 2)


def _log(prediction: Prediction, key: str) -> float:
    value = prediction.meta[key]
    known = isinstance(value, int | float) and not isinstance(value, bool)
    if not known or math.isnan(value) or value > 1e-3:  # sums of probabilities round to a little above 1
        raise UserError(
            f"question '{prediction.id}' of {prediction.benchmark}: '{key}' is {value!r}, no log of a probability; "
            "it is 0 or less"
        )
    return max(float(value), -1000.0)  # the log of 0 is as good as this
