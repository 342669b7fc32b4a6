"""Several workers on one edit job: on one folder, of one command, on Ray; and the leases by which they share it."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="pyarrow is not installed")

from tests.editing.edit_jobs import (
    FORK,
    SECONDS,
    assert_every_turn_ends_once,
    assert_nothing_lost,
    contents,
    done,
    ids_in,
    in_a_process,
    killed,
    manifests,
    parse,
    start_of,
)
from vapr.editing.draft.editor import Editor
from vapr.editing.job import leases, worker, workers
from vapr.editing.job import run as runs
from vapr.editing.job.run import run
from vapr.editing.job.start import Start
from vapr.errors import UserError
from vapr.interrupts import Stopped

pytest_plugins = ["tests.editing.edit_jobs"]


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


def test_workers_with_other_settings_begin_at_once_where_a_start_has_failed(source, unbroken, out, tmp_path):
    (tmp_path / "check.py").write_text("import no_such_module\n")
    with pytest.raises(UserError, match="ModuleNotFoundError: No module named 'no_such_module'"):
        done(start_of(source, out, config=parse({"checks": {"python": f"{tmp_path}/check.py:judge"}})))
    assert {file.name for file in out.iterdir()} == {"job.json", "scan.json", "turns.npy", "truths.npy", "leases"}
    start, barrier = start_of(source, out), FORK.Barrier(3)
    processes = [in_a_process(run_after, barrier, start) for _ in range(3)]
    for process in processes:
        process.join(SECONDS)
    assert [process.exitcode for process in processes] == [0] * 3
    assert contents(out) == contents(unbroken)


def wait_with_an_open_job(start: Start, ready) -> None:
    runs.open_job(start)
    ready.set()
    signal.pause()


def test_a_folder_is_not_taken_from_a_living_process(source, unbroken, out):
    """One that still loads its model: it has done nothing yet."""
    ready = FORK.Event()
    other = in_a_process(wait_with_an_open_job, start_of(source, out, config=parse({"seed": 5})), ready)
    assert ready.wait(SECONDS)
    with pytest.raises(UserError, match="holds a job of other settings: seed is 5, not 0"):
        done(start_of(source, out))
    other.kill()
    other.join()
    done(start_of(source, out))
    assert contents(out) == contents(unbroken)


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
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda method: FORK)  # sooner there
    with pytest.raises(UserError, match=r"server http://127.0.0.1:9: not reachable"):
        done(start_of(source, out, workers=2, editor="http://127.0.0.1:9"))


def test_a_worker_that_is_killed_is_said(source, unbroken, out, monkeypatch):
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda method: FORK)
    monkeypatch.setattr(Editor, "edit", lambda *arguments: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match="2 of 2 workers were killed; finished shards are kept, start again"):
        done(start_of(source, out, workers=2))
    monkeypatch.undo()
    assert done(start_of(source, out))["shards"]["redone"] == 2
    assert contents(out) == contents(unbroken)


def run_until_a_worker_signals(number: int, start: Start) -> None:
    """Run with two workers, of which one asks for the end as soon as it is to edit."""

    def signal_and_wait(editor, turns, seed, *arguments):
        if seed == "00000":
            os.kill(os.getppid(), number)
        signal.pause()

    workers.multiprocessing.get_context = lambda method: FORK
    Editor.edit = signal_and_wait
    try:
        run(start, print)
    except Stopped as stopped:
        os._exit(stopped.exit_code)


def test_the_workers_of_a_killed_command_end_too(source, unbroken, out):
    start = start_of(source, out, workers=2)
    killed(run_until_a_worker_signals, signal.SIGKILL, start)
    lease, deadline = out / "leases" / "00000.1", time.monotonic() + SECONDS
    while lease.read_text() != '{"free": true}' and time.monotonic() < deadline:
        time.sleep(0.05)
    assert json.loads(lease.read_text()) == {"free": True}  # the worker came to its own end, where engines are closed
    done(replace(start, workers=1))
    assert contents(out) == contents(unbroken)


@pytest.mark.parametrize(
    ("visible", "each", "divided"),
    [("0,1,2,3", 2, ["0,1", "2,3"]), ("GPU-a,GPU-b,GPU-c", 1, ["GPU-a", "GPU-b"]), ("", 1, [None, None])],
)
def test_gpus_are_divided_among_workers(source, out, monkeypatch, visible, each, divided):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    config = parse({"engine": {"tensor_parallel": each}})
    assert workers._divide_gpus(start_of(source, out, workers=2, config=config)) == divided


def test_too_few_gpus_are_said(source, out, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with pytest.raises(UserError, match="--workers 2 with 2 GPUs each need 4 GPUs; there are 3"):
        done(start_of(source, out, workers=2, config=parse({"engine": {"tensor_parallel": 2}})))


def test_a_signal_ends_the_workers_too(source, unbroken, tmp_path):
    for number in (signal.SIGTERM, signal.SIGINT):
        start = start_of(source, tmp_path / number.name, workers=2)
        process = in_a_process(run_until_a_worker_signals, number, start)
        process.join(SECONDS)
        assert process.exitcode == 128 + number
        # The worker has given its lease back: it came to its own end, where engines are closed.
        assert json.loads((start.folder / "leases" / "00000.1").read_text()) == {"free": True}
        done(replace(start, workers=1))
        assert contents(start.folder) == contents(unbroken)


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


# Leases


def holder(**changes) -> str:
    mine = {"host": leases.socket.gethostname(), "pid": os.getpid(), "began": leases._start_of_process(os.getpid())}
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

    monkeypatch.setattr(worker.time, "sleep", other_dies)
    result = done(start)
    assert waited == [{"00000", "00001", "00003", "00004", "00000-again1"}]  # all but that one; and taken over at once
    assert result["turns"]["left"] == 0 and result["shards"]["redone"] == 1
    assert_every_turn_ends_once(start.folder)


def test_a_worker_that_was_taken_for_dead_publishes_nothing(source, unbroken, monkeypatch, out):
    start = start_of(source, out)
    edit, stolen = Editor.edit, []

    def steal(editor, turns, seed, *arguments):
        if not stolen:
            stolen.append(seed)
            # Another machine has taken the lease while this process was asleep; it dies before it is through.
            (start.folder / "leases" / f"{seed}.2").write_text(holder(host="elsewhere"))
        return edit(editor, turns, seed, *arguments)

    def dies(seconds):
        assert stolen == ["00000"] and not list((start.folder / "pairs").glob("part-00000*"))
        assert not (start.folder / "shards" / "00000.json").exists()
        os.utime(start.folder / "leases" / "00000.2", (0, 0))

    monkeypatch.setattr(Editor, "edit", steal)
    monkeypatch.setattr(worker.time, "sleep", dies)
    assert done(start)["shards"]["redone"] == 2  # the stolen one's own, and the thief's
    assert contents(start.folder) == contents(unbroken)


# Ray


def run_until_a_shard_is_done(start: Start) -> None:
    from vapr.progress import Display

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


def fail_on_ray(start: Start, writing) -> None:
    with pytest.raises(UserError) as caught:
        run(start, print)
    writing.send(str(caught.value))


def test_a_problem_of_a_ray_worker_is_the_commands(source, out):
    """In a process of its own: Ray ends its driver's where its cluster comes up too slowly."""
    pytest.importorskip("ray", reason="ray is not installed")
    reading, writing = FORK.Pipe(duplex=False)
    process = in_a_process(fail_on_ray, start_of(source, out, ray=True, editor="http://127.0.0.1:9"), writing)
    assert reading.poll(SECONDS)
    message = reading.recv()
    process.join(SECONDS)
    assert message.startswith("server http://127.0.0.1:9: not reachable") and "\n" not in message
    assert not manifests(out)


def test_without_ray(source, out, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"--ray needs Ray; pip install 'vapr\[ray\]'"):
        done(start_of(source, out, ray=True))
