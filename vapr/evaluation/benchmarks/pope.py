"""POPE: is an object in the picture? Three splits of 3,000 questions about 500 pictures of COCO val2014."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from vapr.errors import UserError
from vapr.evaluation.benchmarks.benchmark import Benchmark, Reading, Results, Row, yes_no_gold
from vapr.evaluation.benchmarks.rows import picture, text_of
from vapr.evaluation.scoring import yes_no
from vapr.evaluation.scoring.answers import Policy, states, yes_or_no
from vapr.evaluation.scoring.figures import Figure, numbered
from vapr.evaluation.scoring.prediction import Prediction, Question, check_ids, read_json_lines
from vapr.intervals import Z

LLAVA_QUESTIONS = "llava_pope_test.jsonl"
SPLITS = ("adversarial", "popular", "random")
_YES = re.compile(r"\byes\b", re.IGNORECASE)
_OBJECT = re.compile(r"Is there an? (.+) in the (?:image|imange)\?")


def read(path: Path) -> list[Question]:
    """Read ``coco_pope_*.json`` of a folder, or one of them; pictures lie beside them, or in ``val2014/``."""
    files = (
        [file for file in sorted(path.glob("*pope_*.json")) if "repope" not in file.name] if path.is_dir() else [path]
    )
    if not files:
        raise UserError(f"{path}: no coco_pope_*.json in it; get them from RUCAIBox/POPE, output/coco")
    return read_files(files, path, "pope")


def read_files(files: Sequence[Path], path: Path, benchmark: str) -> list[Question]:
    """Read files of POPE's format, whose names tell the split, as questions of a benchmark."""
    questions = []
    for file in files:
        split = next((name for name in SPLITS if name in file.name), file.stem)
        for number, row in read_json_lines(file):
            if missing := [key for key in ("question_id", "image", "text", "label") if key not in row]:
                raise UserError(
                    f"{file}:{number}: no '{missing[0]}'; a question of POPE has question_id, image, text, label"
                )
            for key in ("image", "text", "label"):
                text_of(row, key, f"{file}:{number}")
            meta = {"split": split, "image": row["image"]}
            questions.append(
                Question(
                    benchmark=benchmark, id=f"{split}-{row['question_id']}", question=row["text"], answer=row["label"],
                    meta=meta, images=(picture(file.parent, row["image"], ("val2014",)),),
                )
            )  # fmt: skip
    check_ids(questions, path)
    return questions


def _object(question: str) -> str:
    """Return what is asked for; files of POPE differ in spelling ("in the imange")."""
    found = _OBJECT.match(question)
    return found[1] if found else question


def read_results(path: Path, questions: Sequence[Question], *, drops: bool = False) -> Results:
    """Read answers in LLaVA's layout, ``question_id`` and ``text``, or in POPE's own, ``question`` and ``answer``.

    LLaVA's name no picture: which one an id is about stands in ``llava_pope_test.jsonl``, which must lie beside the
    answers. POPE's must name it as ``image``; its split is ``split``, ``category``, or told by the file's name.
    Truth is joined by split, picture and question: ids and order differ.

    Args:
        path: JSON lines.
        questions: of POPE.
        drops: whether answers to other questions are left out, and counted, because the truth was cleaned.
    """
    first = next((row for _, row in read_json_lines(path)), {})
    of_llava = "question_id" in first and "text" in first
    told = _of_llava(path) if of_llava else _of_pope(path)
    by_content = {(q.meta["split"], q.meta["image"], _object(q.question)): q for q in questions}
    predictions, asked, left_out = [], {}, 0
    for where, key, text in told:
        if key in by_content:
            asked[key] = by_content[key]
            if text is not None:
                predictions.append(Prediction.of(by_content[key], text))
        elif drops:
            left_out += text is not None
        else:
            raise UserError(
                f"{where}: {key[2]!r} on {key[1]} is no question of POPE {key[0]}; give all files of its questions"
            )
    notes = [f"{left_out:,} answers are to questions that the truth drops"] if left_out else []
    if not of_llava:
        return Results(predictions, notes=notes)
    if len(asked) < len(questions):
        notes.append(f"{LLAVA_QUESTIONS} asks {len(asked):,} of the {len(questions):,} questions")
    return Results(predictions, list(asked.values()), notes)


