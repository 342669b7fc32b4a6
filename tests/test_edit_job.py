"""Edit jobs that survive: killed anywhere, shared by several processes, stopped at a target, taken up again."""

import contextlib
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("pyarrow", reason="pyarrow is not installed")
import pyarrow.parquet as parquet

from tests.fake_server import FakeServer, completion, obedient
from vapr.cache import written_whole
from vapr.editing import job as jobs
from vapr.editing import leases, pair_rows, work
from vapr.editing import run as runs
from vapr.editing.config import EditConfig
from vapr.editing.edit import Editor
from vapr.editing.run import Start, run
from vapr.errors import UserError
from vapr.sources import read_pairs

SECONDS = 200.0
"""Longest wait for another process; a test that goes wrong ends all the same."""

FORK = multiprocessing.get_context("fork")
OBJECTS = ("car", "bus", "boat", "truck", "van", "train", "bicycle", "motorcycle")
COLOURS = ("red", "blue", "green", "yellow")
NUMBERS = ("two", "three", "four", "five")


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


def pairs_in(folder: Path) -> list[dict]:
    return [pair for part in sorted((folder / "pairs").glob("*")) for pair in parquet.read_table(part).to_pylist()]


def rejects_in(folder: Path) -> list[dict]:
    files = sorted((folder / "rejects").glob("*"))
    return [json.loads(line) for file in files for line in file.read_text().split("\n") if line]


def ids_in(folder: Path) -> list[str]:
    return [pair["id"] for pair in pairs_in(folder)]


def assert_nothing_lost(folder: Path) -> None:
    """Every turn once, as a pair or a reject; no id twice."""
    accepted = [(p["provenance"]["place"].rpartition(":")[2], p["provenance"]["turn"]) for p in pairs_in(folder)]
    rejected = [(r["place"].rpartition(":")[2], r["turn"]) for r in rejects_in(folder)]
    assert sorted([*accepted, *rejected]) == sorted(TO_EDIT)
    assert len(set(ids_in(folder))) == len(accepted)


# Killed


def in_a_process(function, *arguments) -> multiprocessing.Process:
    process = FORK.Process(target=function, args=arguments)
    process.start()
    return process


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


def killed(function, *arguments) -> None:
    process = in_a_process(function, *arguments)
    process.join(SECONDS)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("module", "name", "times", "redone"),
    [
        ("vapr.editing.job", "os.link", 1, 0),  # before the folder is claimed
        ("vapr.editing.job", "take", 1, 0),  # after it
        ("vapr.editing.job", "why_left_out", 20, 0),  # while the source is read
        ("vapr.editing.job", "np.save", 1, 0),
        ("vapr.editing.job", "np.load", 1, 0),  # after the source was read
        ("vapr.editing.edit", "Editor.edit", 2, 1),
        ("vapr.editing.work", "write_lines", 4, 1),  # between rejects and plans
        ("vapr.editing.work", "write_pairs", 2, 1),  # between plans and pairs
        ("vapr.editing.work", "_manifest", 2, 1),  # between pairs and manifest
        ("vapr.editing.leases", "Lease._write_free", 3, 0),  # between manifest and the end of the lease
        ("vapr.editing.run", "ledger", 1, 0),
    ],
)
def test_killed_and_run_again(source, unbroken, module, name, times, redone, out):
    start = start_of(source, out)
    killed(run_until, module, name, times, start)
    finished = len(list((start.folder / "shards").glob("*.json")))
    result = done(start)
    assert contents(start.folder) == contents(unbroken)
    assert_nothing_lost(start.folder)
    assert result["shards"] == {"total": 5, "done": 5, "redone": redone}
    again = {m["unit"]: m["times_taken"] for m in manifests(start.folder)}
    assert sum(times > 1 for times in again.values()) == redone
    assert finished == {"Editor.edit": 1, "write_lines": 1, "write_pairs": 1, "_manifest": 1, "ledger": 5,
                        "Lease._write_free": 2}.get(name, 0)  # fmt: skip


