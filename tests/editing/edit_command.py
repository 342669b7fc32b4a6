"""``vapr edit`` on a few rows, for tests of what goes wrong."""

import json
import zlib
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from tests.editing.edit_jobs import pairs_in, rejects_in
from vapr.cli import main

QUESTION = "<image>\nHow many cats are there?"


def row(answer: str = "There are seven cats.", **changes) -> dict:
    id = changes.get("id", "tested")
    turns = [
        {"from": "human", "value": f"{QUESTION} On page {zlib.crc32(ascii(id).encode())}?"},
        {"from": "gpt", "value": answer},
    ]
    named = {"id": id, "image": "cat.png", "conversations": turns, **changes}
    return {key: value for key, value in named.items() if value is not None}


def talk(*turns: tuple[str, object]) -> list[dict]:
    return [{"from": role, "value": value} for role, value in turns]


GOOD = [row("There are two cats.", id="a"), row("There are three cats.", id="b")]
"""Two rows that trade their numbers."""


@pytest.fixture
def folder(tmp_path) -> Path:
    Image.new("RGB", (8, 8)).save(tmp_path / "cat.png")
    write(tmp_path, GOOD)
    return tmp_path


def write(folder: Path, rows: list, name: str = "sft.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def edit(source: Path, *arguments: object) -> tuple[int, str]:
    """Exit code and stderr without progress."""
    out = () if "--out" in arguments else ("--out", source.parent / "out")
    result = CliRunner().invoke(main, ["edit", str(source), *map(str, (*out, *arguments))])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception  # what a user would see as a traceback
    lines = [line for line in result.stderr.splitlines(keepends=True) if not line.startswith(("edit ", "read source "))]
    return result.exit_code, "".join(lines)


def assert_refused(message: str, source: Path, *arguments: object) -> None:
    code, stderr = edit(source, *arguments)
    assert code == 2, stderr
    assert stderr.startswith("Error: ") and stderr.count("\n") == 1 and stderr.endswith("\n"), stderr
    assert message in stderr, stderr


def scan_of(folder: Path) -> dict:
    return json.loads((folder / "out" / "scan.json").read_text())


def ledger_of(folder: Path) -> dict:
    return json.loads((folder / "out" / "ledger.json").read_text())


def rejects_of(folder: Path) -> list[dict]:
    return rejects_in(folder / "out")


def pairs_of(folder: Path) -> list[dict]:
    return pairs_in(folder / "out")
