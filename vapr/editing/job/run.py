"""Runs an edit job: opens its folder, takes verdicts, has the workers edit what is left, writes ledger and card."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vapr.editing.job.card import write_card
from vapr.editing.job.claim import EDITOR, SHARDS
from vapr.editing.job.folder import Job
from vapr.editing.job.json_files import write_json
from vapr.editing.job.ledger import ledger
from vapr.editing.job.push import Hub
from vapr.editing.job.review import apply_verdicts
from vapr.editing.job.scan import unreadable_rows
from vapr.editing.job.start import Start, check_batches, check_model_names, open_job
from vapr.editing.job.workers import run_workers
from vapr.interrupts import stopped_at_once


def run(start: Start, say: Callable[[str], None]) -> dict[str, Any]:
    """Do what is left of a job.

    Args:
        start: what is to be done.
        say: shows a line: about rows that cannot be read, or if there is nothing to do or less than was asked for.

    Returns:
        The job's ledger.

    Raises:
        UserError: for everything the user can mend, see :class:`vapr.editing.job.folder.Job`.
        Stopped: after a signal. Finished shards are kept.
    """
    with stopped_at_once(lambda: _say_what_is_kept(start.folder)):
        check_model_names(start)
        check_batches(start)
        with contextlib.closing(open_job(start)) as job:
            # Before hours of work: a name that is none, or no token, is told at once.
            hub = Hub(start.push_to, job.described) if start.push_to is not None else None
            result = _run(start, job, say)
            if hub is not None:
                _push(hub, start, result, say)
            return result


def _push(hub: Hub, start: Start, result: dict[str, Any], say: Callable[[str], None]) -> None:
    left = result["turns"]["left"]
    if left and (start.target is None or result["accepted"] < start.target):
        say(f"--push-to {hub.repository}: nothing was pushed, {left:,} answers are left; start again")
    elif not result["accepted"]:
        say(f"--push-to {hub.repository}: nothing was pushed, the job has no pair")
    else:
        say(f"pushed to {hub.push(start.folder, say)}")


def _say_what_is_kept(folder: Path) -> str:
    finished = len(list((folder / SHARDS).glob("*.json")))
    return f"{finished:,} finished shards are kept; the same command goes on from there"


def _run(start: Start, job: Job, say: Callable[[str], None]) -> dict[str, Any]:
    for line in unreadable_rows(job.scan):
        say(line)
    job.check_files()
    if start.verdicts is not None:
        apply_verdicts(job, start.verdicts, say)
    if not job.units_left(retry_failed=start.retry_failed):
        say(f"{start.folder}: nothing is left to do")
    elif start.target is not None and job.accepted >= start.target:
        say(f"{start.folder}: holds {job.accepted:,} accepted pairs already, --target is {start.target:,}")
    else:
        try:
            run_workers(start, job)
        except BaseException:
            if (job.folder / EDITOR).exists():
                _write_ledger(start, job)  # whatever has stopped it, ledger and card say how far it came
            raise
    if start.target is not None:
        if job.accepted >= start.target:
            job.remove_unfinished_pairs()
        else:
            say(f"--target {start.target:,} was not reached: the source gave {job.accepted:,} accepted pairs")
    return _write_ledger(start, job)


def _write_ledger(start: Start, job: Job) -> dict[str, Any]:
    """Write ledger.json and the card, and return the ledger."""
    result = ledger(job, start.price_per_gpu_hour)
    write_json(job.folder / "ledger.json", result)
    write_card(job.folder, result)
    return result