Told = Iterator[tuple[str, tuple[str, str, str], str | None]]
"""Place, (split, picture, object), and the answer; None for a question that was asked."""


def _of_llava(path: Path) -> Told:
    beside = path.parent / LLAVA_QUESTIONS
    if not beside.is_file():
        raise UserError(f"{path}: answers without pictures; put LLaVA's {LLAVA_QUESTIONS}, which names them, beside it")
    about: dict[int, tuple[str, str, str]] = {}
    for number, row in read_json_lines(beside):
        about[row["question_id"]] = (row["category"], row["image"], _object(row["text"]))
        yield f"{beside}:{number}", about[row["question_id"]], None
    for number, row in read_json_lines(path):
        if row.get("question_id") not in about or not isinstance(row.get("text"), str):
            raise UserError(f"{path}:{number}: no answer to a question of {beside.name}; needs question_id and text")
        yield f"{path}:{number}", about[row["question_id"]], row["text"]


def _of_pope(path: Path) -> Told:
    named = next((name for name in SPLITS if name in path.name), None)
    for number, row in read_json_lines(path):
        where = f"{path}:{number}"
        if missing := [key for key in ("question", "answer") if not isinstance(row.get(key), str)]:
            raise UserError(f"{where}: no text '{missing[0]}'; an answer has question, answer, image, and split")
        if not isinstance(row.get("image"), str):
            raise UserError(
                f"{where}: an answer that names no picture, and answers are never joined by line; add its 'image' (and "
                "'split'), or write predictions.jsonl with the id of each question"
            )
        split = row.get("split") or row.get("category") or named
        if split is None:
            raise UserError(f"{where}: no 'split', and the file's name says none of {', '.join(SPLITS)}; add it")
        key = (str(split), row["image"], _object(row["question"]))
        yield where, key, None
        yield where, key, row["answer"]


def read_answer(prediction: Prediction, policy: Policy) -> Reading:
    """Read yes or no. The official rule: "no" where the first sentence holds No, not or no, else "yes"."""
    if policy != "official":
        return Reading(yes_or_no(prediction.prediction, policy))
    words = prediction.prediction.split(".")[0].replace(",", "").split(" ")
    if {"No", "not", "no"} & set(words):
        return Reading("no", guessed=not states(prediction.prediction, "no"))
    return Reading("yes", guessed=_YES.search(prediction.prediction) is None)


def figures(rows: Sequence[Row]) -> Mapping[str, Figure]:
    """Return the mean F1 of the splits, which is what papers give.

    Its interval is the delta method's over pictures: the splits ask about the same ones.
    """
    split_of = numbered([row.prediction.split for row in rows])
    num_splits = int(split_of.max()) + 1
    if num_splits < 2:
        return {}
    counts = yes_no.counts_of([str(row.gold) for row in rows], [row.reading.value for row in rows])
    above = 2 * counts[:, yes_no.YES_YES]
    below = counts[:, [yes_no.YES_YES, yes_no.NO_YES]].sum(axis=1) + counts[:, yes_no.YES].sum(axis=1)
    values, pull = [], np.zeros(len(rows))  # how far each answer pulls the mean
    for split in range(num_splits):
        those = split_of == split
        total = below[those].sum()
        values.append(above[those].sum() / total if total else 0.0)
        pull[those] = (above[those] - values[-1] * below[those]) / max(total, 1) / num_splits
    mean = float(sum(values) / num_splits)
    pulls = np.bincount(numbered([row.prediction.image for row in rows]), weights=pull)
    reach = Z * math.sqrt(float((pulls**2).sum()) * len(pulls) / max(len(pulls) - 1, 1))
    if not pulls.any():  # all right or all wrong: A. Agresti and Y. Min, Stat. Med. 24 (2005) 729, as for other figures
        reach = Z / (len(pulls) + 2)
    return {"mean_f1_of_splits": Figure(mean, (max(mean - reach, 0.0), min(mean + reach, 1.0)), len(rows))}


POPE = Benchmark(
    name="pope",
    title="POPE",
    source="RUCAIBox/POPE 08d957b, evaluate.py, MIT",
    read=read,
    gold=yes_no_gold,
    read_answer=read_answer,
    figures=figures,
    headline="f1",
    read_results=read_results,
    note="The official rule takes every answer without 'no' or 'not' in its first sentence for a yes, noise included.",
)
