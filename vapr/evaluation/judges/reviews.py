"""The reviews of a file of answers: asked for, read from where they are stored, or none."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vapr.errors import UserError
from vapr.evaluation.benchmarks.benchmark import Benchmark, reference
from vapr.evaluation.judges.ask import judge
from vapr.evaluation.judges.config import JudgeConfig
from vapr.evaluation.judges.stored import judged_by, match, open_reviews, reviews_file
from vapr.evaluation.scoring.prediction import Prediction
from vapr.evaluation.scoring.review import Review


@dataclass(frozen=True, slots=True, kw_only=True)
class Judging:
    """Who judges, and where reviews are stored; None: nobody, and beside the answers."""

    judge: JudgeConfig | None = None
    file: Path | None = None


def reviews_of(
    answers: Path, predictions: Sequence[Prediction], benchmark: Benchmark, judging: Judging, *,
    partial: bool = False, say: Callable[[str], None] = print,
) -> Mapping[str, Review] | None:  # fmt: skip
    """Return the review of each answer by its id; None if there are none, or if the set is scored by rules.

    Args:
        answers: the file or result folder that the predictions were read from.
        predictions: of that benchmark.
        benchmark: which.
        judging: who judges, and where reviews are.
        partial: take what is there, although answers have no review.
        say: called with lines on what was read, asked for and left out.

    Raises:
        UserError: if a judge or reviews are given for a set that needs none, or they cannot be used.
    """
    if benchmark.judged is None and judging == Judging():
        return None
    judged = judged_by(benchmark)
    file = judging.file or reviews_file(answers)
    if judging.judge is not None:
        if judged.no_reference and not any(map(reference, predictions)):
            return None
        given = judge(predictions, benchmark, judging.judge, file, say)
    elif file.exists():
        given = open_reviews(file, benchmark)
        if not given and judging.file is None:  # of other benchmarks
            return None
    elif judging.file is not None:
        raise UserError(f"{file}: no such file; give the reviews of the answers")
    else:
        return None
    found, notes = match(given, predictions, benchmark, str(file), partial=partial)
    for note in notes:
        say(note)
    return found
