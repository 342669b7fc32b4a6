"""SEED-Bench, its image part: questions with four options in nine dimensions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vapr.errors import UserError
from vapr.evaluation.benchmarks.benchmark import Benchmark, Reading, Results, letter_gold
from vapr.evaluation.benchmarks.choices import prompt_of, read_letter
from vapr.evaluation.benchmarks.rows import files_of, pictures, read_rows, require
from vapr.evaluation.scoring.answers import Policy
from vapr.evaluation.scoring.prediction import Prediction, Question, check_ids

DIMENSIONS = (
    "Scene Understanding", "Instance Identity", "Instance Attributes", "Instance Location", "Instances Counting",
    "Spatial Relation", "Instance Interaction", "Visual Reasoning", "Text Understanding",
)  # fmt: skip
"""Types 1 to 9; 10 to 12 are about videos."""
_CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")


def read(path: Path) -> list[Question]:
    """Read the questions about images of ``SEED-Bench.json``; pictures lie in ``SEED-Bench-image/`` beside it."""
    files = files_of(path, ("SEED-Bench.json", "SEED*.json"), "AILab-CVC/SEED-Bench on the hub")
    questions = []
    for file in files:
        for where, row in read_rows(file):
            require(row, where, ("question_id", "question_type_id"), "a question of SEED-Bench")
            if row["question_type_id"] in range(1, len(DIMENSIONS) + 1):
                questions.append(_question(row, where, file.parent))
    check_ids(questions, path)
    return questions


def _question(row: Mapping[str, Any], where: str, folder: Path) -> Question:
    require(row, where, ("question", *_CHOICES, "answer", "data_id"), "a question of SEED-Bench")
    options = [str(row[key]) for key in _CHOICES]
    name = str(row["data_id"])
    beside = folder / "SEED-Bench-image" / name
    meta = {"split": DIMENSIONS[row["question_type_id"] - 1], "image": name, "options": options}
    return Question(
        benchmark="seed-bench", id=str(row["question_id"]), question=prompt_of(str(row["question"]), options),
        answer=row["answer"], meta=meta, images=pictures(beside if beside.is_file() else name, folder),
    )  # fmt: skip


def read_results(path: Path, questions: Sequence[Question]) -> Results:
    """Read answers as they are uploaded: ``question_id`` and ``prediction``, a letter.

    What the authors' script writes (``q_id``, ``prediction``) and LLaVA's (``question_id``, ``text``) is read alike.
    Answers to questions about videos are left out and counted.
    """
    by_id = {question.id: question for question in questions}
    predictions, videos = [], 0
    for where, row in read_rows(path):
        id, text = row.get("question_id", row.get("q_id")), row.get("prediction", row.get("text"))
        if id is None or not isinstance(text, str):
            raise UserError(f"{where}: no answer; needs question_id and prediction, a letter")
        if str(id) in by_id:
            predictions.append(Prediction.of(by_id[str(id)], text))
        elif str(id).startswith("v"):
            videos += 1
        else:
            raise UserError(f"{where}: an answer to '{id}', which is no question about an image of SEED-Bench")
    check_ids(predictions, path)
    return Results(predictions, notes=[f"{videos:,} answers about videos left out"] if videos else [])


def read_answer(prediction: Prediction, policy: Policy) -> Reading:
    """Read a letter. The official rule: the answer is the letter and nothing else."""
    if policy != "official":
        return read_letter(prediction, policy)
    return Reading(prediction.prediction if prediction.prediction in ("A", "B", "C", "D") else None)


SEED_BENCH = Benchmark(
    name="seed-bench",
    title="SEED-Bench image",
    source="AILab-CVC/SEED-Bench 250947c, eval.py, Apache-2.0",
    read=read,
    gold=letter_gold,
    read_answer=read_answer,
    read_results=read_results,
    note="The authors rank the four options by likelihood; under 'official' an answer must be one of their letters.",
)
