"""Answers as VLMEvalKit writes them, ``MODEL_DATASET.xlsx`` and the like, and other tables with ``prediction``."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vapr.errors import UserError
from vapr.evaluation.benchmarks.benchmark import Benchmark, Results
from vapr.evaluation.readers.convert import questions_of_answers
from vapr.evaluation.readers.joining import Answer, join
from vapr.evaluation.readers.shape import Shape, as_text
from vapr.evaluation.readers.tables import Table
from vapr.evaluation.scoring.prediction import Question

JUDGED = ("auxmatch", "score", "acc", "result", "rating", "checkpoint", "PREV", "structs", "tmp")
"""Ends of the names of what VLMEvalKit makes of its answers: MODEL_DATASET_auxmatch.xlsx."""


def refuse_judged(file: Path) -> None:
    """Refuse a file that VLMEvalKit made of the answers, such as scores, and a pickle.

    Raises:
        UserError: naming the file to give.
    """
    if file.suffix == ".pkl":
        raise UserError(f"{file}: a pickle can run code and is not read; give VLMEvalKit's MODEL_DATASET.xlsx")
    if file.suffix == ".json":
        return  # authors of benchmarks, too, call theirs HallusionBench_result.json
    if ending := next((ending for ending in JUDGED if file.stem.endswith(f"_{ending}")), None):
        answers = file.stem.removesuffix(f"_{ending}")
        raise UserError(
            f"{file}: what VLMEvalKit made of answers ('_{ending}'), not the answers themselves; give {answers}.xlsx"
        )


def read_answers(table: Table, shape: Shape, benchmark: Benchmark, questions: Sequence[Question]) -> Results:
    """Read the answers of a table.

    Args:
        table: with a column ``prediction``.
        shape: what its other columns are.
        benchmark: of the questions.
        questions: what could have been asked.

    Raises:
        UserError: naming a row that answers none of the questions.
    """
    texts = {where: as_text(row["prediction"]) for where, row in table}
    answers = [
        Answer(
            where=where, text=texts[where], ids=(asked.id,), question=asked.question,
            image=asked.meta.get("image") if asked.images else None, split=asked.meta.get("split"),
            truth=asked.answer, order=number,
        )
        for number, (where, asked) in enumerate(questions_of_answers(table, shape, benchmark))
    ]  # fmt: skip
    results = join(answers, questions, table.path)
    if others := len(texts) - len({answer.where for answer in answers}):
        note = f"{table.path.name}: {others:,} rows are no questions of {benchmark.title}; left out"
        return replace(results, notes=[*results.notes, note])
    return results


def read_own_answers(table: Table, questions: Sequence[Question]) -> Results:
    """Read the answers of a table whose questions vapr wrote: they name themselves.

    Raises:
        UserError: naming a row that answers none of the questions.
    """
    answers = [
        Answer(
            where=where, text=as_text(row["prediction"]), ids=(as_text(row["vapr_id"]).removeprefix("vapr:"),),
            question=as_text(row.get("question")), truth=row.get("answer"), order=number,
        )
        for number, (where, row) in enumerate(table)
    ]  # fmt: skip
    return join(answers, questions, table.path)
