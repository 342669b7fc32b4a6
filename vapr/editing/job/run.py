"""Runs an edit job: opens folder and editor, works alone or beside other processes, and writes ledger and card."""

import contextlib
import ctypes
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vapr.cache import written_whole
from vapr.editing.job.card import write_card
from vapr.editing.job.claim import EDITOR, SHARDS
from vapr.editing.job.folder import Job, Unit
from vapr.editing.job.ledger import ledger
from vapr.editing.job.review import take_verdicts
from vapr.editing.job.scan import unreadable
from vapr.editing.job.start import Start, check_names, identity, open_editor, open_job
from vapr.editing.job.worker import remove_unfinished, work
from vapr.errors import UserError
from vapr.interrupts import Stopped, stopped_at_once
from vapr.progress import Display

SECONDS_TO_END = 30.0
"""For a worker to stop its engine, after it was told to."""


def run(start: Start, say: Callable[[str], None]) -> dict[str, Any]:
    """Do what is left of a job; returns its ledger.

    Args:
        start: what is to be done.
        say: is told in a line of rows that cannot be read, and where there is nothing to do or less than was asked for.

    Raises:
        UserError: for everything the user can mend, see :class:`vapr.editing.job.folder.Job`.
        Stopped: after a signal. Finished shards are kept.
    """
    with stopped_at_once(lambda: _what_is_kept(start.folder)):
        check_names(start)
        with contextlib.closing(open_job(start)) as job:
            return _run(start, job, say)


def _run(start: Start, job: Job, say: Callable[[str], None]) -> dict[str, Any]:
    for line in unreadable(job.scan):
        say(line)
    job.check_files()
    if start.verdicts is not None:
        take_verdicts(job, start.verdicts)
    units = job.units(retry_failed=start.retry_failed)
    if not units:
        say(f"{start.folder}: nothing is left to do")
    elif start.target is not None and job.accepted >= start.target:
        say(f"{start.folder}: holds {job.accepted:,} accepted pairs already, --target is {start.target:,}")
    else:
        try:
            _do(start, job, units)
        except BaseException:
            if (job.folder / EDITOR).exists():
                finish(start, job)  # whatever has stopped it, ledger and card say how far it came
            raise
    if start.target is not None:
        if job.accepted >= start.target:
            remove_unfinished(job)
        else:
            say(f"--target {start.target:,} was not reached: the source gave {job.accepted:,} accepted pairs")
    return finish(start, job)


def _what_is_kept(folder: Path) -> str:
    finished = len(list((folder / SHARDS).glob("*.json")))
    return f"{finished:,} finished shards are kept; the same command goes on from there"


def _do(start: Start, job: Job, units: Sequence[Unit]) -> None:
    if start.ray:
        from vapr.editing.job.on_ray import work_on_ray

        work_on_ray(start, job, units)
    elif start.workers > 1:
        _beside_each_other(start, job)
    else:
        work_alone(start, job)


def work_alone(start: Start, job: Job, *, quiet: bool = False) -> None:
    """Be one worker of the job; a quiet one shows no progress."""
    with open_editor(start) as editor:
        described = identity(start, editor)
        job.check_editor(described)
        done, left = job.progress(retry_failed=start.retry_failed)
        with Display("edit", done + left, done, unit="answer", quiet=quiet) as display:
            work(job, editor, described, target=start.target, retry_failed=start.retry_failed, display=display)


def finish(start: Start, job: Job) -> dict[str, Any]:
    """Write ledger.json and the card, and return the ledger."""
    result = ledger(job, job.editor, start.price_per_gpu_hour)
    with written_whole(job.folder / "ledger.json") as stream:
        stream.write(json.dumps(result, indent=1, ensure_ascii=False).encode(errors="replace") + b"\n")
    write_card(job.folder, result)
    return result


def _beside_each_other(start: Start, job: Job) -> None:
    """Start workers that share the folder, each with its own engine on its own GPUs, and show what they have done."""
    spawn = multiprocessing.get_context("spawn")  # an engine must not be forked
    devices = _devices(start.workers, start.config.engine.tensor_parallel)
    problems = spawn.SimpleQueue()
    processes = [spawn.Process(target=_one_of_several, args=(start, gpus, problems, os.getpid())) for gpus in devices]
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; workers inherit this
    for process in processes:
        process.start()
    signal.signal(signal.SIGINT, on_interrupt)
    try:
        shown, left = job.progress(retry_failed=start.retry_failed)
        with Display("edit", shown + left, shown, unit="answer") as display:
            while any(process.is_alive() for process in processes):
                for process in processes:
                    process.join(timeout=0.2)
                done, _ = job.progress(retry_failed=False)
                if done > shown:
                    display.advance(f"{job.accepted:,} accepted", done - shown)
                    shown = done
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(SECONDS_TO_END)
            process.kill()
            process.join()
    if not problems.empty():
        raise UserError(problems.get())
    if lost := sum(process.exitcode != 0 for process in processes):
        raise UserError(f"{lost} of {start.workers} workers were killed; finished shards are kept, start again")


def _devices(workers: int, each: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each worker; None on a machine without GPUs."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        gpus = [name for name in given.split(",") if name]
    else:
        gpus = [str(n) for n in range(len(list(Path("/proc/driver/nvidia/gpus").glob("*"))))]
    if not gpus:
        return [None] * workers
    if len(gpus) < workers * each:
        raise UserError(f"--workers {workers} with {each} GPUs each need {workers * each} GPUs; there are {len(gpus)}")
    return [",".join(gpus[n * each : (n + 1) * each]) for n in range(workers)]


def _one_of_several(start: Start, gpus: str | None, problems: Any, parent: int) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: a worker does not outlive a killed command
    if os.getppid() != parent:
        sys.exit(1)
    if gpus is not None and start.loaded_models:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    try:
        with stopped_at_once(str), contextlib.closing(open_job(start)) as job:
            work_alone(start, job, quiet=True)
    except UserError as error:
        problems.put(str(error))
    except Stopped as stopped:
        sys.exit(stopped.exit_code)
