"""``evaluation.json``: whose answers a result folder holds, how they were generated, and to which questions."""

import contextlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vapr.errors import UserError
from vapr.evaluation.benchmarks.benchmark import Benchmark
from vapr.evaluation.generation.journal import questions_hash
from vapr.evaluation.generation.settings import MAY_CHANGE
from vapr.evaluation.scoring.prediction import Question

NAME = "evaluation.json"


@dataclass(frozen=True, slots=True)
class AskedSet:
    """A benchmark's questions that are asked: all of them, or a sample."""

    benchmark: Benchmark
    given: str  # NAME=PATH, as the user gave it
    questions: Sequence[Question]
    of: int  # questions the benchmark has

    def as_dict(self) -> dict[str, Any]:
        """Return what evaluation.json holds of it."""
        return {
            "given": self.given,
            "asked": len(self.questions),
            "of": self.of,
            "sha256": questions_hash(self.questions),
        }


def describe(
    given: str, identity: Mapping[str, Any], settings: Mapping[str, Any], sets: Sequence[AskedSet]
) -> dict[str, Any]:
    """Return what evaluation.json says of a model's answers to some benchmarks."""
    versions: dict[str, str | None] = {}
    for name in ("vapr", "torch", "transformers", "peft", "vllm", "pillow", "torchvision"):
        versions[name] = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    on_gpu = torch.cuda.is_available()
    return {
        "model": {"given": given, **identity},
        "settings": dict(settings),
        "questions": {one.benchmark.name: one.as_dict() for one in sets},
        "versions": versions,
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
    }


def open_record(folder: Path, record: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the folder's record with what is to be added to it, and lines on what changed since it was made.

    Raises:
        UserError: if the folder holds answers of another model, of other settings, or to other questions.
    """
    path = folder / NAME
    if not path.is_file():
        held = [file.name for file in folder.glob("predictions*.jsonl")]
        if held:
            raise UserError(f"--out: {folder} holds {held[0]} but no {NAME} says whose it is; give another folder")
        return dict(record), []
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        difference = _difference(before, record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: cannot be read; delete the folder, or give another --out") from None
    if difference:
        raise UserError(f"--out: {folder} holds answers of {difference}; give another folder")
    notes = [
        f"{name} was {before['settings'][name]} and is {record['settings'][name]} now; answers between two equally "
        "likely tokens may differ from those of an unbroken run"
        for name in MAY_CHANGE
        if before["settings"].get(name) != record["settings"].get(name)
    ]
    for name, version in record["versions"].items():
        if (old := before["versions"].get(name)) != version:
            notes.append(f"{folder} was begun with {name} {old}; it goes on with {version}")
    return {**record, "questions": {**before["questions"], **record["questions"]}}, notes


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return what the folder holds that is not what is asked for now, in words."""
    was, is_now = ({k: v for k, v in one["model"].items() if k != "given"} for one in (before, now))
    if was != is_now:
        given = before["model"]["given"]
        same = given == now["model"]["given"]
        return f"{given} with other weights or files than it has now" if same else f"another model, {given}"
    for name, value in now["settings"].items():
        if name not in MAY_CHANGE and before["settings"].get(name) != value:
            return f"{name} {before['settings'].get(name)}, not {value}"
    for name, asked in now["questions"].items():
        known = before["questions"].get(name)
        if known is not None and known["sha256"] != asked["sha256"]:
            return f"other questions of {name} ({known['asked']:,} of {known['given']})"
    return None
