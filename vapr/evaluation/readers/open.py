"""Open a benchmark's questions and files of answers, whatever tool wrote them."""

import difflib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from vapr.errors import UserError
from vapr.evaluation.benchmarks import BENCHMARKS, judge_set
from vapr.evaluation.benchmarks.benchmark import Benchmark, Results
from vapr.evaluation.readers import lmms_eval, vlmevalkit
from vapr.evaluation.readers.convert import questions_of_table
from vapr.evaluation.readers.shape import Shape
from vapr.evaluation.readers.shapes import SHAPES
from vapr.evaluation.readers.tables import DATASET_SUFFIXES, Table, is_data_set, open_table
from vapr.evaluation.score import of_benchmark, with_truth
from vapr.evaluation.scoring.prediction import Prediction, Question, read_json_lines, read_predictions


class Answers(NamedTuple):
    """Answers to a benchmark: lines on what was read and left out, and how many were asked for; None if unknown."""

    predictions: list[Prediction]
    notes: list[str]
    num_asked: int | None


def open_benchmark(bench: str, *, pictures: bool = True) -> tuple[Benchmark, list[Question] | None]:
    """Return the benchmark of ``NAME`` or ``NAME=PATH``, and its questions if there is a path.

    ``NAME`` is one of :data:`BENCHMARKS`, or the YAML file of a judge set (:mod:`..benchmarks.judge_set`).

    Args:
        bench: what stands after ``--bench``. PATH is a file, a folder, or a data set of the hub.
        pictures: whether the pictures will be looked at; scoring needs none.

    Raises:
        UserError: for an unknown name, or files that are not the benchmark's.
    """
    name, equals, path = bench.partition("=")
    benchmark = judge_set.load(Path(name)) if name.endswith((".yaml", ".yml")) else BENCHMARKS.get(name)
    if benchmark is None:
        near = difflib.get_close_matches(name, BENCHMARKS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(BENCHMARKS)}"
        raise UserError(f"--bench {name}: no such benchmark; {hint}")
    if BENCHMARKS.get(benchmark.name, benchmark) is not benchmark:
        raise UserError(f"{name}: name: {benchmark.name} is a benchmark of vapr; give the set another name")
    if not equals:
        return benchmark, None
    if not path or not (Path(path).exists() or is_data_set(path)):
        raise UserError(f"--bench {bench}: no such file or folder")
    return benchmark, open_questions(benchmark, Path(path), pictures=pictures)


def open_questions(benchmark: Benchmark, path: Path, *, pictures: bool = True) -> list[Question]:
    """Read a benchmark's questions from its own files, or from another tool's.

    Raises:
        UserError: if there is none in them, or they are in no known form.
    """
    shapes = SHAPES.get(benchmark.name, ()) if path.suffix not in (".json", ".jsonl") else ()  # those are the authors'
    table = open_table(path, next((shape.split for shape in shapes if shape.split), None)) if shapes else None
    shape = next((shape for shape in shapes if table is not None and shape.fits(table.columns)), None)
    if table is not None and shape is not None:
        questions = questions_of_table(table, shape, benchmark, pictures=pictures)
    elif table is not None and (path.suffix in DATASET_SUFFIXES or not path.exists()):
        raise _no_shape(table, shapes, benchmark)
    else:
        questions = benchmark.read(path)
    if not questions:
        raise UserError(f"{path}: no question of {benchmark.title} in it")
    return questions


def _no_shape(table: Table, shapes: Sequence[Shape], benchmark: Benchmark) -> UserError:
    has = ", ".join(table.columns[:20]) or "none"
    forms = "; ".join(f"{shape.title} has {', '.join(shape.needs)}" for shape in shapes)
    return UserError(f"{table.path}: its columns ({has}) are not those of {benchmark.title}: {forms}")


