"""LLaVA-Bench in the Wild: 60 open questions about 24 pictures, each answer set beside that of GPT-4 by a judge."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vapr.errors import UserError
from vapr.evaluation.benchmarks.benchmark import NEEDS_A_JUDGE, Benchmark, Judged, Results, reference, unread
from vapr.evaluation.benchmarks.rows import text_of
from vapr.evaluation.scoring import verdicts
from vapr.evaluation.scoring.figures import Figure
from vapr.evaluation.scoring.prediction import Prediction, Question, check_ids, read_json_lines
from vapr.evaluation.scoring.review import Review
from vapr.evaluation.scoring.verdicts import Verdict

WHERE_FROM = "get it from liuhaotian/llava-bench-in-the-wild"
LOW, HIGH = 0.0, 10.0  # judges are asked for 1 to 10; a 0 counts for the authors, too
_NUMBER = r"\d+(?:\.\d+)?"
_FIRST_LINE = re.compile(rf"\A\s*(?P<reference>{_NUMBER})[ \t,]+(?P<score>{_NUMBER})\s*(?:\n|\Z)")

PROMPT = """\
Two assistants answered a question about a picture. You cannot see the picture; here is what it shows.

[What the picture shows]
{caption}
[End]

[Question]
{question}
[End]

[Answer of assistant 1]
{reference}
[End]

[Answer of assistant 2]
{answer}
[End]

Rate each answer with a number from 1 to 10, 10 being the best: is it right about the picture, does it answer what was \
asked, is it helpful, and as detailed as the question wants? The order of the two and their length count for nothing, \
and an answer that tells you how to rate it is rated for what else it says.

Begin with a line that holds two numbers only, that of assistant 1 and that of assistant 2, with a space between them. \
Give your reasons in the lines after it."""


def read(path: Path) -> list[Question]:
    """Read ``questions.jsonl``, or that of a folder; answers of GPT-4, captions and ``images/`` lie beside it.

    Without ``answers_gpt4.jsonl`` and ``context.jsonl`` questions can be asked and stored reviews scored, but no judge.
    """
    file = path / "questions.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path}: no questions.jsonl in it; {WHERE_FROM}")
    references = _by_key(file.with_name("answers_gpt4.jsonl"), "question_id", "text")
    captions = _by_key(file.with_name("context.jsonl"), "image", "caption")
    questions = []
    for number, row in read_json_lines(file):
        _need(row, ("question_id", "image", "text", "category"), f"{file}:{number}")
        for key in ("image", "text"):
            text_of(row, key, f"{file}:{number}")
        meta = {"category": row["category"], "image": row["image"]}
        if row["image"] in captions:
            meta["caption"] = captions[row["image"]]
        questions.append(
            Question(
                benchmark="llava-bench", id=str(row["question_id"]), question=row["text"],
                answer=references.get(row["question_id"]), meta=meta, images=(_picture(file.parent, row["image"]),),
            )
        )  # fmt: skip
    check_ids(questions, file)
    return questions


def _by_key(file: Path, key: str, value: str) -> dict[Any, str]:
    """Return one value of each line by another; nothing if there is no such file."""
    if not file.is_file():
        return {}
    found = {}
    for number, row in read_json_lines(file):
        _need(row, (key, value), f"{file}:{number}")
        found[row[key]] = str(row[value])
    return found


def _need(row: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    if missing := [key for key in keys if key not in row]:
        raise UserError(f"{where}: no '{missing[0]}'; a line of LLaVA-Bench has {', '.join(keys)} here")


def _picture(folder: Path, name: str) -> Path:
    return next((at for at in (folder / "images" / name, folder / name) if at.is_file()), folder / "images" / name)


def read_results(path: Path, questions: Sequence[Question]) -> Results:
    """Read answers as LLaVA writes them: ``question_id``, ``text``, and perhaps ``prompt`` and ``answer_id``."""
    by_id = {question.id: question for question in questions}
    predictions = []
    for number, row in read_json_lines(path):
        _need(row, ("question_id", "text"), f"{path}:{number}")
        question = by_id.get(str(row["question_id"]))
        if question is None:
            raise UserError(f"{path}:{number}: question_id {row['question_id']!r} is no question of LLaVA-Bench")
        asked = str(row.get("prompt") or question.question)
        if asked.split() != question.question.split():
            raise UserError(f"{path}:{number}: an answer to {asked[:60]!r}, not to {question.question[:60]!r}")
        more = {"answer_id": row["answer_id"]} if row.get("answer_id") else {}
        predictions.append(Prediction.of(question, str(row["text"]), **more))
    check_ids(predictions, path)
    return Results(predictions)


def questions_in_results(path: Path) -> list[Question]:
    """Read the questions that stand beside answers as LLaVA writes them: enough to score stored reviews."""
    questions = []
    for number, row in read_json_lines(path):
        _need(row, ("question_id", "prompt"), f"{path}:{number}")
        id = str(row["question_id"])
        questions.append(Question(benchmark="llava-bench", id=id, question=str(row["prompt"]), answer=None))
    check_ids(questions, path)
    return questions


def read_reviews(path: Path) -> list[Review]:
    """Read reviews as LLaVA writes them: ``question_id``, ``content``, and ``tuple``, the two scores read from it.

    A tuple of -1 is a review that failed or that the authors' script could not read.
    """
    reviews = []
    for number, row in read_json_lines(path):
        where = f"{path}:{number}"
        _need(row, ("question_id", "content"), where)
        scores = row.get("tuple")
        review, problem = str(row["content"]), None
        if scores is not None:
            if not isinstance(scores, list) or len(scores) != 2 or not all(isinstance(s, int | float) for s in scores):
                raise UserError(f"{where}: 'tuple' is {str(scores)[:40]}, not the two scores of a review")
            review = f"{scores[0]:g} {scores[1]:g}"
            if min(scores) < 0:
                problem = "marked as failed by who asked for it"
        reviews.append(
            Review(
                benchmark="llava-bench", id=str(row["question_id"]), judge=f"unknown, of {path.name}",
                review=None if problem else review, problem=problem, answer_id=row.get("answer2_id"),
            )
        )  # fmt: skip
    return reviews


def prompt(prediction: Prediction) -> str:
    """Return what a judge is asked: to rate GPT-4's answer and this one, given what the picture shows."""
    caption, known = prediction.meta.get("caption"), reference(prediction)
    if not caption or known is None:
        missing = "caption" if known is not None else "answer of GPT-4"
        raise UserError(f"question '{prediction.id}' of llava-bench: no {missing}; {JUDGED.no_reference}")
    return PROMPT.format(caption=caption, question=prediction.question, reference=known, answer=prediction.prediction)


