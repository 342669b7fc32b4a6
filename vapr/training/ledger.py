"""The ledger of a run: which rows each step trained on, so that anybody can check that none was lost or seen twice."""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vapr.batches.loader import PairLoader
from vapr.training.ranks import Ranks

NAME = "consumed.jsonl"


class Ledger:
    """Appends a line for each step to ``consumed.jsonl``: ``{"step", "rows", "ids", "skipped"}``.

    Rows are numbers in the data, from 0, over all files of ``data.train``; a skipped row has no id, as it may have
    none that can be read.

    Args:
        run_dir: the run's folder.
        resume_step: what was written of later steps is cut off, because they are taken again; None begins a new ledger.
        ranks: the processes that train together, of which the first writes what all of them took.
    """

    def __init__(self, run_dir: Path, resume_step: int | None, ranks: Ranks) -> None:
        path, self._ranks = run_dir / NAME, ranks
        if not ranks.is_first:
            path = Path(os.devnull)
        elif path.exists():
            os.truncate(path, 0 if resume_step is None else _end_of_step(path, resume_step))
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, pairs: Sequence[tuple[int, str]], members: np.ndarray) -> None:
        """Append what a step, counted from 1, trained on; every rank gives its pairs, as (row number, id).

        ``members`` are the rows that the order gave the step, (rows,) int64.
        """
        everyone = self._ranks.gather_objects(list(pairs))
        taken = [number for part in everyone for number, _ in part]
        entry: dict[str, Any] = {"step": step, "rows": taken, "ids": [id for part in everyone for _, id in part]}
        if skipped := sorted((Counter(members.tolist()) - Counter(taken)).elements()):
            entry["skipped"] = skipped
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Write the lines through to the disk, before the checkpoint of their step is."""
        if self._ranks.is_first:
            os.fsync(self._file.fileno())

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):  # every line was flushed; a full disk has ended the run already
            self._file.close()


def read_ledger(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a run's ledger; a last line that a killed run left half written is left out."""
    with contextlib.suppress(FileNotFoundError), (run_dir / NAME).open(encoding="utf-8") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def compare_with_order(run_dir: Path, loader: PairLoader, num_steps: int) -> str:
    """Compare the ledger with the order of the data, step by step, and say in a line what was found.

    An epoch's order holds every row as often as its set's weight says, so a step that holds other rows than the order
    gives it has lost one or taken one twice.
    """
    num_pairs = num_skipped = 0
    wrong: list[int] = []
    expected = 1
    for entry in read_ledger(run_dir):
        step, skipped = entry["step"], entry.get("skipped", [])
        wrong += range(expected, step)  # missing lines
        if step < expected or sorted([*entry["rows"], *skipped]) != sorted(loader.members(step - 1).tolist()):
            wrong.append(step)
        expected = max(expected, step + 1)
        num_pairs += len(entry["rows"])
        num_skipped += len(skipped)
    wrong += range(expected, num_steps + 1)
    if wrong:
        return (
            f"warning: in {len(wrong):,} of {num_steps:,} steps, the first {wrong[0]:,}, the pairs of {run_dir / NAME} "
            "are not those that the order of the data gives them"
        )
    skipped_too = f" and skipped {num_skipped:,} rows" if num_skipped else ""
    epochs = num_steps / loader.steps_per_epoch
    return f"{num_steps:,} steps took {num_pairs:,} pairs{skipped_too}, {epochs:.3g} epochs, none lost and none twice"


def _end_of_step(path: Path, step: int) -> int:
    """Return the byte of the ledger where the line of ``step`` ends."""
    end = 0
    with path.open("rb") as file:
        for line in file:
            try:
                if json.loads(line)["step"] > step or not line.endswith(b"\n"):
                    break
            except (ValueError, KeyError, TypeError):
                break
            end += len(line)
    return end
