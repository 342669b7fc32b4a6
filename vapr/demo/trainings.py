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
    """One run of ``vapr train``; its config is ``NAME.yaml`` beside its folder, its log ``NAME.log``."""

    name: str
    run: Path
    model: Path
    data: Path
    loss: dict[str, Any]
    lr: float
    num_pairs: int
    pairs_per_step: int
    shuffle: bool = True

    @property
    def final(self) -> Path:
        """Return the folder of the trained model."""
        return self.run / "final"

    @property
    def num_steps(self) -> int:
        return -(-self.num_pairs // self.pairs_per_step)


def write_config(out: Path, training: Training, seed: int) -> Path:
    """Write the config of a training as YAML, with which ``vapr train`` repeats it."""
    config = {
        "run_dir": str(training.run),
        "seed": seed,
        "policy": {
            "model": str(training.model),
            "dtype": "float32",
            # The tower stays as it is, as LLaVA's does. Trained along, it forgets where in the picture a thing is.
            "train": {"language_model": True, "projector": True, "vision_tower": False},
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


class Trainings:
    """Runs trainings in the order in which they are given, each as soon as a place is free.

    Leaving the context ends those that still run, at once: nothing of them is continued.

    Args:
        out: the demo's folder.
        seed: of the runs.
        at_a_time: processes that run side by side.

    Attributes:
        seconds: what each finished training took, by name.
        steps: how many steps of each started training are done, by name.
    """

    def __init__(self, out: Path, seed: int, at_a_time: int) -> None:
        self._out, self._seed, self._at_a_time = out, seed, at_a_time
        self._waiting: list[Training] = []
        self._running: dict[str, _Process] = {}
        self.seconds: dict[str, float] = {}
        self.steps: dict[str, int] = {}

    def __enter__(self) -> "Trainings":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._running.values():
            process.end()

    def start(self, trainings: Sequence[Training]) -> None:
        """Put trainings at the end of the queue, and start what has a place."""
        self._waiting += trainings
        self.look()

    def wait(self, watch: Callable[[dict[str, int]], None]) -> None:
        """Wait until all are finished.

        Args:
            watch: told a few times a second how many steps of each started training are done.

        Raises:
            UserError: if one of them fails.
        """
        while self._waiting or self._running:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            self.look()
            watch(self.steps)

    def look(self) -> dict[str, int]:
        """See what has ended, start what has a place, and return the steps done."""
        for name, process in list(self._running.items()):
            ended = process.ended()  # before the steps are counted, so that none is missed
            self.steps[name] = process.steps_done()
            if ended:
                self.seconds[name] = process.seconds
                del self._running[name]
        while self._waiting and len(self._running) < self._at_a_time:
            training = self._waiting.pop(0)
            self._running[training.name] = _Process(self._out, training, write_config(self._out, training, self._seed))
        return self.steps


class _Process:
    """A ``vapr train`` that runs."""

    def __init__(self, out: Path, training: Training, config: Path) -> None:
        self._training, self._log = training, out / f"{training.name}.log"
        self._metrics = training.run / "metrics.jsonl"
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
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)  # its data worker, too
        self._process.wait()
