"""MMStar: 1,500 questions with options that need the picture, 250 in each of six categories, on 18 axes."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vapr.evaluation.benchmarks.benchmark import Benchmark, Reading, Row, letter_gold
from vapr.evaluation.benchmarks.choices import ASK_FOR_LETTER, accuracies, official_letter, read_letter
from vapr.evaluation.benchmarks.rows import files_of, pictures, read_rows, require, text_of
from vapr.evaluation.scoring.answers import Policy
from vapr.evaluation.scoring.averages import mean_of
from vapr.evaluation.scoring.figures import Figure
from vapr.evaluation.scoring.prediction import Prediction, Question, check_ids

_LISTED = re.compile(r"(?:^|[\s,;(])([A-F])\s*[:).]\s")


def read(path: Path) -> list[Question]:
    """Read rows with the columns of ``mmstar.parquet``, which the readers turn into such a file."""
    files = files_of(path, ("*mmstar*.jsonl", "*.jsonl"), "Lin-Chen/MMStar on the hub")
    questions = [_question(row, where, file.parent) for file in files for where, row in read_rows(file)]
    check_ids(questions, path)
    return questions


def _question(row: Mapping[str, Any], where: str, folder: Path) -> Question:
    require(row, where, ("index", "question", "answer", "category", "l2_category"), "a question of MMStar")
    text_of(row, "question", where)
    meta = {"split": row["category"], "axis": row["l2_category"], "options": options_in(row["question"])}
    return Question(
        benchmark="mmstar", id=str(row["index"]), question=f"{row['question'].strip()}\n{ASK_FOR_LETTER}",
        answer=row["answer"], meta=meta, images=pictures(row.get("image"), folder),
    )  # fmt: skip


def options_in(question: str) -> list[str]:
    """Return the options that stand in a question's text, "Options: A: red, B: blue"; none if they are not there."""
    _, begin, listed = question.rpartition("Options:")
    marks = list(_LISTED.finditer(listed)) if begin else []
    in_order = [mark for number, mark in enumerate(marks) if mark[1] == "ABCDEF"[min(number, 5)]]
    if len(marks) < 2 or len(in_order) != len(marks):
        return []
    ends = [mark.start() for mark in marks[1:]] + [len(listed)]
    return [listed[mark.end() : end].strip(" ,;\n") for mark, end in zip(marks, ends, strict=True)]


def read_answer(prediction: Prediction, policy: Policy) -> Reading:
    """Read a letter. The official rule: the first character, or what follows "(", "option " or "the answer is "."""
    if policy != "official":
        return read_letter(prediction, policy)
    text = prediction.prediction.lower().strip().replace("\n", " ")
    for before in ("(", "option ", "the answer is "):
        if text.startswith(before):
            return official_letter(prediction, text[len(before) : len(before) + 1], "ABCDEFGH")
    return official_letter(prediction, text[:1], "ABCDEFGH")


def figures(rows: Sequence[Row]) -> Mapping[str, Figure]:
    """Return the accuracy on each axis, and the mean over axes, which lmms-eval gives instead of that over questions.

    Multi-modal gain and leakage compare with answers that were given without the picture; see the blind control.
    """
    axes = accuracies(rows, lambda prediction: prediction.meta.get("axis") or prediction.meta.get("l2_category"))
    return {"mean_of_axes": mean_of(list(axes.values())), **axes} if axes else {}


MMSTAR = Benchmark(
    name="mmstar",
    title="MMStar",
    source="MMStar-Benchmark/MMStar 79e6d1c, eval/vlmeval/evaluate/mmstar.py, Apache-2.0",
    read=read,
    gold=letter_gold,
    read_answer=read_answer,
    figures=figures,
    note="The official rule takes the first character of any answer for a letter: 'a dog' is A.",
)
