"""Read result folders: what one model answered in each, benchmark by benchmark."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vapr.errors import UserError
from vapr.evaluation.scoring.prediction import Prediction, read_predictions
from vapr.folder_names import names_of

ANSWERS, BLIND = "predictions.jsonl", "predictions.blind.jsonl"
UNFINISHED = ("predictions.partial.jsonl", "predictions.blind.partial.jsonl")


class SetName(NamedTuple):
    """A benchmark, with its pictures or without."""

    benchmark: str
    blind: bool

    def __str__(self) -> str:
        return f"{self.benchmark} (blind)" if self.blind else self.benchmark


@dataclass(frozen=True)
class ResultFolder:
    """What one model answered.

    Attributes:
        name: the folder's, or its whole path where two have the same.
        path: as it was given.
        sets: predictions by id, by benchmark with pictures and without.
        about: ``evaluation.json``; empty if there is none.
        scores: ``scores.json``; empty if there is none.
        unfinished: files with answers of a run that has not ended.
    """

    name: str
    path: Path
    sets: Mapping[SetName, Mapping[str, Prediction]]
    about: Mapping[str, Any]
    scores: Mapping[str, Any]
    unfinished: Sequence[str] = ()

    @property
    def model(self) -> str:
        """Return the model as it was given to vapr eval; empty if that is not known."""
        return str(_part(self.about, "model").get("given") or "")

    @property
    def settings(self) -> Mapping[str, Any]:
        """Return how answers were generated; nothing if that is not known."""
        return _part(self.about, "settings")

    def asked(self, benchmark: str) -> Mapping[str, Any]:
        """Return what is known of the questions that were asked; nothing if that is not known."""
        return _part(_part(self.about, "questions"), benchmark)


def read_folders(paths: Sequence[Path]) -> list[ResultFolder]:
    """Read two or more result folders.

    Raises:
        UserError: for a folder that is given twice, is none, or has answers that cannot be read.
    """
    if len(paths) < 2:
        given = f"{paths[0]}: one result folder alone" if paths else "no result folder"
        raise UserError(f"{given}; give two or more: vapr eval --compare A B, where the others are held against A")
    return [_read_folder(path, name) for path, name in zip(paths, names_of(paths, "result folder"), strict=True)]


def _read_folder(path: Path, name: str) -> ResultFolder:
    if not path.is_dir():
        problem = f"a file; give its folder, {path.parent}" if path.is_file() else "no such folder"
        raise UserError(f"{path}: {problem}")
    unfinished = [file for file in UNFINISHED if (path / file).is_file()]
    if unfinished and not (path / ANSWERS).is_file():
        raise UserError(f"{path}: only {unfinished[0]} in it; finish the run with the same vapr eval as before")
    if not (path / ANSWERS).is_file():
        below = ", ".join(sorted(str(file.parent) for file in path.glob(f"*/{ANSWERS}"))[:5])
        way_out = f"give the folders in it: {below}" if below else f"vapr eval MODEL --bench NAME=PATH --out {path}"
        raise UserError(f"{path}: no result folder, it has no {ANSWERS}; {way_out}")
    sets: dict[SetName, dict[str, Prediction]] = {}
    for file, blind in ((ANSWERS, False), (BLIND, True)):
        if blind and not (path / file).exists():
            continue
        predictions = read_predictions(path / file)
        if not predictions:
            raise UserError(f"{path / file}: no answers in it; finish the run with vapr eval")
        for prediction in predictions:
            sets.setdefault(SetName(prediction.benchmark, blind), {})[prediction.id] = prediction
    return ResultFolder(name, path, sets, _object(path / "evaluation.json"), _object(path / "scores.json"), unfinished)


def _part(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = value.get(key)
    return part if isinstance(part, dict) else {}


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; it may be half-written: score the folder again, or take it out")
    return value
