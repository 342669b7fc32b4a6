"""Stored reviews, vapr's own and those of a benchmark's authors, and which of them are of the answers at hand."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from vapr.errors import UserError
from vapr.evaluation.benchmarks.benchmark import Benchmark, Judged
from vapr.evaluation.scoring.prediction import Prediction, read_json_lines
from vapr.evaluation.scoring.review import Review, read_reviews


def reviews_file(answers: Path) -> Path:
    """Return where the reviews of a file of answers, or of a result folder, are kept: beside the answers.

    Those of ``predictions.jsonl`` are in ``reviews.jsonl``, of ``predictions.blind.jsonl`` in ``reviews.blind.jsonl``,
    and of any other ``NAME.jsonl`` in ``NAME.reviews.jsonl``.
    """
    if answers.is_dir():
        return answers / "reviews.jsonl"
    if answers.name.startswith("predictions."):
        return answers.with_name(answers.name.replace("predictions.", "reviews.", 1))
    return answers.with_name(f"{answers.stem}.reviews.jsonl")


def judged_by(benchmark: Benchmark) -> Judged:
    """Return how a judge scores the benchmark.

    Raises:
        UserError: if no judge does.
    """
    if benchmark.judged is None:
        raise UserError(f"{benchmark.name}: {benchmark.title} is scored by rules; leave --judge and --reviews out")
    return benchmark.judged


def is_own(file: Path) -> bool:
    """Return whether this is vapr's ``reviews.jsonl``; an empty file is."""
    first = next((row for _, row in read_json_lines(file)), None)
    return first is None or {"benchmark", "judge"} <= first.keys()


def open_reviews(file: Path, benchmark: Benchmark) -> list[Review]:
    """Read the reviews of a benchmark's answers.

    Raises:
        UserError: for a file in no known layout, or an answer that was reviewed twice.
    """
    judged = judged_by(benchmark)
    if is_own(file):
        return [review for review in read_reviews(file) if review.benchmark == benchmark.name]
    if judged.read_reviews is None:
        raise UserError(f"{file}: no reviews.jsonl of vapr, whose lines have benchmark, id, judge and review")
    reviews = judged.read_reviews(file)
    twice = [name for name, count in Counter(review.id for review in reviews).items() if count > 1]
    if twice:
        raise UserError(f"{file}: two reviews of '{twice[0]}'; keep one of them")
    return reviews


def asked(prompt: str) -> str:
    """Return the sha256 of what a judge is asked."""
    return hashlib.sha256(prompt.encode(errors="backslashreplace")).hexdigest()


def is_of(review: Review, prediction: Prediction, judged: Judged) -> bool:
    """Return whether a review is of this very answer, as far as it says of which it is."""
    if review.asked is not None:
        return review.asked == asked(judged.prompt(prediction))
    return review.answer_id in (None, prediction.meta.get("answer_id", review.answer_id))


def match(
    reviews: Sequence[Review], predictions: Sequence[Prediction], benchmark: Benchmark, where: str, *, partial: bool
) -> tuple[dict[str, Review], list[str]]:
    """Return the review of each answer by its id, and lines on those left out.

    Raises:
        UserError: if an answer has no review unless ``partial``, if none has, or if two judges wrote the reviews.
    """
    judged = judged_by(benchmark)
    by_id = {review.id: review for review in reviews}
    found, missing, other = {}, [], []
    for prediction in predictions:
        review = by_id.pop(prediction.id, None)
        if review is None:
            missing.append(prediction.id)
        elif is_of(review, prediction, judged):
            found[prediction.id] = review
        else:
            other.append(prediction.id)
    counts = f"{len(found):,} of {len(predictions):,} answers have a review"
    if other:
        counts += f", {len(other):,} ('{other[0]}') one of another answer or another prompt"
    if missing:
        counts += f", {len(missing):,} ('{missing[0]}') none"
    if not found or ((missing or other) and not partial):
        way = ", or score what is there with --partial" if found else ""
        raise UserError(f"{where}: {counts}; have the rest judged with --judge{way}")
    judges = Counter(review.judge for review in found.values())
    if len(judges) > 1:
        names = ", ".join(f"{name} ({count:,})" for name, count in judges.items())
        raise UserError(f"{where}: reviews of several judges make no figure: {names}; finish with one: --judge")
    notes = [f"partial: {counts}"] if missing or other else []
    if by_id:
        notes.append(f"{where}: {len(by_id):,} reviews are of questions without an answer here")
    return found, notes
