"""The same job on a Ray cluster: Ray Data hands units to workers, which write the same files under the same leases."""

import logging
import os
import time
from collections.abc import Sequence
from typing import Any

from vapr.editing.job.claim import WAIT_SECONDS
from vapr.editing.job.folder import Job, Unit
from vapr.editing.job.start import Start, open_editor, open_job
from vapr.editing.job.start import identity as identity_of
from vapr.editing.job.worker import do_unit
from vapr.errors import UserError
from vapr.progress import Display


class _Worker:
    """One actor: a job's folder and an editor with its models loaded.

    A user's mistake comes back as a row: Ray would show its own long story of an exception.
    """

    def __init__(self, start: Start) -> None:
        self._start = start
        self._problem = ""
        try:
            self._job = open_job(start)
            self._opened = open_editor(start)
            self._editor = self._opened.__enter__()
            self._identity = identity_of(start, self._editor)
            self._job.check_editor(self._identity)
        except UserError as error:
            self._problem = str(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        try:
            for shard, round in zip(batch["shard"], batch["round"], strict=True):
                self._do(Unit(int(shard), int(round)))
        except UserError as error:
            self._problem = str(error)
        return {"problem": [self._problem]}

    def _do(self, unit: Unit) -> None:
        if self._problem:
            return
        start = self._start
        while not do_unit(self._job, self._editor, self._identity, unit, start.target, retry_failed=start.retry_failed):
            time.sleep(WAIT_SECONDS)  # another worker of the folder holds it


def work_on_ray(start: Start, job: Job, units: Sequence[Unit]) -> None:
    """Do the units on Ray, with ``start.workers`` actors; the folder must be shared by all machines.

    Raises:
        UserError: if Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise UserError("--ray needs Ray; pip install 'vapr[ray]'") from None
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its news is not for our users; problems come as rows
    ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    gpus = start.config.engine.tensor_parallel if ray.cluster_resources().get("GPU") and start.loaded_models else 0
    rows = [{"shard": unit.shard, "round": unit.round} for unit in units]
    # One block a unit: a block is what Ray gives to a worker, and what it does again when a worker is lost.
    done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _Worker,
        fn_constructor_args=(start,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=start.workers),
        num_gpus=gpus,
    )
    before, left = job.progress(retry_failed=start.retry_failed)
    with Display("edit", before + left, before, unit="answer") as display:
        for batch in done.iter_batches(batch_size=1):
            if problem := batch["problem"][0]:
                raise UserError(str(problem))
            display.advance(f"{job.accepted:,} accepted", job.config.turns_per_shard)
