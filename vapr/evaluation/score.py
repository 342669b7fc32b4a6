"""Score predictions: the same object for every benchmark and policy, whoever generated the answers."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vapr.errors import UserError
from vapr.evaluation.benchmarks.benchmark import Benchmark, Row
from vapr.evaluation.scoring import yes_no
from vapr.evaluation.scoring.answers import POLICIES, Policy
from vapr.evaluation.scoring.figures import NONE, Figure, share
from vapr.evaluation.scoring.prediction import Prediction, Question

YES_NO_KEYS = ("precision", "recall", "f1", "yes_rate", "gold_yes_rate")


def score(
    predictions: Sequence[Prediction], benchmark: Benchmark, policy: Policy = "strict", *,
    questions: int | None = None, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Score the predictions of one benchmark under a parsing policy.

    Args:
        predictions: of that benchmark.
        benchmark: which.
        policy: how answers are read.
        questions: how many were asked; None for as many as there are answers.
        seed: of the bootstrap.

    Returns:
        What JSON holds: ``accuracy, precision, recall, f1, yes_rate, gold_yes_rate, unparsed_rate`` in [0, 1], None
        where the benchmark has no such figure; ``intervals`` of each, ``figures`` of the benchmark's own, ``splits``
        with the same, ``yes_bias`` where truths are yes or no, and under ``policies`` what other policies give.
    """
    if benchmark.scored is not None:
        return _not_scored(predictions, benchmark, policy, questions)
    rows = score_rows(predictions, benchmark, policy)
    splits: dict[str, list[Row]] = {}
    for row in rows:
        if (name := benchmark.split(row.prediction)) is not None:
            splits.setdefault(name, []).append(row)
    result = {
        "benchmark": benchmark.name,
        "policy": policy,
        "scored": True,
        "headline": benchmark.headline,
        "asked": len(rows) if questions is None else questions,
        "partial": questions is not None and questions > len(rows),
        **_figures(rows, benchmark, seed),
        "splits": {name: _figures(members, benchmark, seed) for name, members in splits.items()},
        "policies": {other: _short(predictions, benchmark, other, rows, policy) for other in POLICIES},
        "note": benchmark.note,
    }
    yes_no_rows = [row for row in rows if row.gold in ("yes", "no")]
    if yes_no_rows:
        result["yes_bias"] = yes_no.yes_bias(*_columns(yes_no_rows), seed=seed)
    return result


def score_rows(predictions: Sequence[Prediction], benchmark: Benchmark, policy: Policy) -> list[Row]:
    """Read and judge each answer.

    Raises:
        UserError: for no predictions, predictions of another benchmark, or a question without a truth.
    """
    if not predictions:
        raise UserError(
            f"no predictions of {benchmark.name}; generate them with vapr eval MODEL --bench {benchmark.name}=PATH"
        )
    rows = []
    for prediction in predictions:
        if prediction.benchmark != benchmark.name:
            other = prediction.benchmark
            raise UserError(f"question '{prediction.id}' is of {other}, not of {benchmark.name}; give --bench {other}")
        gold = benchmark.gold(prediction)
        if gold is None:
            raise UserError(
                f"question '{prediction.id}' of {benchmark.name}: 'answer' is {str(prediction.answer)[:40]!r}, no "
                f"truth that {benchmark.title} has; give the questions with --bench {benchmark.name}=PATH"
            )
        reading = benchmark.read_answer(prediction, policy)
        rows.append(Row(prediction, gold, reading, benchmark.right(prediction, gold, reading)))
    return rows


def _figures(rows: Sequence[Row], benchmark: Benchmark, seed: int) -> dict[str, Any]:
    """Return the common figures and the benchmark's own."""
    figures: dict[str, Figure] = dict.fromkeys(YES_NO_KEYS, NONE)
    yes_no_rows = [row for row in rows if row.gold in ("yes", "no")]
    if yes_no_rows:
        measured = yes_no.figures_of(*_columns(yes_no_rows), seed=seed)
        figures |= {name: measured[name] for name in YES_NO_KEYS}
    images = [row.prediction.image for row in rows]
    figures["accuracy"] = share([row.right for row in rows], images)
    figures["unparsed_rate"] = share([row.reading.unparsed for row in rows], images)
    return {
        "questions": len(rows),
        "unparsed": sum(row.reading.unparsed for row in rows),
        "guessed": sum(row.reading.guessed for row in rows),
        **{name: figure.value for name, figure in figures.items()},
        "intervals": {name: figure.as_dict()["interval"] for name, figure in figures.items()},
        "figures": {name: figure.as_dict() for name, figure in benchmark.figures(rows).items()},
    }


