"""Runs that break off, and what a run left behind, as tests look at it."""

import json
from pathlib import Path

import pytest

from vapr.config import Config
from vapr.training import trainer


def metrics(config: Config) -> list[dict]:
    return [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]


def losses(config: Config) -> list[float]:
    return [entry["loss"] for entry in metrics(config) if "loss" in entry]


def final_bytes(config: Config) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (Path(config.run_dir) / "final").glob("*.safetensors")}


class Crash(Exception):
    """Ends a run from outside."""


def train_until_crash(config: Config, before_update: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, and break off right before an update."""
    real_step = trainer.Engine.step

    def crashing_step(engine: trainer.Engine) -> None:
        if engine.num_updates + 1 == before_update:
            raise Crash
        real_step(engine)

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(trainer.Engine, "step", crashing_step)
        trainer.train(config)
