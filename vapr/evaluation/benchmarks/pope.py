"""POPE: is an object in the picture? Three splits of 3,000 questions about 500 pictures of COCO val2014."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from vapr.errors import UserError
from vapr.evaluation.benchmarks.benchmark import Benchmark, Reading, Results, Row, yes_no_gold
from vapr.evaluation.scoring import yes_no
from vapr.evaluation.scoring.answers import Policy, yes_or_no
from vapr.evaluation.scoring.figures import Figure
from vapr.evaluation.scoring.prediction import Prediction, Question, check_ids, read_json_lines

SPLITS = ("adversarial", "popular", "random")
_OBJECT = re.compile(r"Is there an? (.+) in the (?:image|imange)\?")


def read(path: Path) -> list[Question]:
    """Read ``coco_pope_*.json`` (JSON lines) of a folder, or one of them; pictures lie beside them, or in ``val2014/``.

    RePOPE's files of the same names and keys are read alike; its split is told by the file's name, too.
    """
    files = sorted(path.glob("*pope_*.json")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: no coco_pope_*.json in it; get them from RUCAIBox/POPE, output/coco")
    questions = []
    for file in files:
        split = next((name for name in SPLITS if name in file.name), file.stem)
        for number, row in read_json_lines(file):
            if missing := [key for key in ("question_id", "image", "text", "label") if key not in row]:
                raise UserError(
                    f"{file}:{number}: no '{missing[0]}'; a question of POPE has question_id, image, text, label"
                )
            meta = {"split": split, "image": row["image"]}
            questions.append(
                Question(
                    benchmark="pope", id=f"{split}-{row['question_id']}", question=row["text"], answer=row["label"],
                    meta=meta, images=(_picture(file.parent, row["image"]),),
                )
            )  # fmt: skip
    check_ids(questions, path)
    return questions


def _object(question: str) -> str:
    """Return what is asked for; files of POPE differ in spelling ("in the imange")."""
    found = _OBJECT.match(question)
    return found[1] if found else question


def _picture(folder: Path, name: str) -> Path:
    return next((at for at in (folder / name, folder / "val2014" / name) if at.is_file()), folder / name)


def read_results(path: Path, questions: Sequence[Question]) -> Results:
    """Read answers as LLaVA writes them: ``question_id``, ``prompt``, ``text``, and no picture.

    Which picture an id is about stands in ``llava_pope_test.jsonl``, which must lie beside the answers. Truth is joined
    by split, picture and question: the ids and the order of the two differ.
    """
    asked = path.parent / "llava_pope_test.jsonl"
    if not asked.is_file():
        raise UserError(
            f"{path}: answers without pictures; put LLaVA's llava_pope_test.jsonl, which names them, beside it"
        )
    by_content = {(q.meta["split"], q.meta["image"], _object(q.question)): q for q in questions}
    about: dict[int, Question] = {}
    for number, row in read_json_lines(asked):
        key = (row["category"], row["image"], _object(row["text"]))
        if key not in by_content:
            raise UserError(
                f"{asked}:{number}: {key[2]!r} on {key[1]} is no question of POPE {key[0]}; give all its files"
            )
        about[row["question_id"]] = by_content[key]
    predictions = []
    for number, row in read_json_lines(path):
        if row.get("question_id") not in about or "text" not in row:
            raise UserError(f"{path}:{number}: no answer to a question of {asked.name}; needs question_id and text")
        predictions.append(Prediction.of(about[row["question_id"]], row["text"]))
    left_out = len(questions) - len(about)
    note = [f"{asked.name} asks {len(about):,} of the {len(questions):,} questions"] if left_out else []
    return Results(predictions, list(about.values()), note)


def read_answer(prediction: Prediction, policy: Policy) -> Reading:
    """Read yes or no. The official rule: "no" where the first sentence holds No, not or no, else "yes"."""
    if policy != "official":
        return Reading(yes_or_no(prediction.prediction, policy))
    words = prediction.prediction.split(".")[0].replace(",", "").split(" ")
    if {"No", "not", "no"} & set(words):
        return Reading("no")
    return Reading("yes", guessed=not re.search(r"\byes\b", prediction.prediction, re.IGNORECASE))


def figures(rows: Sequence[Row]) -> Mapping[str, Figure]:
    """Return the mean F1 of the splits, which is what papers give."""
    splits = {row.prediction.split for row in rows}
    if len(splits) < 2:
        return {}
    values = []
    for split in splits:
        there = [row for row in rows if row.prediction.split == split]
        gold, said = [str(row.gold) for row in there], [row.reading.value for row in there]
        values.append(yes_no.STATISTICS["f1"](yes_no.counts_of(gold, said).sum(axis=0, keepdims=True))[0])
    return {"mean_f1_of_splits": Figure(float(sum(values) / len(values)), None, len(rows))}


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
