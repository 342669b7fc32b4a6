"""Measured rates of whole training steps, from bench/results: none is ever made up."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vapr
from vapr.errors import UserError
from vapr.plan.gpus import Gpu, find_gpu

RESULTS = Path(vapr.__file__).resolve().parent.parent / "bench" / "results" / "train_step.jsonl"
CACHED, ONLINE = "vapr shared cached", "vapr shared online"
"""Arms of the benchmark: reference log-probs in the cache, or computed in the step."""


@dataclass(frozen=True, slots=True)
class Rate:
    """Useful FLOP/s of a measured step, and where it was measured."""

    flops_per_second: float
    row: dict[str, Any]

    def describe(self) -> str:
        row = self.row
        return (
            f"{row['useful_tflops']:.0f} useful TFLOP/s: {row['model']}, {row['workload']}, {row['tuning']}, "
            f"'{row['arm']}', {row['tokens']:,} tokens a step on {row['device']}, commit {row['commit']}, "
            f"{row['time'][:10]}, run {row['run']} of bench/results/{RESULTS.name}"
        )


def find_rate(gpu: Gpu | None, family: str, tuning: str, arm: str, tokens: float) -> Rate | None:
    """Return the measured rate that is nearest to a run: of this GPU and tuning (``lora``, ``full``), the newest, of a
    step of about so many tokens.

    Rows of another model serve, because the rate is in FLOP/s; those whose name begins as its family's come first.
    None: nothing was measured on such a GPU, or there are no results here.
    """
    if gpu is None:
        return None
    rows = [row for row in _rows() if row.get("arm") == arm and _is(gpu, row["device"]) and row.get("useful_tflops")]
    rows = [row for row in rows if row.get("dtype") == "bfloat16" and row["tuning"].startswith(tuning)]
    if not rows:
        return None
    newest = max(row["time"][:10] for row in rows)

    def distance(row: dict[str, Any]) -> tuple[int, float, str]:
        both = zip(_letters(family), _letters(row["model"]), strict=False)
        alike = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], both)))
        return -alike, abs(row["tokens"] - tokens), "".join(chr(255 - ord(c)) for c in row["time"])

    row = min((row for row in rows if row["time"][:10] == newest), key=distance)
    return Rate(row["useful_tflops"] * 1e12, row)


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name))


def _is(gpu: Gpu, device: str) -> bool:
    try:
        return find_gpu(device).name == gpu.name or device == gpu.name
    except UserError:
        return False


def _rows() -> list[dict[str, Any]]:
    try:
        lines = RESULTS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [json.loads(line) for line in lines if line.strip()]
