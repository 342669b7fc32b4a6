"""Questions of a benchmark, and what a model answered: the rows of ``predictions.jsonl``."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vapr.cache import written_whole
from vapr.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question of a benchmark.

    ``question`` is what the model is asked, with ``<image>`` where a picture stands; without such marks the pictures
    come first. ``answer`` is None where the truth is withheld. ``meta`` may hold ``split``, ``image`` (the picture's
    name, by which intervals are clustered), ``options`` (the choices, of which A is the first), ``category``, and
    whatever the benchmark's own figures need.
    """

    benchmark: str
    id: str
    question: str
    answer: Any
    meta: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[Path | bytes, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A model's answer to a question: one line of ``predictions.jsonl``."""

    benchmark: str
    id: str
    question: str
    prediction: str
    answer: Any
    meta: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(question: Question, text: str, **more: Any) -> "Prediction":
        """Return the answer ``text`` to a question; ``more`` goes into its ``meta``."""
        return Prediction(
            benchmark=question.benchmark, id=question.id, question=question.question, prediction=text,
            answer=question.answer, meta={**question.meta, **more},
        )  # fmt: skip

    @property
    def image(self) -> str:
        """Return the name of the picture asked about; the question's own id if none is named."""
        get = self.meta.get
        for name in (get("image"), get("image_id"), get("image_source")):
            if name is not None and name != "":
                return name if type(name) is str else str(name)
        return f"question {self.id}"

    @property
    def split(self) -> str | None:
        """Return the part of the benchmark that the question belongs to."""
        for key in ("split", "category"):
            if (name := self.meta.get(key)) not in (None, ""):
                return str(name)
        return None

    def as_json(self) -> str:
        """Return the line of ``predictions.jsonl``, without the line break."""
        keys = ("benchmark", "id", "question", "prediction", "answer", "meta")
        return json.dumps({key: getattr(self, key) for key in keys}, ensure_ascii=False)


def read_predictions(path: Path) -> list[Prediction]:
    """Read ``predictions.jsonl``, or that of a result folder.

    Raises:
        UserError: naming the line that is cut short, lacks a key, holds another type or repeats a question.
    """
    if path.is_dir():
        path = path / "predictions.jsonl"
    predictions = [_prediction(row, f"{path}:{number}") for number, row in read_json_lines(path)]
    check_ids(predictions, path)
    return predictions


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Write ``predictions.jsonl``, whole or not at all."""
    with written_whole(path) as file:
        for prediction in predictions:
            file.write(f"{prediction.as_json()}\n".encode(errors="backslashreplace"))


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number of each line, from 1, and the object in it; empty lines are passed over.

    Raises:
        UserError: for a file that cannot be read or a line that is no JSON object.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    cut = "" if line.endswith(b"\n") else "; the file's last line is cut short"
                    raise UserError(
                        f"{path}:{number}: not a line of JSON{cut}; write it again or take it out"
                    ) from None
                if not isinstance(row, dict):
                    raise UserError(f"{path}:{number}: a JSON {type(row).__name__}, not an object with keys")
                yield number, row
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def check_ids(items: Sequence[Prediction] | Sequence[Question], path: Path) -> None:
    """Refuse a benchmark's question that stands twice.

    Raises:
        UserError: naming the id.
    """
    seen = set()
    for item in items:
        if (key := (item.benchmark, item.id)) in seen:
            raise UserError(f"{path}: question '{item.id}' of {item.benchmark} stands twice; keep one of the two")
        seen.add(key)


def _prediction(row: dict[str, Any], where: str) -> Prediction:
    needed = ("benchmark", "id", "prediction", "answer")
    if missing := [key for key in needed if key not in row]:
        has = ", ".join(map(repr, list(row)[:8])) or "nothing"
        raise UserError(
            f"{where}: no '{missing[0]}' (it has {has}); a prediction has benchmark, id, question, prediction and "
            "answer. For files of other tools give the questions, too: --bench NAME=PATH"
        )
    if not isinstance(row["id"], str | int) or row["id"] == "":
        raise UserError(f"{where}: 'id' is {json.dumps(row['id'])[:40]}, neither a text nor a whole number")
    if not isinstance(row["prediction"], str):
        raise UserError(f"{where}: 'prediction' is {json.dumps(row['prediction'])[:40]}, not a text")
    meta = row.get("meta") or {}
    if not isinstance(meta, dict):
        raise UserError(f"{where}: 'meta' is {json.dumps(meta)[:40]}, not an object")
    return Prediction(
        benchmark=str(row["benchmark"]), id=str(row["id"]), question=str(row.get("question") or ""),
        prediction=row["prediction"], answer=row["answer"], meta=meta,
    )  # fmt: skip
