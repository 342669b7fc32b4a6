"""Score predictions: the same object for every benchmark and policy, whoever generated the answers."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vapr.errors import UserError
from vapr.evaluation import score_judged
from vapr.evaluation.benchmarks.benchmark import Benchmark, Row, reference
from vapr.evaluation.scoring import logit_view, yes_no
from vapr.evaluation.scoring.answers import POLICIES, Policy
from vapr.evaluation.scoring.figures import NONE, Figure, share
from vapr.evaluation.scoring.prediction import Prediction, Question
from vapr.evaluation.scoring.review import Review

YES_NO_KEYS = ("precision", "recall", "f1", "yes_rate", "gold_yes_rate")


def score(
    predictions: Sequence[Prediction], benchmark: Benchmark, policy: Policy = "strict", *,
    questions: int | None = None, partial: bool = False, seed: int = 0,
    reviews: Mapping[str, Review] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Score the predictions of one benchmark under a parsing policy, or by what a judge said of them.

    Args:
        predictions: of that benchmark.
        benchmark: which.
        policy: how answers are read.
        questions: how many were asked; None for as many as there are answers.
        partial: whether questions may lack an answer that count only together with others.
        seed: of the bootstrap.
        reviews: of a judge, by id, for a benchmark that needs one. Without them it is not scored: no figure has a
            value. Answers without a review are left out, and the result is ``partial``; reviews without a verdict are
            ``unparsed``, and no figure but ``unparsed_rate`` counts them.

    Returns:
        What JSON holds: ``accuracy, precision, recall, f1, yes_rate, gold_yes_rate, unparsed_rate`` in [0, 1], None
        where the benchmark has no such figure; ``intervals`` of each, ``figures`` of the benchmark's own, ``splits``
        with the same, ``yes_bias`` where truths are yes or no, and under ``policies`` what other policies give.
    """
    if benchmark.judged is not None and reviews:
        return _by_judge(predictions, benchmark, reviews, questions, seed)
    if benchmark.scored is not None:
        return _not_scored(predictions, benchmark, policy, questions)
    if (why := benchmark.lacks(predictions, policy)) is not None:
        return _not_scored(predictions, benchmark, policy, questions) | {"why": why}
    rows = score_rows(predictions, benchmark, policy)
    if not partial:
        benchmark.check_groups(rows)
    splits: dict[str, list[Row]] = {}
    for row in rows:
        if (name := benchmark.split(row.prediction)) is not None:
            splits.setdefault(name, []).append(row)
    measured = _yes_no_figures(rows, seed)
    result = {
        "benchmark": benchmark.name,
        "policy": policy,
        "scored": True,
        "headline": benchmark.headline,
        "asked": len(rows) if questions is None else questions,
        "partial": questions is not None and questions > len(rows),
        **_figures(rows, benchmark, measured),
        "splits": {
            name: _figures(members, benchmark, _yes_no_figures(members, seed, YES_NO_KEYS))
            for name, members in splits.items()
        },
        "policies": {other: _short(predictions, benchmark, other, rows, policy) for other in POLICIES},
        "note": benchmark.note,
    }
    if measured:
        yes_no_rows = [row for row in rows if row.gold in ("yes", "no")]
        gold, said, _ = _columns(yes_no_rows)
        logits = logit_view.logit_view([row.prediction for row in yes_no_rows], gold, seed)
        result["yes_bias"] = {**yes_no.yes_bias(gold, said, measured), "logits": logits}
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


def _yes_no_figures(rows: Sequence[Row], seed: int, only: Sequence[str] | None = None) -> Mapping[str, Figure]:
    """Return the figures of the questions whose truth is yes or no; none if there are none."""
    yes_no_rows = [row for row in rows if row.gold in ("yes", "no")]
    return yes_no.figures_of(*_columns(yes_no_rows), seed=seed, only=only) if yes_no_rows else {}


def _figures(rows: Sequence[Row], benchmark: Benchmark, measured: Mapping[str, Figure]) -> dict[str, Any]:
    """Return the common figures, those of yes and no among them, and the benchmark's own."""
    figures = {name: measured.get(name, NONE) for name in YES_NO_KEYS}
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
    """Return what one policy makes of the answers, in four figures without intervals; null ones if it cannot."""
    if (why := benchmark.lacks(predictions, policy)) is not None:
        return {**dict.fromkeys(("accuracy", "yes_rate", "unparsed_rate", "guessed")), "why": why}
    if policy == known:
        readings, right = [row.reading for row in rows], [row.right for row in rows]
    else:
        readings = [benchmark.read_answer(row.prediction, policy) for row in rows]
        judged = zip(rows, readings, strict=True)
        right = [benchmark.right(row.prediction, row.gold, reading) for row, reading in judged]
    said = [reading.value for row, reading in zip(rows, readings, strict=True) if row.gold in ("yes", "no")]
    return {
        "accuracy": sum(right) / len(rows),
        "yes_rate": said.count("yes") / len(said) if said else None,
        "unparsed_rate": sum(reading.unparsed for reading in readings) / len(rows),
        "guessed": sum(reading.guessed for reading in readings),
    }


def _by_judge(
    predictions: Sequence[Prediction], benchmark: Benchmark, reviews: Mapping[str, Review], questions: int | None,
    seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Return the score of a benchmark whose answers a judge has reviewed."""
    rows = score_judged.judgements(predictions, benchmark, reviews)
    asked = len(predictions) if questions is None else questions
    judge = score_judged.judge_of(rows, reviews)
    problems = score_judged.problems_of(rows, reviews)
    if sum(problems.values()) == len(rows):
        why = f"none of {len(rows):,} reviews by {judge['name']} gives a verdict: {next(iter(problems))}"
        none = _not_scored(predictions, benchmark, "judge", asked, why)
        return none | {"unparsed_rate": 1.0, "judge": judge, "problems": problems}
    splits: dict[str, list[score_judged.Judgement]] = {}
    for row in rows:
        if (name := benchmark.split(row[0])) is not None:
            splits.setdefault(name, []).append(row)

    def figures(members: Sequence[score_judged.Judgement]) -> dict[str, Any]:
        return score_judged.figures_of(members, benchmark, seed, YES_NO_KEYS)

    return {
        "benchmark": benchmark.name,
        "policy": "judge",
        "judge": judge,
        "scored": True,
        "headline": benchmark.headline,
        "asked": asked,
        "partial": asked > len(rows),
        **figures(rows),
        "problems": problems,
        "splits": {name: figures(members) for name, members in splits.items()},
        "note": benchmark.note,
    }


def _columns(rows: Sequence[Row]) -> tuple[list[str], list[str | None], list[str]]:
    """Return truth, answer and picture of each row."""
    gold = [str(row.gold) for row in rows]
    return gold, [row.reading.value for row in rows], [row.prediction.image for row in rows]


def _not_scored(
    predictions: Sequence[Prediction], benchmark: Benchmark, policy: str, questions: int | None, why: str | None = None
) -> dict[str, Any]:
    if why is None:
        why = benchmark.scored
        if benchmark.judged is not None and not any(map(reference, predictions)):
            why = benchmark.judged.no_reference or why
    names = ("accuracy", *YES_NO_KEYS, "unparsed_rate")
    return {
        "benchmark": benchmark.name, "policy": policy, "scored": False, "why": why,
        "questions": len(predictions), "asked": len(predictions) if questions is None else questions,
        **dict.fromkeys(names), "figures": {}, "splits": {},
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
