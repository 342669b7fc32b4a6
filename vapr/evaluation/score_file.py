"""What ``vapr score`` does: a file of answers, a benchmark's name, and its figures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vapr.errors import UserError
from vapr.evaluation.readers.open import open_answers, open_benchmark
from vapr.evaluation.score import score
from vapr.evaluation.scoring.answers import Policy


def score_file(
    file: Path, bench: str, policy: Policy = "strict", *, partial: bool = False, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Score the answers of a file; see :func:`vapr.evaluation.score.score` for what is returned.

    Args:
        file: ``predictions.jsonl``, a result folder, or a file of another tool.
        bench: ``NAME`` or ``NAME=PATH`` with the benchmark's questions.
        policy: how answers are read.
        partial: score although questions are unanswered.
        say: called with lines on what was read.

    Raises:
        UserError: naming file and line of what cannot be used.
    """
    if not file.exists():
        raise UserError(f"{file}: no such file; give predictions.jsonl, a result folder or another tool's results")
    benchmark, questions = open_benchmark(bench)
    predictions, notes = open_answers(file, benchmark, questions, partial=partial)
    for note in notes:
        say(note)
    return score(predictions, benchmark, policy, questions=None if questions is None else len(questions))
