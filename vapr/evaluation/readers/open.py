"""Open a benchmark's questions and files of answers, whatever tool wrote them."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from vapr.errors import UserError
from vapr.evaluation.benchmarks import BENCHMARKS
from vapr.evaluation.benchmarks.benchmark import Benchmark, Results
from vapr.evaluation.score import of_benchmark, with_truth
from vapr.evaluation.scoring.prediction import Prediction, Question, read_json_lines, read_predictions


def open_benchmark(bench: str) -> tuple[Benchmark, list[Question] | None]:
    """Return the benchmark of ``NAME`` or ``NAME=PATH``, and its questions if there is a path.

    Raises:
        UserError: for an unknown name, or files that are not the benchmark's.
    """
    name, equals, path = bench.partition("=")
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name, BENCHMARKS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(BENCHMARKS)}"
        raise UserError(f"--bench {name}: no such benchmark; {hint}")
    benchmark = BENCHMARKS[name]
    if not equals:
        return benchmark, None
    if not path or not Path(path).exists():
        raise UserError(f"--bench {bench}: no such file or folder")
    return benchmark, open_questions(benchmark, Path(path))


def open_questions(benchmark: Benchmark, path: Path) -> list[Question]:
    """Read a benchmark's questions from its own files, or from another tool's.

    Raises:
        UserError: if there is none in them.
    """
    questions = benchmark.read(path)
    if not questions:
        raise UserError(f"{path}: no question of {benchmark.title} in it")
    return questions


def open_answers(
    file: Path, benchmark: Benchmark, questions: Sequence[Question] | None, *, partial: bool = False
) -> tuple[list[Prediction], list[str]]:
    """Read the answers to a benchmark, joined with its questions if they are given.

    Returns:
        The predictions, and lines on what was read and left out.

    Raises:
        UserError: if the file cannot be used, or questions have no answer unless ``partial``.
    """
    if _is_own(file):
        results = Results(of_benchmark(read_predictions(file), benchmark.name, str(file)))
    elif questions is None:
        raise UserError(f"{file}: no predictions.jsonl of vapr; give the questions, too: --bench {benchmark.name}=PATH")
    elif benchmark.read_results is not None:
        results = benchmark.read_results(file, questions)
    else:
        raise UserError(f"{file}: in no shape that {benchmark.title} is known to have")
    if questions is None:
        return list(results.predictions), list(results.notes)
    asked = questions if results.asked is None else results.asked
    predictions = with_truth(results.predictions, asked, str(file), partial=partial)
    missing = len(asked) - len(predictions)
    notes = [f"partial: {missing:,} of {len(asked):,} questions have no answer"] if missing else []
    return predictions, [*results.notes, *notes]


def _is_own(file: Path) -> bool:
    """Return whether this is vapr's ``predictions.jsonl``, or a folder with one."""
    if file.is_dir():
        return (file / "predictions.jsonl").is_file()
    if file.suffix != ".jsonl":
        return False
    first = next((row for _, row in read_json_lines(file)), {})
    return "prediction" in first and "benchmark" in first
