"""Starts the workers of a job. All of them edit the same folder, where leases divide the shards among them.

A single worker runs in the process of the command. Several run in processes of this machine, or as Ray tasks.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vapr.editing.job.folder import Job
from vapr.editing.job.start import Start, open_editor, open_job
from vapr.editing.job.worker import Worker
from vapr.errors import UserError
from vapr.interrupts import Stopped, stopped_at_once
from vapr.progress import Display

SECONDS_TO_END = 30.0
"""Time for a worker to stop its engine after it was told to."""
SECONDS_BETWEEN_LOOKS = 0.2


def run_workers(start: Start, job: Job) -> None:
    """Have everything that is left of a job edited, with its progress shown.

    Raises:
        UserError: if a worker was stopped by a mistake of the user or was lost.
    """
    if start.workers == 1 and not start.ray:
        run_worker(start, job)
        return
    with (_ray_tasks if start.ray else _processes)(start) as wait:
        done = job.turns_done()
        total = done + job.turns_left(retry_failed=start.retry_failed)
        with Display("edit", total, done, unit="answer") as display:
            working = True
            while working:
                working = wait()
                if (now := job.turns_done()) > done:
                    display.advance(f"{job.accepted:,} accepted", now - done)
                    done = now


def run_worker(start: Start, job: Job, *, quiet: bool = False) -> None:
    """Be a worker of the job; a quiet one shows no progress."""
    with open_editor(start) as editor:
        job.check_editor(editor.identity)
        done, left = job.turns_done(), job.turns_left(retry_failed=start.retry_failed)
        with Display("edit", done + left, done, unit="answer", quiet=quiet) as display:
            Worker(start, job, editor, display).work()


def run_one_of_several(start: Start) -> str | None:
    """Be one of several workers of a job; return the user's mistake that has stopped it, in one line."""
    try:
        with stopped_at_once(str), contextlib.closing(open_job(start)) as job:
            run_worker(start, job, quiet=True)
    except UserError as error:
        return str(error)
    return None


def _check_ends(mistakes: list[str], lost: int, start: Start) -> None:
    if mistakes:
        raise UserError(mistakes[0])
    if lost:
        raise UserError(f"{lost} of {start.workers} workers were killed; finished shards are kept, start again")


@contextlib.contextmanager
def _processes(start: Start) -> Iterator[Callable[[], bool]]:
    """Run the workers as processes of this machine, each with its own engine on its own GPUs.

    Yields:
        A function that waits a moment and returns whether any worker is still at work.
    """
    spawn = multiprocessing.get_context("spawn")  # an engine must not be forked
    mistakes = spawn.SimpleQueue()
    processes = [spawn.Process(target=_process, args=(start, gpus, mistakes)) for gpus in _divide_gpus(start)]
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; workers inherit this
    for process in processes:
        process.start()
    signal.signal(signal.SIGINT, on_interrupt)

    def wait() -> bool:
        time.sleep(SECONDS_BETWEEN_LOOKS)
        return any(process.is_alive() for process in processes)

    try:
        yield wait
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(SECONDS_TO_END)
            process.kill()
            process.join()
    lost = sum(process.exitcode != 0 for process in processes)
    _check_ends([] if mistakes.empty() else [mistakes.get()], lost, start)


def _process(start: Start, gpus: str | None, mistakes: Any) -> None:
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    if gpus is not None and start.loaded_models:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    try:
        mistake = run_one_of_several(start)
    except Stopped as stopped:
        sys.exit(stopped.exit_code)
    if mistake is not None:
        mistakes.put(mistake)


def _end_with_the_command() -> None:
    """End this process once the command that has started it is gone, even if that was killed."""
    command = multiprocessing.parent_process()
    assert command is not None
    command.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _divide_gpus(start: Start) -> list[str | None]:
    """Return the CUDA_VISIBLE_DEVICES of each worker; None on a machine without GPUs."""
    workers, each = start.workers, start.config.engine.tensor_parallel
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


@contextlib.contextmanager
def _ray_tasks(start: Start) -> Iterator[Callable[[], bool]]:
    """Run the workers as tasks of a Ray cluster, whose machines must share the folder.

    Yields:
        A function that waits a moment and returns whether any worker is still at work.
    """
    try:
        import ray
    except ImportError:
        raise UserError("--ray needs Ray; pip install 'vapr[ray]'") from None
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its news is not for our users; mistakes are returned
    ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    gpus = start.config.engine.tensor_parallel if ray.cluster_resources().get("GPU") and start.loaded_models else 0
    worker = ray.remote(num_gpus=gpus)(run_one_of_several)
    tasks = [worker.remote(start) for _ in range(start.workers)]
    try:
        yield lambda: bool(ray.wait(tasks, num_returns=len(tasks), timeout=SECONDS_BETWEEN_LOOKS)[1])
    finally:
        for task in tasks:
            ray.cancel(task)
        ray.wait(tasks, num_returns=len(tasks), timeout=SECONDS_TO_END)
    mistakes, lost = [], 0
    for task in tasks:
        try:
            mistakes.append(ray.get(task))
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError):
            lost += 1  # Ray has started it again some times
    _check_ends([mistake for mistake in mistakes if mistake is not None], lost, start)