def manifests(folder: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted((folder / "shards").glob("*.json"))]


def run_until_half_of(name: str, start: Start) -> None:
    """Run, and be killed when half of the first file of that name is on the disk."""

    @contextlib.contextmanager
    def half_written(path):
        with written_whole(path) as file:
            if path.name == name:
                file.write(b"PAR1 half of it")
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            yield file

    for module in (jobs, pair_rows, work):
        module.written_whole = half_written
    run(start, print)


@pytest.mark.parametrize(
    "name", ["turns.npy", "scan.json", "part-00001.parquet", "part-00001.jsonl", "00001.json"], ids=str
)
def test_killed_in_the_middle_of_a_file(source, unbroken, name, out):
    start = start_of(source, out)
    killed(run_until_half_of, name, start)
    [half] = [file for file in start.folder.rglob("*.tmp") if file.parent.name != "leases"]
    assert half.read_bytes() == b"PAR1 half of it"
    done(start)
    assert contents(start.folder) == contents(unbroken)
    assert not list(start.folder.rglob("*.tmp"))


def test_killed_twice_in_one_shard_is_counted_twice(source, out):
    start = start_of(source, out)
    killed(run_until, "vapr.editing.work", "_manifest", 2, start)
    killed(run_until, "vapr.editing.work", "_manifest", 1, start)
    assert done(start)["shards"]["redone"] == 2


def test_a_part_of_a_killed_worker_does_not_outlive_a_rerun_that_accepts_nothing(source, monkeypatch, out):
    """An editor that is no function of its input, such as a server, may refuse the second time what it made before."""
    start = start_of(source, out)
    killed(run_until, "vapr.editing.work", "_manifest", 1, start)
    assert [file.name for file in (start.folder / "pairs").iterdir()] == ["part-00000.parquet"]
    edit = Editor.edit

    def refuses(editor, turns, seed, on_turn):
        drafts, tokens = edit(editor, turns, seed, on_turn)
        for draft in drafts:
            draft.end("rejected", "not this time")
        return drafts, tokens

    monkeypatch.setattr(Editor, "edit", refuses)
    assert done(start)["accepted"] == 0
    assert not list((start.folder / "pairs").glob("*"))


def test_parts_and_manifests_agree(unbroken):
    import hashlib

    for manifest in manifests(unbroken):
        for name, digest in manifest["files"].items():
            assert hashlib.sha256((unbroken / name).read_bytes()).hexdigest() == digest
    assert sum(manifest["accepted"] for manifest in manifests(unbroken)) == len(pairs_in(unbroken)) > 40
    assert_nothing_lost(unbroken)


# Several at once


def run_after(barrier, start: Start) -> None:
    barrier.wait(SECONDS)
    run(start, print)


@pytest.mark.parametrize("count", [2, 3])
def test_workers_on_one_folder_share_the_work(source, unbroken, count, out):
    start, barrier = start_of(source, out), FORK.Barrier(count)
    processes = [in_a_process(run_after, barrier, start) for _ in range(count)]
    for process in processes:
        process.join(SECONDS)
    assert [process.exitcode for process in processes] == [0] * count
    assert contents(start.folder) == contents(unbroken)
    assert_nothing_lost(start.folder)


def command(*arguments: object) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "vapr.cli", "edit", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)


def test_workers_of_one_command(source, unbroken, out):
    out = out
    result = command(source, "--out", out, "--workers", 2, "--set", "turns_per_shard=16")
    assert result.returncode == 0, result.stderr
    assert contents(out) == contents(unbroken)
    assert result.stderr.count("edit answer 65/65") == 1  # the workers themselves are quiet
    assert "accepted    " in result.stdout


def test_a_problem_of_a_worker_is_the_commands(source, out, monkeypatch):
    monkeypatch.setattr(runs.multiprocessing, "get_context", lambda method: FORK)  # sooner there
    with pytest.raises(UserError, match=r"server http://127.0.0.1:9: not reachable"):
        done(start_of(source, out, workers=2, editor="http://127.0.0.1:9"))


