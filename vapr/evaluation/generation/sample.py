"""A part of a benchmark's questions, for a quick look."""

from collections.abc import Sequence

import numpy as np

from vapr.evaluation.scoring.prediction import Question


def sample(questions: Sequence[Question], limit: int, seed: int = 0) -> list[Question]:
    """Draw about ``limit`` questions, spread over splits as all are, and keep their order.

    Questions of one ``group`` (NaturalBench's four, say) are drawn together, because figures need all of them.

    Args:
        questions: of one benchmark.
        limit: how many; a group that begins within it is whole.
        seed: of the draw.
    """
    if limit >= len(questions):
        return list(questions)
    splits: dict[str, list[int]] = {}
    for number, question in enumerate(questions):
        splits.setdefault(str(question.meta.get("split") or question.meta.get("category") or ""), []).append(number)
    random = np.random.default_rng(seed)
    drawn: set[int] = set()
    wanted = 0.0
    for members in splits.values():
        groups: dict[str, list[int]] = {}
        for number in members:
            group = questions[number].meta.get("group")
            groups.setdefault(f"question {questions[number].id}" if group is None else f"group {group}", []).append(
                number
            )
        wanted += limit * len(members) / len(questions)
        for chosen in random.permutation(len(groups)):
            if len(drawn) >= round(wanted):
                break
            drawn.update(list(groups.values())[chosen])
    return [question for number, question in enumerate(questions) if number in drawn]
