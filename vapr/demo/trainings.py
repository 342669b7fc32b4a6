"""Trainings of the demo: ``vapr train`` in processes of their own, one thread each, as many at a time as told."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vapr.errors import UserError

SECONDS_BETWEEN_LOOKS = 0.3


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """One run of ``vapr train``; its folder is ``NAME-run``, its config ``NAME.yaml``, its log ``NAME.log``."""

    name: str
    model: Path
    data: Path
    loss: dict[str, Any]
    lr: float
    num_pairs: int
    pairs_per_step: int
    shuffle: bool = True

    @property
    def num_steps(self) -> int:
        return -(-self.num_pairs // self.pairs_per_step)


def write_config(out: Path, training: Training, seed: int) -> Path:
    """Write the config of a training as YAML, with which ``vapr train`` repeats it."""
    config = {
        "run_dir": str(out / f"{training.name}-run"),
        "seed": seed,
        "policy": {
            "model": str(training.model),
            "dtype": "float32",
            "train": {"language_model": True, "projector": True, "vision_tower": True},
        },
        "data": {"train": str(training.data), "shuffle": training.shuffle},
        "loss": training.loss,
        "packing": {"share": "image"},
        "optim": {
            "lr": training.lr,
            "schedule": "linear",
            "warmup_ratio": 0.03,
            # The gradients of the first steps are large; the usual 0.999 would remember them for most of the run.
            "betas": [0.9, 0.98],
            "pairs_per_step": training.pairs_per_step,
        },
        "reference": {"cache_dir": str(out / "reference-cache")},
        "checkpoint": {"every": 1000, "keep": 1},
    }
    path = out / f"{training.name}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def train_all(
    out: Path, trainings: Sequence[Training], seed: int, watch: Callable[[dict[str, int]], None], *, at_a_time: int = 2
) -> dict[str, float]:
    """Run trainings, the next one as soon as a place is free; return the seconds of each by name.

    Args:
        out: the demo's folder.
        trainings: in the order in which they start.
        seed: of the runs.
        watch: told a few times a second how many steps of each started training are done.
        at_a_time: processes that run side by side.

    Raises:
        UserError: if one of them fails; the others are ended.
    """
    waiting, running = list(trainings), dict[str, _Process]()
    seconds: dict[str, float] = {}
    done: dict[str, int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_a_time:
                training = waiting.pop(0)
                running[training.name] = _Process(out, training, write_config(out, training, seed))
            for name, process in list(running.items()):
                done[name] = process.steps_done()
                if process.ended():
                    seconds[name] = process.seconds
                    del running[name]
            watch(dict(done))
            time.sleep(SECONDS_BETWEEN_LOOKS)
    finally:
        for process in running.values():
            process.end()
    return seconds


class _Process:
    """A ``vapr train`` that runs."""

    def __init__(self, out: Path, training: Training, config: Path) -> None:
        self._training, self._log = training, out / f"{training.name}.log"
        self._metrics = out / f"{training.name}-run" / "metrics.jsonl"
        self._read, self._steps = 0, 0
        self._began = time.monotonic()
        # Matrices this small gain nothing from a second thread, and two processes would wait for each other's.
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vapr.cli", "train", str(config)],
                stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def steps_done(self) -> int:
        """Count the lines that the metrics have so far."""
        if self._metrics.exists():
            with self._metrics.open("rb") as file:
                file.seek(self._read)
                new = file.read()
            self._read += len(new)
            self._steps += new.count(b"\n")
        return self._steps

    def ended(self) -> bool:
        """Tell whether the run is finished. Raises UserError if it failed."""
        code = self._process.poll()
        if code:
            lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing"]
            raise UserError(f"{self._training.name}: vapr train ended with exit code {code} and said: {lines[-1]}; "
                            f"all it said is in {self._log}")  # fmt: skip
        return code == 0

    def end(self) -> None:
        """End a process that is not needed any more, at once: nothing of it is continued."""
        os.killpg(self._process.pid, signal.SIGKILL)  # its data worker, too
        self._process.wait()