def test_a_worker_that_is_killed_is_said(source, unbroken, out, monkeypatch):
    monkeypatch.setattr(runs.multiprocessing, "get_context", lambda method: FORK)
    monkeypatch.setattr(Editor, "edit", lambda *arguments: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match="2 of 2 workers were killed; finished shards are kept, start again"):
        done(start_of(source, out, workers=2))
    monkeypatch.undo()
    assert done(start_of(source, out))["shards"]["redone"] == 2
    assert contents(out) == contents(unbroken)


def run_with_editing_at_once(barrier, start: Start) -> None:
    """Run, with the first shard edited and not yet written when the others have come as far."""
    edit, first = Editor.edit, []

    def edit_then_wait(*arguments):
        drafts = edit(*arguments)
        if not first:
            first.append(1)
            barrier.wait(SECONDS)
        return drafts

    Editor.edit = edit_then_wait
    run(start, print)


def test_several_workers_do_not_overshoot_the_target(source, out):
    start, barrier = start_of(source, out, target=6), FORK.Barrier(3)
    processes = [in_a_process(run_with_editing_at_once, barrier, start) for _ in range(3)]
    for process in processes:
        process.join(SECONDS)
    assert [process.exitcode for process in processes] == [0] * 3
    assert len(ids_in(start.folder)) == 6
    whole = start_of(source, out)
    done(whole)
    assert_every_turn_ends_once(whole.folder)


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


# Leases


def holder(**changes) -> str:
    mine = {"host": leases.socket.gethostname(), "pid": os.getpid(), "began": leases._began(os.getpid())}
    return json.dumps({**mine, **changes})


def gone_process() -> int:
    process = in_a_process(str)
    process.join()
    return process.pid


@pytest.mark.parametrize(
    ("text", "age", "free"),
    [
        (lambda: holder(), 0, False),
        (lambda: holder(), 10_000, False),  # a living process of this host holds it however long it is silent
        (lambda: holder(pid=gone_process()), 0, True),
        (lambda: holder(began="boot:1"), 0, True),  # the number is another process's now
        (lambda: holder(host="elsewhere"), 0, False),
        (lambda: holder(host="elsewhere"), 100, False),
        (lambda: holder(host="elsewhere"), 130, True),
        (lambda: holder(began=None), 0, False),  # of a system that does not say when processes began
        (lambda: holder(began=None), 130, True),
        (lambda: '{"free": true}', 0, True),
        (lambda: '{"host": "els', 0, True),
        (lambda: "[]", 0, True),
        (lambda: "", 0, True),
    ],
    ids=["living", "silent", "dead", "pid reused", "other host", "late", "stale", "no birth", "no birth, stale",
         "given back", "half", "list", "empty"],
)  # fmt: skip
def test_who_holds_a_lease(tmp_path, text, age, free):
    file = tmp_path / "00000.3"
    file.write_text(text())
    then = leases.time.time() - age
    os.utime(file, (then, then))
    lease = leases.take(tmp_path, "00000")
    assert (lease is not None) == free
    if lease is not None:
        with lease:
            assert lease.times_taken == 4 and lease.held
            assert leases.take(tmp_path, "00000") is None
            assert leases.take(tmp_path, "00001").times_taken == 1  # another thing
        assert leases.take(tmp_path, "00000").times_taken == 5  # at once after it was given back


def test_a_lease_is_renewed(tmp_path, monkeypatch):
    renewed = FORK.Event()
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.01)
    monkeypatch.setattr(leases.os, "utime", lambda file: renewed.set())
    with leases.take(tmp_path, "a"):
        assert renewed.wait(30)


def hold(folder: Path, name: str, ready) -> None:
    with leases.take(folder, name):
        ready.set()
        signal.pause()