def _short(
    predictions: Sequence[Prediction], benchmark: Benchmark, policy: Policy, rows: Sequence[Row], known: Policy
) -> Mapping[str, Any]:
    """Return what one policy makes of the answers, in four figures without intervals."""
    if policy != known:
        rows = score_rows(predictions, benchmark, policy)
    count = len(rows)
    said = [row.reading.value for row in rows if row.gold in ("yes", "no")]
    return {
        "accuracy": sum(row.right for row in rows) / count,
        "yes_rate": said.count("yes") / len(said) if said else None,
        "unparsed_rate": sum(row.reading.unparsed for row in rows) / count,
        "guessed": sum(row.reading.guessed for row in rows),
    }


def _columns(rows: Sequence[Row]) -> tuple[list[str], list[str | None], list[str]]:
    """Return truth, answer and picture of each row."""
    gold = [str(row.gold) for row in rows]
    return gold, [row.reading.value for row in rows], [row.prediction.image for row in rows]


def _not_scored(
    predictions: Sequence[Prediction], benchmark: Benchmark, policy: Policy, questions: int | None
) -> dict[str, Any]:
    names = ("accuracy", *YES_NO_KEYS, "unparsed_rate")
    return {
        "benchmark": benchmark.name, "policy": policy, "scored": False, "why": benchmark.scored,
        "questions": len(predictions), "asked": len(predictions) if questions is None else questions,
        **dict.fromkeys(names), "splits": {},
    }  # fmt: skip


def of_benchmark(predictions: Sequence[Prediction], name: str, where: str) -> list[Prediction]:
    """Return the predictions of one benchmark.

    Raises:
        UserError: if there are none, naming those that are there.
    """
    found = [prediction for prediction in predictions if prediction.benchmark == name]
    if not found:
        others = ", ".join(sorted({prediction.benchmark for prediction in predictions})) or "no predictions at all"
        raise UserError(f"{where}: no predictions of {name}; it holds {others}")
    return found


def with_truth(
    predictions: Sequence[Prediction], questions: Sequence[Question], where: str, *, partial: bool = False
) -> list[Prediction]:
    """Return predictions with the truth and the facts of the questions they answer.

    They are joined by id, or by picture and question where the ids are of another kind; never by line.

    Raises:
        UserError: for an answer to no question or to several, another question under the same id, a question answered
            twice, or questions without an answer unless ``partial``.
    """
    by_id = {question.id: question for question in questions}
    by_content = _by_content(questions)
    answered: set[str] = set()
    joined = []
    for prediction in predictions:
        question = by_id.get(prediction.id) or _find(prediction, by_content, where)
        if prediction.question and not same_question(prediction.question, question.question):
            raise UserError(
                f"{where}: '{prediction.id}' answers {prediction.question[:60]!r}, but the question is "
                f"{question.question[:60]!r}; these are predictions of other questions"
            )
        if question.id in answered:
            raise UserError(f"{where}: question '{question.id}' is answered twice; keep one of the two")
        answered.add(question.id)
        joined.append(Prediction.of(question, prediction.prediction, **{**prediction.meta, **question.meta}))
    missing = [question.id for question in questions if question.id not in answered]
    if missing and not partial:
        raise UserError(
            f"{where}: {len(predictions):,} answers to {len(questions):,} questions; '{missing[0]}' has none. "
            "Finish the run, or score what is there with --partial"
        )
    return joined


Contents = Mapping[tuple[str | None, str, str], list[Question]]


def _by_content(questions: Sequence[Question]) -> Contents:
    """Return questions by split, picture and wording, and also by picture and wording alone."""
    found: dict[tuple[str | None, str, str], list[Question]] = {}
    for question in questions:
        as_asked = Prediction.of(question, "")
        for split in {as_asked.split, None}:
            found.setdefault((split, as_asked.image, plain_question(question.question)), []).append(question)
    return found


def _find(prediction: Prediction, by_content: Contents, where: str) -> Question:
    """Return the one question about the prediction's picture in its words."""
    asked = plain_question(prediction.question)
    for split in (prediction.split, None):
        found = by_content.get((split, prediction.image, asked), [])
        if len(found) == 1:
            return found[0]
    name = prediction.benchmark
    if found:
        raise UserError(
            f"{where}: '{prediction.id}' is no id of {name}, and {len(found)} of its questions ask that of "
            f"{prediction.image}; give meta.split"
        )
    raise UserError(f"{where}: an answer to '{prediction.id}', which is no question of {name}")


def same_question(one: str, other: str) -> bool:
    """Return whether two questions are equal but for spaces and what is asked of the answer's form after them."""
    a, b = plain_question(one), plain_question(other)
    return a.startswith(b) or b.startswith(a)


def plain_question(question: str) -> str:
    """Return a question in lower case, without marks of pictures and needless space."""
    text = " ".join(re.sub(r"<image[^>]*>", " ", question).lower().split())
    return text.replace("in the imange", "in the image")  # as some files of POPE have it
