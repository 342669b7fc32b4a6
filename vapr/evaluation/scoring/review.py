"""What a judge said of an answer: the rows of ``reviews.jsonl``."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vapr.cache import written_whole
from vapr.errors import UserError, reason_kind
from vapr.evaluation.scoring.prediction import read_json_lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Review:
    """A judge's review of one answer; ``review`` is None where none came, and ``problem`` says why.

    ``asked`` is the sha256 of all that the judge was asked, the answer included; None where that is not known.
    ``answer_id`` is what the benchmark's authors call the reviewed answer, if their file says so. What scores the
    review states is read when it is scored.
    """

    benchmark: str
    id: str
    judge: str
    review: str | None
    problem: str | None = None
    asked: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    answer_id: str | None = None

    def as_json(self) -> str:
        """Return the line of ``reviews.jsonl``, without the line break."""
        keys = ("benchmark", "id", "judge", "review", "problem", "asked", "settings")
        return json.dumps({key: getattr(self, key) for key in keys}, ensure_ascii=False)


def read_reviews(path: Path) -> list[Review]:
    """Read ``reviews.jsonl``. Of several reviews of one answer the last counts: it was asked for again.

    Raises:
        UserError: naming the line that is cut short, lacks a key or holds another type.
    """
    reviews = {}
    for number, row in read_json_lines(path):
        review = _review(row, f"{path}:{number}")
        reviews[review.benchmark, review.id] = review
    return list(reviews.values())


def write_reviews(path: Path, reviews: Iterable[Review]) -> None:
    """Write ``reviews.jsonl``, whole or not at all."""
    with written_whole(path) as file:
        for review in reviews:
            file.write(f"{review.as_json()}\n".encode(errors="backslashreplace"))


def count_problems(problems: Iterable[str]) -> dict[str, int]:
    """Count problems by their kind, the most frequent first; each kind is named by its first problem."""
    first: dict[str, str] = {}
    counts = Counter(first.setdefault(reason_kind(problem), problem) for problem in problems)
    return dict(counts.most_common())


def _review(row: dict[str, Any], where: str) -> Review:
    if missing := [key for key in ("benchmark", "id", "judge", "review") if key not in row]:
        has = ", ".join(map(repr, list(row)[:8])) or "nothing"
        raise UserError(f"{where}: no '{missing[0]}' (it has {has}); a review has benchmark, id, judge and review")
    if not isinstance(row["review"], str | None):
        raise UserError(f"{where}: 'review' is {json.dumps(row['review'])[:40]}, neither a text nor null")
    settings = row.get("settings") or {}
    if not isinstance(settings, dict):
        raise UserError(f"{where}: 'settings' is {json.dumps(settings)[:40]}, not an object")
    return Review(
        benchmark=str(row["benchmark"]), id=str(row["id"]), judge=str(row["judge"]), review=row["review"],
        problem=row.get("problem"), asked=row.get("asked"), settings=settings,
    )  # fmt: skip