def test_a_shard_that_a_living_worker_holds_is_waited_for(source, unbroken, monkeypatch, out):
    start, ready = start_of(source, out), FORK.Event()
    done(start_of(source, out, target=1))  # makes the folder
    other = in_a_process(hold, start.folder / "leases", "00002", ready)
    assert ready.wait(SECONDS)
    waited = []

    def other_dies(seconds):
        waited.append({file.stem for file in (start.folder / "shards").glob("*.json")})
        other.kill()
        other.join()

    monkeypatch.setattr(work.time, "sleep", other_dies)
    result = done(start)
    assert waited == [{"00000", "00001", "00003", "00004", "00000-again1"}]  # all but that one; and taken over at once
    assert result["turns"]["left"] == 0 and result["shards"]["redone"] == 1
    assert_every_turn_ends_once(start.folder)


def test_a_worker_that_was_taken_for_dead_publishes_nothing(source, unbroken, monkeypatch, out):
    start = start_of(source, out)
    edit, stolen = Editor.edit, []

    def steal(editor, turns, seed, on_turn):
        if not stolen:
            stolen.append(seed)
            # Another machine has taken the lease while this process was asleep; it dies before it is through.
            (start.folder / "leases" / f"{seed}.2").write_text(holder(host="elsewhere"))
        return edit(editor, turns, seed, on_turn)

    def dies(seconds):
        assert stolen == ["00000"] and not list((start.folder / "pairs").glob("part-00000*"))
        assert not (start.folder / "shards" / "00000.json").exists()
        os.utime(start.folder / "leases" / "00000.2", (0, 0))

    monkeypatch.setattr(Editor, "edit", steal)
    monkeypatch.setattr(work.time, "sleep", dies)
    assert done(start)["shards"]["redone"] == 2  # the stolen one's own, and the thief's
    assert contents(start.folder) == contents(unbroken)


# Targets


def values(pairs: list[dict], side: str) -> Counter:
    return Counter(edit[side] for pair in pairs for edit in pair["edits"])


def test_a_target_is_met_exactly_and_may_grow(source, unbroken, capsys, out):
    first = done(start_of(source, out, target=18))
    folder = out
    assert first["accepted"] == len(pairs_in(folder)) == 18
    assert first["turns"]["left"] == 65 - 2 * 16  # no shard was begun for nothing
    assert values(pairs_in(folder), "from") == values(pairs_in(folder), "to")  # trades were not torn apart
    before, ids = contents(folder), ids_in(folder)

    again = done(start_of(source, out, target=18))
    assert contents(folder) == before and again == first
    assert "holds 18 accepted pairs already, --target is 18" in capsys.readouterr().out

    assert done(start_of(source, out, target=31))["accepted"] == 31  # an odd one: half a trade fills the last place
    assert len(set(ids_in(folder))) == 31 and set(ids) < set(ids_in(folder))
    assert {name: contents(folder)[name] for name in before} == before

    last = done(start_of(source, out))
    assert last["turns"]["left"] == last["over_target"] == 0
    assert_every_turn_ends_once(folder)
    assert len(pairs_in(unbroken)) - 2 <= len(pairs_in(folder)) <= len(pairs_in(unbroken))


def test_a_target_that_is_out_of_reach_is_said(source, unbroken, capsys, out):
    result = done(start_of(source, out, target=1000))
    assert f"--target 1,000 was not reached: the source gave {result['accepted']} " in capsys.readouterr().out
    assert contents(out) == contents(unbroken)


def test_a_lower_target_leaves_no_pairs_of_a_killed_worker(source, out):
    killed(run_until, "vapr.editing.work", "_manifest", 2, start_of(source, out))
    accepted = manifests(out)[0]["accepted"]
    assert len(pairs_in(out)) > accepted
    done(start_of(source, out, target=accepted))
    assert len(pairs_in(out)) == accepted


def test_a_finished_job_says_so(source, capsys, finished):
    before, ledger = contents(finished), (finished / "ledger.json").read_bytes()
    done(start_of(source, finished))
    assert "out: nothing is left to do" in capsys.readouterr().out
    assert contents(finished) == before and (finished / "ledger.json").read_bytes() == ledger


