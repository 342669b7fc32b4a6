"""Arms that are whole builds of vapr, each in a process of its own: this tree's, and another commit's.

Both are measured there, so that what else the benchmark's own process holds is the same for both: nothing.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from bench.record import Timing
from bench.workloads import Subject
from vapr.model.policy import Policy

DRIVER = Path(__file__).with_name("commit_arm.py")


class BuildFailed(RuntimeError):
    """What another build could not do, in one line."""


class BuildProcess:
    """A process that runs ``bench/commit_arm.py`` on the tree of one commit.

    Args:
        name: of the build, in messages.
        tree: its files.
        folder: for its model folders, caches and log; created.
        threads: as many as this process has.
    """

    def __init__(self, name: str, tree: Path, folder: Path, threads: int) -> None:
        self.name, self.folder = name, folder
        folder.mkdir()
        self._log = folder / "log.txt"
        environment = {**os.environ, "PYTHONPATH": f"{tree}:{tree / 'kernels'}"}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(DRIVER), str(tree), str(threads)], cwd=tree, env=environment,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip

    def ask(self, do: str, **order: Any) -> dict[str, Any]:
        """Give an order and wait for the answer.

        Raises:
            BuildFailed: if it could not be done.
            torch.OutOfMemoryError: if the device's memory did not suffice.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **order}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            said = self._log.read_text().strip().splitlines()
            raise BuildFailed(f"{self.name} ended during {do}: {said[-1] if said else 'it said nothing'}")
        answer: dict[str, Any] = json.loads(line)
        if answer.get("out_of_memory"):
            raise torch.OutOfMemoryError(f"{self.name}: {do}")
        if "error" in answer:
            raise BuildFailed(f"{self.name}: {do}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


class BuildArm:
    """One case of a build: vapr with the reference from its cache, as :class:`bench.arms.VaprArm` has it.

    Args:
        process: of the build.
        case: any name that no other case of it has.
        subject: its model folder is the build's.
        rows: file of pairs.
        pairs_per_step, share: as of ``VaprArm``.
    """

    def __init__(
        self, process: BuildProcess, case: str, subject: Subject, rows: Path, pairs_per_step: int, share: str
    ) -> None:
        self._process, self._case, self._subject = process, case, subject
        self._about = {"pairs_per_step": pairs_per_step, "share": share}
        self.losses: list[float] = []
        process.ask(
            "open", case=case, shape=dataclasses.asdict(subject.shape), lora=subject.lora, files=str(subject.folder),
            folder=str(process.folder / case), rows=str(rows), device=str(subject.device), **self._about,
        )  # fmt: skip

    def build(self, policy: Policy) -> None:
        """Build the build's policy with the trained weights of ``policy``."""
        weights = {name: value.detach().contiguous() for name, value in policy.trained_parameters().items()}
        file = self._process.folder / f"{self._case}-weights.safetensors"
        safetensors.torch.save_file(weights, file)
        self._process.ask("build", case=self._case, weights=str(file), **self._about)

    def first_step(self) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients of the first step, which makes no update."""
        file = self._process.folder / f"{self._case}-gradients.safetensors"
        loss = self._process.ask("first_step", gradients=str(file))["loss"]
        return loss, safetensors.torch.load_file(file)

    def start(self, *, prebuilt: bool) -> None:
        """Go back to the first row."""
        self._process.ask("start", prebuilt=prebuilt)

    def __call__(self) -> None:
        self.one_step(Timing(), self._subject.device, None, watch_memory=False)

    def one_step(
        self, timing: Timing, device: torch.device, clock: Callable[..., float] | None, *, watch_memory: bool
    ) -> float:
        """Take a step; return the seconds that the build measured with the host's clock, whatever ``clock`` is."""
        answer = self._process.ask("step", watch=watch_memory)
        self.losses.append(answer["loss"])
        for name in ("step_mib", "peak_mib"):
            if answer[name] is not None:
                setattr(timing, name, max(getattr(timing, name) or 0.0, answer[name]))
        return float(answer["seconds"])

    def close(self) -> None:
        """Let the process drop the case."""
        self._process.ask("close", case=self._case)