def open_answers(
    file: Path, benchmark: Benchmark, questions: Sequence[Question] | None, *, partial: bool = False
) -> Answers:
    """Read the answers to a benchmark, joined with its questions if they are given or stand beside the answers.

    Raises:
        UserError: if the file cannot be used, or questions have no answer unless ``partial``.
    """
    if _is_own(file):
        results = _own(file, benchmark, questions)
        if questions is None:
            return Answers(list(results.predictions), list(results.notes), None)
    else:
        own = questions is None
        questions = _questions_beside(file, benchmark) if questions is None else questions
        results = _read_results(file, benchmark, questions)
        if own:
            results = _with_note(results, f"{file}: questions and truths are those that stand beside the answers")
    asked = questions if results.asked is None else results.asked
    predictions = with_truth(results.predictions, asked, str(file), partial=partial)
    missing = len(asked) - len(predictions)
    notes = [f"partial: {missing:,} of {len(asked):,} questions have no answer"] if missing else []
    joined = zip(results.predictions, predictions, strict=True)
    other = [after.id for before, after in joined if _differ(benchmark.gold(before), benchmark.gold(after))]
    if other:
        notes.append(
            f"{len(other):,} answers stand beside another truth than the questions have, first '{other[0]}'; "
            "that of the questions counts"
        )
    return Answers(predictions, [*results.notes, *notes], len(asked))


def _differ(told: str | None, truth: str | None) -> bool:
    return told is not None and told != truth


def _questions_beside(file: Path, benchmark: Benchmark) -> list[Question]:
    """Return the questions that results of the benchmark's authors hold."""
    missing = UserError(f"{file}: no predictions.jsonl of vapr; give the questions, too: --bench {benchmark.name}=PATH")
    if benchmark.questions_in_results is None:
        raise missing
    try:
        return benchmark.questions_in_results(file)
    except UserError as error:
        raise UserError(f"{missing} (no questions in it: {error})") from None


def _read_results(file: Path, benchmark: Benchmark, questions: Sequence[Question]) -> Results:
    """Read what another tool wrote, told by its content."""
    vlmevalkit.refuse_judged(file)
    if not file.is_dir():
        if (samples := lmms_eval.samples_of(file)) is not None:
            results = lmms_eval.read_answers(samples, file, benchmark, questions)
            return _with_note(results, f"{file}: read as a log of lmms-eval")
        table = open_table(file)
        if table is not None and {"prediction", "vapr_id"} <= set(table.columns):
            results = vlmevalkit.read_own_answers(table, questions)
            return _with_note(results, f"{file}: read as answers to questions that vapr handed over")
        shapes = SHAPES.get(benchmark.name, ())
        if table is not None and shapes and {"prediction", "question"} <= set(table.columns):
            shape = next((shape for shape in shapes if shape.fits(table.columns)), None)
            if shape is None:
                raise _no_shape(table, shapes, benchmark)
            results = vlmevalkit.read_answers(table, shape, benchmark, questions)
            return _with_note(results, f"{file}: read as answers of VLMEvalKit, columns as in {shape.title}")
        if table is not None and shapes and file.suffix in DATASET_SUFFIXES:
            has = ", ".join(table.columns[:20]) or "none"
            raise UserError(f"{file}: no answers in it: its columns are {has}, and answers stand in 'prediction'")
    if benchmark.read_results is None:
        raise UserError(f"{file}: in no form that answers to {benchmark.title} are known to have (docs/benchmarks.md)")
    return benchmark.read_results(file, questions)


def _with_note(results: Results, note: str) -> Results:
    return replace(results, notes=[note, *results.notes])


def _own(file: Path, benchmark: Benchmark, questions: Sequence[Question] | None) -> Results:
    """Read the answers to a benchmark in vapr's own file, or those to the one whose truth it replaces."""
    predictions = read_predictions(file)
    old, there = benchmark.relabels, {prediction.benchmark for prediction in predictions}
    if old is None or questions is None or benchmark.name in there or old not in there:
        return Results(of_benchmark(predictions, benchmark.name, str(file)))
    predictions = of_benchmark(predictions, old, str(file))
    ids = {question.id for question in questions}
    kept = [
        replace(prediction, benchmark=benchmark.name, answer=None) for prediction in predictions if prediction.id in ids
    ]
    left_out = len(predictions) - len(kept)
    return Results(kept, notes=[f"answers to {old}: {left_out:,} are to questions that {benchmark.title} drops"])


def _is_own(file: Path) -> bool:
    """Return whether this is vapr's ``predictions.jsonl``, or a folder with one."""
    if file.is_dir():
        return (file / "predictions.jsonl").is_file()
    if file.suffix != ".jsonl":
        return False
    first = next((row for _, row in read_json_lines(file)), None)
    if first is None:
        raise UserError(f"{file}: no answers in it, it is empty; generate them with vapr eval")
    return "prediction" in first and ("benchmark" in first or {"id", "answer"} <= first.keys())