# Rows that failed

CATEGORY = """
name: mine
title: what it is
order: 1
applies: [{id: any, question: what is it}]
change: the thing
keep: the rest
"""


class Renamer:
    """A server that makes every apple a pear; rows that are ill get HTTP 400."""

    def __init__(self) -> None:
        self.ill = {"apple 2", "apple 5"}

    def __call__(self, number: int, body: dict):
        if "const" in json.dumps(body["response_format"]):
            return obedient(body)
        task = json.loads(body["messages"][-1]["content"].split("\n")[0])
        if any(name in task["answer"] for name in self.ill):
            return 400, {}, {"error": {"message": "no such luck"}}
        edit = {"find": "apple", "replace": "pear", "category": "mine", "why_wrong": "another fruit"}
        return completion(json.dumps({"edits": [edit]}))


@pytest.fixture
def apples(tmp_path, monkeypatch):
    """Start of a job with a server, and what the server does."""
    pytest.importorskip("openai", reason="the openai package is not installed")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    Image.new("RGB", (8, 8)).save(tmp_path / "page.png")
    (tmp_path / "mine.yaml").write_text(CATEGORY)
    rows = [row(n, "What is it?", f"It is apple {n} of a tree.") for n in range(8)]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = {"categories": ["mine"], "add_categories": [str(tmp_path / "mine.yaml")]}
    config = parse({"turns_per_shard": 4, "plan": plan, "ask": {"attempts": 1}, "engine": {"tries": 1}})
    renamer = Renamer()
    with FakeServer(renamer) as server:
        yield (
            Start(source=str(tmp_path / "sft.jsonl"), folder=tmp_path / "out", editor=server.url, config=config),
            (
                renamer,
                server,
            ),
        )


def parse(raw: dict) -> EditConfig:
    from vapr.config_file import parse_config

    return parse_config(EditConfig, raw, "test")


def test_failed_rows_are_asked_for_again_only_when_told_to(apples, capsys):
    start, (renamer, server) = apples
    result = done(start)
    assert result["accepted"] == 6 and result["failed"] == {"HTTP N: no such luck": 2}
    failed = {reject["source_id"]: (reject["status"], reject["reason"]) for reject in rejects_in(start.folder)}
    assert failed == {f"row-{n}": ("failed", "HTTP 400: no such luck") for n in (2, 5)}
    before, asked = contents(start.folder), len(server.chats)

    done(start)
    assert "nothing is left to do" in capsys.readouterr().out
    assert len(server.chats) == asked and contents(start.folder) == before

    renamer.ill = {"apple 5"}
    result = done(replace(start, retry_failed=True))
    assert len(server.chats) == asked + 3  # the proof that schemas are obeyed, and two rows
    assert result["accepted"] == 7 and result["failed"] == {"HTTP N: no such luck": 1}
    assert {name: contents(start.folder)[name] for name in before} == before

    renamer.ill = set()
    result = done(replace(start, retry_failed=True))
    assert result["accepted"] == 8 and result["failed"] == {}
    assert result["categories"]["mine"] == {
        "turns": 8, "accepted": 8, "rejected": 0, "failed": 0, "accept_rate": 1.0
    }  # fmt: skip
    assert sorted(pair["provenance"]["source_id"] for pair in pairs_in(start.folder)) == [f"row-{n}" for n in range(8)]
    assert {pair["rejected"][0]["content"][0]["text"] for pair in pairs_in(start.folder)} == {
        f"It is pear {n} of a tree." for n in range(8)
    }


def test_another_editor_does_not_go_on_with_a_job(apples):
    start, (_, server) = apples
    done(replace(start, target=1))
    server.models = ("other",)
    with pytest.raises(UserError, match=r"out: was begun with another editor: name is fake, not other"):
        done(start)
    server.models = ("fake",)
    moved = replace(start, editor=start.editor + "/v1")  # the same model at another address
    assert done(moved)["turns"]["left"] == 0
    with pytest.raises(UserError, match="holds a job of other settings: editor is a server, not rules"):
        done(replace(start, editor="rules"))


