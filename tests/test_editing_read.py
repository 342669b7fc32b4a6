"""The tables of docs/edit.md about pairs that were read hold what bench/results/editing_read.tsv holds."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from vapr.intervals import wilson

REPOSITORY = Path(__file__).resolve().parent.parent
Verdicts = dict[str, str]
QWEN = "Qwen2.5-Coder-1.5B, "
FIRST = ((QWEN + "LLaVA",), (QWEN + "HA-DPO",), (QWEN + "made up",), ("SmolLM2-135M, made up",),
         ("rules, real", "rules, made up"))  # fmt: skip
AGAIN = tuple((f"{QWEN}{rows}, new checks",) for rows in ("LLaVA", "HA-DPO", "made up", "HallusionBench"))


@pytest.fixture(scope="module")
def read() -> list[Verdicts]:
    file = REPOSITORY / "bench" / "results" / "editing_read.tsv"
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))


def good(row: Verdicts) -> bool:
    return row["wrong"] == row["style"] == row["category_kept"] == "y"


TESTS: dict[str, Callable[[Verdicts], bool]] = {
    "wrong": lambda row: row["wrong"] == "y",
    "style": lambda row: row["style"] == "y",
    "category": lambda row: row["category_kept"] == "y",
    "all three": good,
    "denies itself nowhere": lambda row: row["contradicts"] == "n",
    "all four": lambda row: good(row) and row["contradicts"] == "n",
}


@pytest.mark.parametrize("name", TESTS)
@pytest.mark.parametrize("columns", [FIRST, AGAIN], ids=["first", "again"])
def test_the_tables_hold_what_was_read(read, columns, name):
    cells = [cell([row for row in read if row["editor"] in editors], name) for editors in columns]
    assert f"| {name} | {' | '.join(cells)} |".replace("|  |", "| |") in lines()


def lines() -> list[str]:
    text = (REPOSITORY / "docs" / "edit.md").read_text(encoding="utf-8")
    return [" ".join(line.split()) for line in text.splitlines()]


def cell(rows: list[Verdicts], name: str) -> str:
    """Such as "43 of 53, 81.1 [68.6, 89.4]"; the percentage is left out where it is 100."""
    if name.endswith(("nowhere", "four")) and not all(row["contradicts"] for row in rows):
        return "not read"
    count = sum(map(TESTS[name], rows))
    low, high = wilson(count / len(rows), len(rows))
    share = f", {100 * count / len(rows):.1f}" if count < len(rows) else ""
    return f"{count} of {len(rows)}{share} [{100 * low:.1f}, {100 * high:.1f}]"


def test_every_verdict_is_one_of_two(read):
    for row in read:
        assert {row["wrong"], row["style"], row["category_kept"]} <= {"y", "n"}
        assert row["contradicts"] in ("y", "n", "")
        assert good(row) or row["why"]
