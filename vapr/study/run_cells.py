"""Train the cells of a study one after the other, each in a process of its own, so that each begins with a free GPU."""

import contextlib
import ctypes
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vapr.interrupts import stopped_at_once
from vapr.progress import Display
from vapr.study.grid import Cell

SECONDS_BETWEEN_LOOKS = 1.0
"""At a run's metrics, for the progress."""

Failures = dict[str, str]
"""Why a run failed, by the name of its cell."""

LIBC = ctypes.CDLL(None)


class Training:
    """``vapr train`` of one cell in a process; its output goes to ``<run_dir>.log``."""

    def __init__(self, cell: Cell) -> None:
        self._log = cell.run_dir.with_suffix(".log")
        config = cell.write_config()
        cell.run_dir.parent.mkdir(parents=True, exist_ok=True)
        begun = ["--resume"] if cell.run_dir.is_dir() else []
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vapr.cli", "train", str(config), *begun],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, preexec_fn=_end_with_parent,
            )  # fmt: skip

    def wait(self, look: Callable[[], None]) -> str | None:
        """Wait for the end, looking at the progress now and then; return why it failed, None if it did not."""
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self._process.wait(SECONDS_BETWEEN_LOOKS)
                return None if status == 0 else self._last_words(status)
            look()

    def stop(self) -> None:
        """Let the run write a checkpoint and end."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait()

    def _last_words(self, status: int) -> str:
        try:
            lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            lines = [str(error)]
        said = [line for line in lines if line.startswith(("Error: ", "Stopped: "))]
        last = said[-1].partition(": ")[2] if said else (lines or ["it said nothing"])[-1]
        return f"{last[:300]} (exit status {status}; {self._log})"


def _end_with_parent() -> None:
    """End this process when the study is killed: two must never train one cell."""
    LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def train_cells(cells: Sequence[Cell], start: Callable[[Cell], Any] = Training) -> Failures:
    """Train what is not trained yet. A run that fails is told in one line, and the others go on.

    Args:
        cells: all of them.
        start: begins the training of a cell; what it returns has ``wait`` and ``stop`` of :class:`Training`.

    Raises:
        Stopped: after a signal; the run in hand has written a checkpoint.
    """
    left = [cell for cell in cells if not cell.is_done]
    failed: Failures = {}
    total, done = sum(cell.num_steps for cell in cells), sum(cell.steps_done for cell in cells)

    def kept() -> str:
        trained = sum(cell.is_done for cell in cells)
        return f"{trained:,} of {len(cells):,} runs are trained; the same command goes on from there"

    with stopped_at_once(kept), Display("train", total, done) as display:
        for number, cell in enumerate(left, start=len(cells) - len(left) + 1):
            display.note(f"run {number} of {len(cells)}: {cell.name}")
            counted = cell.steps_done

            def look(cell: Cell = cell, number: int = number) -> None:
                nonlocal counted
                steps = cell.steps_done
                if steps > counted:
                    display.advance(f"run {number} of {len(cells)}: {cell.name}, step {steps}", steps - counted)
                    counted = steps

            with _training(start, cell) as training:
                problem = training.wait(look)
            if problem is None and not cell.is_done:
                problem = f"it ended without a model in {cell.run_dir / 'final'}"
            if problem is not None:
                failed[cell.run_dir.name] = problem
                display.say(f"failed     {cell.name}: {problem}")
            else:
                display.say(f"trained    {cell.name}: {cell.run_dir}")
            look()
    return failed


@contextlib.contextmanager
def _training(start: Callable[[Cell], Any], cell: Cell) -> Iterator[Any]:
    training = start(cell)
    try:
        yield training
    finally:
        training.stop()


def seconds_a_pair(cells: Sequence[Cell]) -> float | None:
    """Return how long the trained runs took for a pair, without their start; None if nothing is known yet."""
    pairs = seconds = 0.0
    for cell in cells:
        path = cell.run_dir / "metrics.jsonl"
        with contextlib.suppress(OSError, ValueError):
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                if row.get("pairs_per_second"):
                    pairs += row["pairs"]
                    seconds += row["pairs"] / row["pairs_per_second"]
    return seconds / pairs if pairs else None