# Other settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 3}, "seed is 0, not 3"),
        ({"turns_per_shard": 8}, "turns_per_shard is 16, not 8"),
        ({"plan": {"balance": "uniform"}}, "plan.balance is swap, not uniform"),
        ({"plan": {"categories": ["count"]}}, "prompts or categories have changed"),
        ({"checks": {"style": False}}, "checks.style is True, not False"),
        ({"filters": {"max_answer_words": 9}}, "filters.max_answer_words is 400, not 9"),
        ({"source": {"licence": "MIT"}}, "source.licence is None, not MIT"),
    ],
    ids=str,
)
def test_other_settings_do_not_go_on_with_a_job(source, change, message, out):
    start = start_of(source, out, target=1)
    done(start)
    with pytest.raises(UserError) as caught:
        done(replace(start, config=parse({"turns_per_shard": 16, **change})))
    assert message in str(caught.value) and "give another --out" in str(caught.value)


def test_an_edited_or_another_source_does_not_go_on_with_a_job(own_source, out):
    done(start_of(own_source, out, target=1))
    moved = own_source.rename(own_source.with_name("moved.jsonl"))
    done(replace(start_of(moved, out), target=20))  # the same rows under another name
    text = moved.read_text()
    moved.write_text(text.replace("page 63", "page 64"))
    with pytest.raises(UserError, match="the rows of the source have changed; use them, or give another --out"):
        done(start_of(moved, out))


def test_a_picture_that_is_gone_since_the_source_was_read(own_source, out):
    done(start_of(own_source, out, target=1))
    (own_source.parent / "page.png").unlink()
    with pytest.raises(UserError, match=r"sft.jsonl:\d+: image 'page.png' not found .* restore it"):
        done(start_of(own_source, out))


def test_what_could_not_begin_may_begin_otherwise(source, out):
    start = start_of(source, out, config=parse({"turns_per_shard": 16, "filters": {"min_answer_words": 100}}))
    with pytest.raises(UserError, match=r"no answer to edit in it: .* x answer shorter than 100 words"):
        done(start)
    assert done(start_of(source, out))["turns"]["total"] == 65


# Verdicts


