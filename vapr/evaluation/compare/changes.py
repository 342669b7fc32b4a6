"""What changed question by question, with losses of format apart from losses of knowledge.

Every question is of one kind, and the difference in accuracy is the sum of what the kinds contribute.
"""

import math
from collections.abc import Sequence
from typing import Any

from vapr.evaluation.benchmarks.benchmark import Row

KINDS = (
    "fixed", "broken", "became unparsed", "became parsed", "still unparsed", "still wrong", "still right",
)  # fmt: skip
"""The first two and the last two are of answers that both models gave in a form that can be read."""

KNOWLEDGE = ("fixed", "broken")
FORMAT = ("became unparsed", "became parsed", "still unparsed")
SHOWN = KINDS[:-1]


def kind(first: Row, other: Row) -> str:
    """Return what became of a question, one of :data:`KINDS`.

    A guessed value is unparsed, also where the official rule takes it for right.
    """
    unparsed = (first.reading.unparsed, other.reading.unparsed)
    if any(unparsed):
        return {(False, True): "became unparsed", (True, False): "became parsed"}.get(unparsed, "still unparsed")
    if other.right != first.right:
        return "fixed" if other.right > first.right else "broken"
    return "still right" if first.right == 1 else "still wrong"


def changes(first: Sequence[Row], other: Sequence[Row]) -> dict[str, Any]:
    """Count the kinds of change from one model to another, on the same questions in the same order.

    Returns:
        ``kinds``: of each the number of ``questions``, the ``ids`` (but of those still right), how many were
        ``right_before`` and are ``right_now`` (fractions where a rule draws at random), and ``difference``, what they
        contribute to that in accuracy; and the sums of those of ``knowledge`` and of ``format``.
    """
    members: dict[str, list[tuple[Row, Row]]] = {name: [] for name in KINDS}
    for pair in zip(first, other, strict=True):
        members[kind(*pair)].append(pair)
    kinds: dict[str, dict[str, Any]] = {}
    for name, pairs in members.items():
        before, now = (math.fsum(pair[side].right for pair in pairs) for side in (0, 1))
        kinds[name] = {
            "questions": len(pairs),
            "right_before": before,
            "right_now": now,
            "difference": (now - before) / len(first),
            "ids": [] if name == "still right" else [row.prediction.id for row, _ in pairs],
        }
    return {
        "kinds": kinds,
        "knowledge": math.fsum(kinds[name]["difference"] for name in KNOWLEDGE),
        "format": math.fsum(kinds[name]["difference"] for name in FORMAT),
    }
