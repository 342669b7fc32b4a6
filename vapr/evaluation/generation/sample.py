"""A part of a benchmark's questions, for a quick look."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from vapr.evaluation.scoring.prediction import Prediction, Question

TOGETHER = 4
"""Where a split has at most so many questions a picture, those of a picture are drawn together: MME's two count so."""


def sample(questions: Sequence[Question], limit: int, seed: int = 0) -> list[Question]:
    """Draw about ``limit`` questions, spread over splits as all are, and keep their order.

    What counts only together is drawn together, and a group that begins within the limit is whole: NaturalBench's
    ``group``, HallusionBench's ``set_id``, the questions about a picture where they are few.

    Args:
        questions: of one benchmark.
        limit: how many.
        seed: of the draw.
    """
    if limit >= len(questions):
        return list(questions)
    splits: dict[str | None, list[int]] = {}
    for number, question in enumerate(questions):
        splits.setdefault(Prediction.of(question, "").split, []).append(number)
    random = np.random.default_rng(seed)
    drawn: set[int] = set()
    wanted = 0.0
    for members in splits.values():
        group_of = _grouping([questions[number] for number in members])
        groups: dict[Hashable, list[int]] = {}
        for number in members:
            groups.setdefault(group_of(questions[number]), []).append(number)
        wanted += limit * len(members) / len(questions)
        whole = list(groups.values())
        for chosen in random.permutation(len(whole)):
            if len(drawn) >= round(wanted):
                break
            drawn.update(whole[chosen])
    return [question for number, question in enumerate(questions) if number in drawn]


def _grouping(questions: Sequence[Question]) -> Callable[[Question], Hashable]:
    """Return what tells the group of a question in a split."""
    meta = questions[0].meta
    if "group" in meta:
        return lambda question: str(question.meta.get("group"))
    if "set_id" in meta:
        keys = ("category", "subcategory", "set_id")
        return lambda question: tuple(str(question.meta.get(key)) for key in keys)
    pictures = Counter(Prediction.of(question, "").image for question in questions)
    if max(pictures.values()) <= TOGETHER:
        return lambda question: Prediction.of(question, "").image
    return lambda question: question.id