def test_what_a_review_drops_leaves_the_pairs_and_stays_out(source, tmp_path, finished):
    folder, ids = finished, ids_in(finished)
    dropped = {ids[0], ids[20]}
    lines = [{"id": id, "verdict": "drop"} for id in dropped] + [{"id": id, "verdict": "keep"} for id in ids[1:4]]
    verdicts = tmp_path / "verdicts.jsonl"
    verdicts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    start = start_of(source, finished)
    result = done(replace(start, verdicts=verdicts))
    assert ids_in(folder) == [id for id in ids if id not in dropped]
    assert result["accepted"] == len(ids) - 2 and result["rejected"]["dropped in review"] == 2
    assert result["review"] == {"kept": 3, "dropped": 2, "low": pytest.approx(0.2307), "high": pytest.approx(0.8824)}
    card = (folder / "README.md").read_text()
    assert f"{len(ids) - 2} preference pairs" in card and "3 pairs kept, 2 dropped" in card
    before = contents(folder)
    assert done(start)["accepted"] == len(ids) - 2 and contents(folder) == before

    other = done(start_of(source, tmp_path / "other", verdicts=verdicts))  # the same source in a new folder
    assert ids_in(tmp_path / "other") == ids_in(folder)
    assert other["accepted"] == len(ids) - 2 and other["rejected"]["dropped in review"] == 2
    more = done(start_of(source, tmp_path / "other", target=len(ids) - 2))
    assert more["accepted"] == len(ids) - 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": "a", "verdict": "drop"}\n{"id": "b"', "verdicts.jsonl:2: not valid JSON"),
        ('{"id": 5, "verdict": "drop"}\n', "verdicts.jsonl:1: a verdict needs an 'id' that is text"),
        ('\n{"id": "a", "verdict": "perhaps"}\n', "verdicts.jsonl:2: 'verdict' of 'a' must be keep or drop"),
    ],
)
def test_bad_verdicts_change_nothing(source, text, message, tmp_path, finished):
    before = contents(finished)
    (tmp_path / "verdicts.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        done(start_of(source, finished, verdicts=tmp_path / "verdicts.jsonl"))
    assert contents(finished) == before and not (finished / "verdicts.jsonl").exists()


# What comes after


def test_the_folder_is_what_training_reads(unbroken):
    pairs = list(read_pairs(unbroken))
    assert [pair.id for pair in pairs] == ids_in(unbroken)
    assert pairs[0].images == (unbroken.parent / "page.png",) and pairs[0].edits


def test_the_folder_is_a_data_set(unbroken, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the datasets library is not installed")
    rows = datasets.load_dataset(str(unbroken), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["id"] == ids_in(unbroken) or list(rows["id"]) == ids_in(unbroken)


# Signals


def test_signals_stop_at_once_and_keep_finished_shards(source, unbroken, tmp_path):
    for number in (signal.SIGTERM, signal.SIGINT):
        start = start_of(source, tmp_path / number.name)
        reading, writing = FORK.Pipe(duplex=False)
        process = in_a_process(command_that_signals_itself, number, start, writing)
        process.join(SECONDS)
        assert process.exitcode == 128 + number
        line = f"Stopped: {number.name}: 1 finished shards are kept; the same command goes on from there"
        assert reading.recv() == [line]
        assert (start.folder / "shards" / "00000.json").exists()
        assert done(start)["shards"] == {"total": 5, "done": 5, "redone": 1}
        assert contents(start.folder) == contents(unbroken)


def command_that_signals_itself(number: int, start: Start, writing) -> None:
    """``vapr edit`` that gets a signal while it edits its second shard."""
    from click.testing import CliRunner

    from vapr.cli import main

    edit, calls = Editor.edit, []

    def edit_and_signal(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return edit(*arguments)

    Editor.edit = edit_and_signal
    arguments = ["edit", start.source, "--out", str(start.folder), "--set", "turns_per_shard=16"]
    result = CliRunner().invoke(main, arguments)
    writing.send([line for line in result.stderr.splitlines() if not line.startswith("edit answer")])
    os._exit(result.exit_code)


# Ray


def run_until_a_shard_is_done(start: Start) -> None:
    from vapr.display import Display

    Display.advance = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
    run(start, print)


def run_on_ray(start: Start, writing) -> None:
    writing.send(run(start, print)["shards"])


def test_ray_makes_the_same_pairs_and_survives(source, unbroken, out):
    """The whole cluster dies with its driver, and is started again."""
    pytest.importorskip("ray", reason="ray is not installed")
    start = start_of(source, out, ray=True)
    runs.open_job(start)  # reads the source, so that the first progress is a shard's
    killed(run_until_a_shard_is_done, start)
    assert 1 <= len(manifests(out)) <= 5
    reading, writing = FORK.Pipe(duplex=False)
    process = in_a_process(run_on_ray, replace(start, workers=2), writing)
    assert reading.poll(SECONDS)
    shards = reading.recv()
    process.join(SECONDS)
    assert (shards["total"], shards["done"]) == (5, 5) and shards["redone"] <= 1
    assert contents(out) == contents(unbroken)
    assert_nothing_lost(out)


def test_a_problem_of_a_ray_worker_comes_back_as_a_row(source, out):
    from vapr.editing.on_ray import _Worker

    worker = _Worker(start_of(source, out, editor="http://127.0.0.1:9"))
    [problem] = worker({"shard": [0], "round": [0]})["problem"]
    assert problem.startswith("server http://127.0.0.1:9: not reachable") and "\n" not in problem
    assert not manifests(out)


def test_without_ray(source, out, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"--ray needs Ray; pip install 'vapr\[ray\]'"):
        done(start_of(source, out, ray=True))
