"""What the training process does beside the model: everything of a step but forward, backward and update.

    python -m bench.host_time

A whole ``vapr train`` of a small policy with its reference cached. The main thread's own CPU time is counted, so that
neither waiting nor a busy machine shows in it; calls of the model, the loss, the backward pass and the optimizer are
taken off. What is left reads and checks the next step, looks values up, copies packs, and writes lines.
"""

import argparse
import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from bench.data_rows import DataFolder
from bench.record import percentiles, record
from vapr.config import Config
from vapr.demo.tiny_policy import build_tiny_policy
from vapr.model import reference
from vapr.training import step, trainer
from vapr.training.engine import Engine
from vapr_kernels import naive

PAIRS_PER_STEP = 16
STEPS_AN_EPOCH = 10
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}

MODEL = (
    (step, "token_logps"), (step, "shared_image_features"), (step, "preference_loss"), (naive, "preference_loss"),
    (reference, "token_logps"), (Engine, "backward"), (Engine, "gradient_norm"), (Engine, "step"),
)  # fmt: skip


class Split:
    """Divides the main thread's time into the model's and what is beside it, step by step."""

    def __init__(self) -> None:
        self._model, self._depth = 0.0, 0
        self.marks: list[tuple[float, float, float]] = []  # after each update: clock, CPU time, of that the model's

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Time the model's calls inside."""
        with contextlib.ExitStack() as patched:
            for owner, name in MODEL:
                call = self._timed(getattr(owner, name), ends_step=(owner, name) == (Engine, "step"))
                patched.enter_context(mock.patch.object(owner, name, call))
            yield

    def _timed(self, call: Callable[..., Any], *, ends_step: bool) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.thread_time()
            self._depth += 1
            try:
                return call(*arguments, **options)
            finally:
                self._depth -= 1
                now = time.thread_time()
                if not self._depth:  # a call inside another is part of that
                    self._model += now - began
                if ends_step:
                    self.marks.append((time.monotonic(), now, self._model))

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4, help="the first computes the reference and is not counted")
    parser.add_argument("--quick", action="store_true", help="record nothing")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        split = Split()
        with split.watching():
            trainer.train(run_config(Path(name), options.epochs))
    fields = figures(split.marks[STEPS_AN_EPOCH:])
    if not options.quick:
        record("host_time", model="small qwen2_5_vl", pairs_per_step=PAIRS_PER_STEP, **fields)
    print(", ".join(f"{key} {value:.3g}" for key, value in fields.items()))


def run_config(folder: Path, epochs: int) -> Config:
    """A run of LoRA on rows with photographs, without a checkpoint before its end."""
    data = DataFolder(folder, PAIRS_PER_STEP * STEPS_AN_EPOCH // 2)
    policy = build_tiny_policy("qwen2_5_vl", folder / "policy", data.words * 20, **SIZES)
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    return Config.parse(
        {
            "run_dir": str(folder / "run"),
            "policy": {"model": str(policy), "dtype": dtype, "lora": {"rank": 16, "alpha": 32}},
            "data": {"train": str(data.write_rows(PAIRS_PER_STEP * STEPS_AN_EPOCH)), "workers": 1},
            "optim": {"pairs_per_step": PAIRS_PER_STEP, "epochs": epochs},
            "packing": {"max_tokens": 4096},
            "reference": {"cache_dir": str(folder / "cache")},
            "checkpoint": {"every": 10**6},
        }
    )


def figures(marks: list[tuple[float, float, float]]) -> dict[str, Any]:
    """Return milliseconds a pair beside the model, and of the model, and the former's share of a step's time."""
    beside, model, shares = [], [], []
    for (clock, cpu, inside), (next_clock, next_cpu, next_inside) in itertools.pairwise(marks):
        beside.append(1e3 * ((next_cpu - cpu) - (next_inside - inside)) / PAIRS_PER_STEP)
        model.append(1e3 * (next_inside - inside) / PAIRS_PER_STEP)
        shares.append((next_cpu - cpu - (next_inside - inside)) / (next_clock - clock))
    p20, p50, p80 = percentiles(beside)
    return {
        "beside_ms_a_pair_p20": p20, "beside_ms_a_pair_p50": p50, "beside_ms_a_pair_p80": p80,
        "model_ms_a_pair_p50": percentiles(model)[1], "share_of_step_p50": percentiles(shares)[1],
        "timed": len(beside),
    }  # fmt: skip


if __name__ == "__main__":
    main()