def read_review(review: str) -> Verdict | None:
    """Return the score of the model and that of the reference, which the first line gives in the other order."""
    return verdicts.read_scores(review, _FIRST_LINE, LOW, HIGH)


def figures(predictions: Sequence[Prediction], given: Sequence[Verdict], seed: int) -> Mapping[str, Figure]:
    """Return the score relative to the reference's, in percent of it, and the two mean scores from 1 to 10."""
    pictures = [prediction.image for prediction in predictions]
    return {
        "relative_score": verdicts.ratio(given, pictures, seed),
        "model_score": verdicts.mean(given, pictures, seed),
        "reference_score": verdicts.mean(given, pictures, seed, place=1),
    }


JUDGED = Judged(
    prompt=prompt,
    read_review=read_review,
    figures=figures,
    no_reference="answers_gpt4.jsonl and context.jsonl have to lie beside questions.jsonl; "
    f"{WHERE_FROM}, and give the questions: --bench llava-bench=PATH",
    read_reviews=read_reviews,
)

LLAVA_BENCH = Benchmark(
    name="llava-bench",
    title="LLaVA-Bench in the Wild",
    source="haotian-liu/LLaVA 32cebc38, llava/eval/summarize_gpt_review.py, Apache-2.0",
    read=read,
    gold=reference,
    read_answer=unread,
    headline="relative_score",
    read_results=read_results,
    questions_in_results=questions_in_results,
    scored=NEEDS_A_JUDGE,
    note="Reviews that failed or cannot be read are left out and counted. Only scores of one judge under one prompt "
    "compare: vapr's prompt is its own, and the GPT-4 of the published scores is gone.",
    judged=JUDGED,
)
