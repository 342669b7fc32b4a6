"""What the kernels are meant to reach on a GPU, and whether the newest rows say that they do.

    python -m bench.goals [FOLDER]

A goal is met only if the worst case measured meets it.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.record import REPOSITORY

Row = dict[str, Any]

RECOMPUTING = ("liger", "liger hopper", "trl", "cce exact")
"""Peers that compute the logits again in the backward pass."""

MEMORY_BOUND = ("swiglu", "add_rms_norm", "rotary", "gather_keys_values")


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("OUT") or REPOSITORY / "bench" / "results")
    rows = {name: newest_gpu_run(folder / f"{name}.jsonl") for name in ("linear_logps", *MEMORY_BOUND)}
    table = Table(title="Goals", title_justify="left")
    for column in ("goal", "needed", "measured", "where", ""):
        table.add_column(column)
    for verdict in verdicts(rows):
        table.add_row(*verdict)
    Console(width=max(Console().width, 120), highlight=False).print(table)


def newest_gpu_run(file: Path) -> list[Row]:
    if not file.exists():
        return []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if not row["device"].startswith("CPU")]
    return [row for row in rows if row["run"] == rows[-1]["run"]]


def verdicts(rows: dict[str, list[Row]]) -> list[tuple[str, str, str, str, str]]:
    """(goal, what it needs, what was measured, in which case, met | missed | not measured) of every goal."""
    head = [row for row in rows["linear_logps"] if row["rows"] == 2048]
    no_grad, frozen = ([row for row in ours(head) if row["pass"] == name] for name in ("no-grad", "frozen head"))
    large = [row for row in frozen if row["V"] > 150_000]
    at = ", 2,048 rows"
    found = [
        judge(f"head without gradients{at}: of the matmul rate", no_grad, share, 0.85, "{:.0%}"),
        judge(f"frozen head{at}: of the matmul rate, 4NHV", frozen, share, 0.83, "{:.0%}"),
        judge(f"frozen head{at}: times the fastest peer that recomputes", frozen, speedup_in(head), 1.5, "{:.2f}x"),
        judge(f"frozen head{at}, 152k words: extra MB", large, lambda row: -megabytes(row), -700, "{:.0f}"),
    ]
    return found + [
        judge(f"{name}: of the copy bandwidth", ours(rows[name]), share, 0.85, "{:.0%}") for name in MEMORY_BOUND
    ]


def ours(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["provider"] == "vapr" and "absent" not in row]


def share(row: Row) -> float:
    return row["ceiling_share"]


def megabytes(row: Row) -> float:
    return row["step_mib"] * 2**20 / 1e6


def speedup_in(rows: list[Row]) -> Callable[[Row], float | None]:
    """Seconds of the fastest recomputing peer in the same case over vapr's."""

    def speedup(row: Row) -> float | None:
        same = [other for other in rows if all(other[key] == row[key] for key in ("shape", "rows", "pass"))]
        times = [other["seconds_p50"] for other in same if other["provider"] in RECOMPUTING and "absent" not in other]
        return min(times) / row["seconds_p50"] if times else None

    return speedup


def judge(
    goal: str, rows: list[Row], value: Callable[[Row], float | None], needed: float, form: str
) -> tuple[str, str, str, str, str]:
    """The row with the smallest value decides. A negative ``needed`` is an upper limit of the value's size."""
    sign = "under " if needed < 0 else ""
    wanted = sign + form.format(abs(needed))
    measured = [(number, row) for row in rows if (number := value(row)) is not None]
    if not measured:
        return goal, wanted, "", "", "not measured"
    worst, row = min(measured, key=lambda pair: pair[0])
    where = f"{row['shape']}, {row['rows']:,}, {row['pass']}"
    met = worst > needed if needed < 0 else worst >= needed
    return goal, wanted, form.format(abs(worst)), where, "met" if met else "missed"


if __name__ == "__main__":
    main()
