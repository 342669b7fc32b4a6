"""Hold one model's scored answers against another's to the same questions."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vapr.evaluation.benchmarks.benchmark import Row
from vapr.evaluation.compare.changes import changes
from vapr.evaluation.scoring.figures import Figure, numbered, of_counts
from vapr.evaluation.scoring.paired import detectable_difference, difference, mcnemar, sign_flip
from vapr.evaluation.scoring.yes_no import counts_of, statistic

BIAS = (
    "f1", "f1_no", "yes_rate", "gap", "fpr", "fnr", "unparsed_rate", "balanced_accuracy", "d_prime", "criterion",
)  # fmt: skip
"""Figures of yes/no questions whose difference is shown."""


def paired(first: Sequence[Row], other: Sequence[Row], seed: int) -> dict[str, Any]:
    """Compare two models' answers to the same questions in the same order.

    Returns:
        ``difference`` in accuracy, the other minus the first, with an interval clustered by picture; ``mcnemar``
        between them, where an answer that is right by chance counts for the model whose chance is larger;
        ``p_by_picture``, the test that takes questions about one picture as one, None where each picture has one
        question; ``p``, the latter if there is one; ``detectable``, the difference that a set of so many questions
        shows in four cases of five if as many answers change; and the ``changes``.
    """
    before, now = (np.array([row.right for row in rows], dtype=float) for rows in (first, other))
    images = [row.prediction.image for row in first]
    tested = mcnemar(before > now, now > before)
    clustered = len(set(images)) < len(images)
    by_picture = sign_flip(before, now, images, seed) if clustered else None
    discordant = (tested["only_a"] + tested["only_b"]) / len(first)
    return {
        "questions": len(first),
        "pictures": len(set(images)),
        "difference": difference(before, now, images, seed).as_dict(),
        "mcnemar": tested,
        "p_by_picture": by_picture,
        "p": tested["p"] if by_picture is None else by_picture,
        "detectable": detectable_difference(discordant, len(first)),
        "changes": changes(first, other),
    }


def bias_differences(first: Sequence[Row], other: Sequence[Row], seed: int) -> dict[str, dict[str, Any]]:
    """Return how figures of yes/no questions differ, the other minus the first; nothing where there are none.

    Intervals are of a bootstrap over pictures that draws both models' answers together; None where no answer differs.
    """
    rows = [pair for pair in zip(first, other, strict=True) if pair[0].gold in ("yes", "no")]
    if not rows:
        return {}
    gold = [str(row.gold) for row, _ in rows]
    before, now = (counts_of(gold, [pair[side].reading.value for pair in rows]) for side in (0, 1))
    statistics = {name: _difference_of(name) for name in BIAS}
    images = numbered([row.prediction.image for row, _ in rows])
    figures = of_counts(np.hstack([before, now]), images, statistics, seed)
    if (before == now).all():
        figures = {name: Figure(figure.value, None, figure.count) for name, figure in figures.items()}
    return {name: figure.as_dict() for name, figure in figures.items()}


def _difference_of(name: str) -> Any:
    of = statistic(name)
    return lambda counts: of(counts[:, 6:]) - of(counts[:, :6])
