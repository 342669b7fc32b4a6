"""HallusionBench: 1,129 yes/no questions about figures, edited figures and, without a picture, about the world."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vapr.errors import UserError
from vapr.evaluation.benchmarks.benchmark import Benchmark, Reading, Results, Row, yes_no_gold
from vapr.evaluation.benchmarks.groups import all_right, grouped, refuse_parts
from vapr.evaluation.benchmarks.rows import picture, read_objects, text_of
from vapr.evaluation.scoring.answers import Policy, yes_or_no
from vapr.evaluation.scoring.figures import Figure, numbered, share
from vapr.evaluation.scoring.prediction import Prediction, Question, check_ids

PARTS = ("category", "subcategory", "set_id", "figure_id", "question_id")
UNCERTAIN = "uncertain"
"""What the official rule makes of an answer that says neither, and counts as right where no picture was given."""


def read(path: Path) -> list[Question]:
    """Read ``HallusionBench.json``, or a folder with it; pictures lie beside it, or in ``hallusion_bench/``."""
    file = path / "HallusionBench.json" if path.is_dir() else path
    rows = read_objects(file, (*PARTS, "question", "gt_answer"), "a question of HallusionBench")
    questions = from_rows(rows, file.parent)
    check_ids(questions, file)
    return questions


def from_rows(rows: Sequence[tuple[str, dict[str, Any]]], folder: Path) -> list[Question]:
    """Return the questions of all rows of the benchmark, each with its place, from wherever they were read."""
    sizes = Counter(part for _, row in rows for part in _together(row))
    questions = []
    for where, row in rows:
        if str(row["gt_answer"]) not in ("0", "1"):
            raise UserError(f"{where}: 'gt_answer' is {row['gt_answer']!r}, not 0 (no) or 1 (yes)")
        name = row.get("filename")
        meta = {key: str(row[key]) for key in PARTS} | {
            "split": str(row["category"]),
            "image": name or "no picture of " + "/".join(str(row[key]) for key in PARTS[:3]),
            "together": [sizes[part] for part in _together(row)],
        }
        questions.append(
            Question(
                benchmark="hallusionbench", id=_id(row), question=text_of(row, "question", where),
                answer="yes" if str(row["gt_answer"]) == "1" else "no", meta=meta,
                images=(picture(folder, str(name), ("hallusion_bench",)),) if name else (),
            )
        )  # fmt: skip
    return questions


def _together(row: Mapping[str, Any]) -> tuple[Hashable, Hashable]:
    """Return what an answer counts together with: its question on all figures, and its figure's questions."""
    kind = tuple(str(row.get(key)) for key in PARTS[:3])
    return ("question", *kind, str(row.get("question_id"))), ("figure", *kind, str(row.get("figure_id")))


def _id(row: Mapping[str, Any]) -> str:
    return "_".join(str(row[key]) for key in PARTS)


def read_results(path: Path, questions: Sequence[Question]) -> Results:
    """Read ``HallusionBench_result.json``: the questions with ``model_prediction``."""
    file = path / "HallusionBench_result.json" if path.is_dir() else path
    by_id = {question.id: question for question in questions}
    predictions = []
    for where, row in read_objects(file, (*PARTS, "model_prediction"), "a result of HallusionBench"):
        if _id(row) not in by_id:
            raise UserError(f"{where}: {_id(row)} is no question of HallusionBench")
        answer = Prediction.of(by_id[_id(row)], text_of(row, "model_prediction", where))
        predictions.append(replace(answer, question=str(row.get("question") or answer.question)))
    return Results(predictions)


def questions_in_results(path: Path) -> list[Question]:
    """Read the questions of ``HallusionBench_result.json``, whose truths stand beside the answers."""
    return read(path / "HallusionBench_result.json" if path.is_dir() else path)


