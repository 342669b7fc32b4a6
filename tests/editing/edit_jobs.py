"""Edit jobs for tests: a source of instruction data, jobs of it, what is in their folders, and ways to be killed."""

import importlib
import json
import multiprocessing
import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vapr.editing.config import EditConfig
from vapr.editing.job.run import run
from vapr.editing.job.start import Start

SECONDS = 200.0
"""Longest wait for another process; a test that goes wrong ends all the same."""

FORK = multiprocessing.get_context("fork")
OBJECTS = ("car", "jeep", "boat", "truck", "van", "train", "bicycle", "motorcycle")
COLOURS = ("red", "blue", "green", "yellow")
NUMBERS = ("two", "three", "four", "five")


CATEGORY = """
name: mine
title: what it is
order: 1
applies: [{id: any, question: what is it}]
change: the thing
keep: the rest
"""


def source_rows() -> list[dict]:
    """64 answers that rules can edit, one that they cannot, one that is empty, and one row that cannot be read."""
    rows = []
    for n in range(64):
        thing = OBJECTS[n % 8]
        question, answer = (
            (f"What color is the {thing} on page {n}?", f"The {thing} is {COLOURS[n // 2 % 4]}."),
            (f"How many {thing}s are on page {n}?", f"There are {NUMBERS[n // 2 % 4]}."),
        )[n % 2]
        rows.append(row(n, question, answer))
    rows.insert(10, row("odd", "Is it so?", "Perhaps it is, perhaps not."))
    rows.insert(20, row("empty", "What is it?", " "))
    rows.insert(30, {**row("no picture", "What is it?", "A car."), "image": "nowhere.png"})
    return rows


def row(name: object, question: str, answer: str) -> dict:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": f"row-{name}", "image": "page.png", "conversations": turns}


TO_EDIT = {(f"{n + 1}", 0) for n in range(67)} - {("21", 0), ("31", 0)}
"""Line and answer of every turn that is to become a pair or a reject."""


def write_source(folder: Path, rows: list[dict]) -> Path:
    Image.new("RGB", (8, 8)).save(folder / "page.png")
    (folder / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "sft.jsonl"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"), source_rows())


@pytest.fixture
def own_source(tmp_path) -> Path:
    """One that a test may change."""
    return write_source(tmp_path, source_rows())


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def start_of(source: Path, out: Path, **changes) -> Start:
    return Start(source=str(source), folder=out, **{"config": EditConfig(turns_per_shard=16), **changes})


def done(start: Start) -> dict:
    """Run it here; returns the ledger."""
    return run(start, print)


@pytest.fixture(scope="module")
def unbroken(source) -> Path:
    """A finished job, for tests that only read it."""
    done(start_of(source, source.parent / "unbroken"))
    return source.parent / "unbroken"


@pytest.fixture
def finished(unbroken, out) -> Path:
    """A copy of it."""
    shutil.copytree(unbroken, out)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of the results, halves of files included."""
    parts = [file for name in ("pairs", "rejects", "plans") for file in (folder / name).glob("*")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in parts}


def _table(file: Path) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(file)


def pairs_in(folder: Path) -> list[dict]:
    return [pair for part in sorted((folder / "pairs").glob("*")) for pair in _table(part).to_pylist()]


def rejects_in(folder: Path) -> list[dict]:
    files = sorted((folder / "rejects").glob("*"))
    return [json.loads(line) for file in files for line in file.read_text().split("\n") if line]


def ids_in(folder: Path) -> list[str]:
    return [pair["id"] for pair in pairs_in(folder)]


def manifests(folder: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted((folder / "shards").glob("*.json"))]


def assert_nothing_lost(folder: Path) -> None:
    """Every turn once, as a pair or a reject; no id twice."""
    accepted = [(p["provenance"]["place"].rpartition(":")[2], p["provenance"]["turn"]) for p in pairs_in(folder)]
    rejected = [(r["place"].rpartition(":")[2], r["turn"]) for r in rejects_in(folder)]
    assert sorted([*accepted, *rejected]) == sorted(TO_EDIT)
    assert len(set(ids_in(folder))) == len(accepted)


def assert_every_turn_ends_once(folder: Path) -> None:
    """As :func:`assert_nothing_lost`, where later rounds took rejects up again."""
    ends = Counter((p["provenance"]["place"].rpartition(":")[2], p["provenance"]["turn"]) for p in pairs_in(folder))
    assert set(ends.values()) <= {1}
    newest = {}
    for file in sorted((folder / "rejects").glob("*"), key=lambda file: len(file.name)):  # later rounds last
        for line in file.read_text().split("\n"):
            if line:
                reject = json.loads(line)
                newest[reject["place"].rpartition(":")[2], reject["turn"]] = reject["status"]
    left = {place for place, status in newest.items() if place not in ends}
    assert left | set(ends) == TO_EDIT
    assert not [place for place in left if newest[place] == "over_target"]
    assert len(set(ids_in(folder))) == len(ids_in(folder))


def in_a_process(function, *arguments) -> multiprocessing.Process:
    process = FORK.Process(target=function, args=arguments)
    process.start()
    return process


def killed(function, *arguments) -> None:
    process = in_a_process(function, *arguments)
    process.join(SECONDS)
    assert process.exitcode == -signal.SIGKILL


def run_until(module: str, name: str, times: int, start: Start) -> None:
    """Run, and be killed when ``module.name`` is called for the n-th time."""
    owner, _, attribute = name.rpartition(".")
    place = getattr(importlib.import_module(module), owner) if owner else importlib.import_module(module)
    original, calls = getattr(place, attribute), []

    def deadly(*arguments, **options):
        calls.append(1)
        if len(calls) == times:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(place, attribute, deadly)
    run(start, print)


def parse(raw: dict) -> EditConfig:
    return EditConfig.parse(raw, "test")
