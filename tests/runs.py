"""What a run left behind, as tests look at it."""

import json
from pathlib import Path

from vapr.config import Config


def metrics(config: Config) -> list[dict]:
    return [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]


def losses(config: Config) -> list[float]:
    return [entry["loss"] for entry in metrics(config) if "loss" in entry]


def final_bytes(config: Config) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (Path(config.run_dir) / "final").glob("*.safetensors")}