def read_answer(prediction: Prediction, policy: Policy) -> Reading:
    """Read yes or no. Official scores are GPT-4's judgement of free answers; here ``official`` is the last answer.

    What it keeps of the official rule: "0" and "1", and that "I do not know" is right where no picture was given.
    """
    if policy != "official":
        return Reading(yes_or_no(prediction.prediction, policy))
    said = {"0": "no", "1": "yes"}.get(prediction.prediction.strip())
    said = said or yes_or_no(prediction.prediction, "last-answer")
    return Reading(said) if said or not _without_picture(prediction) else Reading(UNCERTAIN, guessed=True)


def _without_picture(prediction: Prediction) -> bool:
    return prediction.meta.get("category") == "VS" and str(prediction.meta.get("figure_id")) == "0"


def right(prediction: Prediction, gold: str | None, reading: Reading) -> float:
    """Return whether the answer is the truth, or rightly uncertain."""
    return float(reading.value in (gold, UNCERTAIN) and reading.value is not None)


def _set(row: Row) -> Hashable:
    return tuple(row.prediction.meta.get(key) for key in PARTS[:3])


def check_groups(rows: Sequence[Row]) -> None:
    """Refuse questions of which not all figures are answered, and figures of which not all questions are."""
    for number, what in enumerate(("question", "figure")):
        for name, group in _groups(rows, number).items():
            refuse_parts({"_".join(name[1:]): group}, _size(group, number), "HallusionBench", what)


def _size(group: Sequence[Row], number: int) -> int:
    """Return how many answers count together with those of a group."""
    sizes = group[0].prediction.meta.get("together")
    if not isinstance(sizes, list | tuple) or len(sizes) != 2:
        raise UserError(
            f"question '{group[0].prediction.id}' of hallusionbench: meta has no 'together'; give the questions with "
            "--bench hallusionbench=PATH"
        )
    return int(sizes[number])


def _groups(rows: Sequence[Row], number: int) -> dict[Any, list[Row]]:
    return grouped(rows, lambda row: _together(row.prediction.meta)[number])


def _whole(rows: Sequence[Row], number: int) -> list[list[Row]]:
    """Return the groups of which all answers are there."""
    groups = _groups(rows, number).values()
    return [group for group in groups if len(group) == _size(group, number)]


def figures(rows: Sequence[Row]) -> Mapping[str, Figure]:
    """Return the accuracies of answers, of questions over all their figures, and of figures over all their questions.

    Easy is a question on the original figure, or without one; hard is it on all edited ones. Intervals are clustered by
    set: its questions and figures belong together.
    """
    questions, shown = (
        _whole(rows, 0),
        [group for group in _whole(rows, 1) if not _without_picture(group[0].prediction)],
    )
    easy = [[row for row in group if _is_original(row)] for group in questions]
    hard = [[row for row in group if not _is_original(row)] for group in questions]
    num_right = [sum(row.right == 1 for row in group) for group in shown]
    clusters = numbered([_set(group[0]) for group in shown])
    mixed = [0 < number < len(group) for number, group in zip(num_right, shown, strict=True)]
    return {
        "a_acc": share([row.right for row in rows], numbered([_set(row) for row in rows])),
        "q_acc": all_right(questions, _set),
        "f_acc": all_right(shown, _set),
        "easy_acc": all_right([group for group in easy if group], _set),
        "hard_acc": all_right([group for group in hard if group], _set),
        "figures_inconsistent": share(mixed, clusters),
        "figures_wrong": share([number == 0 for number in num_right], clusters),
    }


def _is_original(row: Row) -> bool:
    return str(row.prediction.meta.get("figure_id")) == "0"


HALLUSIONBENCH = Benchmark(
    name="hallusionbench",
    title="HallusionBench",
    source="tianyi-lab/HallusionBench 744007c, utils.py, BSD-3-Clause",
    read=read,
    gold=yes_no_gold,
    read_answer=read_answer,
    right=right,
    figures=figures,
    headline="a_acc",
    check_groups=check_groups,
    read_results=read_results,
    questions_in_results=questions_in_results,
    note="Official scores are GPT-4's judgement of free answers; here an answer is the yes or no that it says, and one "
    "that says neither is wrong. Under 'official' it is right, and counted as guessed, where no picture was given.",
)
