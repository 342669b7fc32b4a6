"""Processes that make batches ahead of the training: torch's DataLoader, forked before there is anything on a GPU."""

import contextlib
import ctypes
import functools
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from vapr.batches.shared_memory import Shared, share
from vapr.errors import UserError

SECONDS_TO_END = 1.0
"""For a process whose pipe has closed."""


def default_workers() -> int:
    """Return half of the CPU cores this process may use, between 1 and 8."""
    return max(1, min(8, len(os.sched_getaffinity(0)) // 2))


class _Places:
    """The DataLoader's batch sampler: the places of the rows of one batch after another, whoever asks for them."""

    def __init__(self) -> None:
        self.asked_for: Iterator[list[Any]] = iter(())

    def __iter__(self) -> Iterator[list[Any]]:
        return self.asked_for


class Workers:
    """Makes batches of rows in ``count`` processes; with 0, in the caller's own when a batch is asked for.

    Processes are forked at once, so make this object before anything is put on a GPU.

    Args:
        rows: gives the row of a place.
        make_batch: what becomes of the rows of a batch.
        count: number of processes.
        prefetch: batches that each process is ahead.
    """

    def __init__(
        self, rows: Dataset[Any], make_batch: Callable[[list[Any]], Any], count: int = 0, prefetch: int = 1
    ) -> None:
        self._places = _Places()
        self._turn: object = None  # changes whenever other batches are asked for
        self._processes: list[BaseProcess] = []
        self._in_pipe = False
        options: dict[str, Any] = {}
        if count:
            options = {
                "multiprocessing_context": "fork",
                "prefetch_factor": prefetch,
                "persistent_workers": True,
                "worker_init_fn": functools.partial(_start_worker, os.getpid()),
                "pin_memory": torch.cuda.is_available(),
            }
        self._loader: DataLoader[Any] = DataLoader(
            rows,
            batch_sampler=self._places,
            collate_fn=functools.partial(_make_and_share, make_batch) if count else make_batch,
            num_workers=count,
            generator=torch.Generator(),  # else starting it would draw from the training's
            **options,
        )
        if count:
            self._fork()

    def _fork(self) -> None:
        """Ask for no batch, which starts the processes."""
        others = multiprocessing.active_children()
        usual = signal.getsignal(signal.SIGCHLD)
        iterator: Any = iter(self._loader)
        if threading.current_thread() is threading.main_thread():
            # torch's raises wherever the program is, even inside an update.
            signal.signal(signal.SIGCHLD, usual or signal.SIG_DFL)
        self._processes = [process for process in multiprocessing.active_children() if process not in others]
        self._end = weakref.finalize(self, iterator._shutdown_workers)  # also where nobody says close()

    @property
    def process_ids(self) -> list[int]:
        return [process.pid for process in self._processes if process.pid is not None]

    def batches(self, places: Callable[[int], list[Any]], start: int, stop: int) -> Iterator[Any]:
        """Yield batches ``start`` to ``stop`` (not included); ``places`` gives those of the rows of a batch.

        Another call may come in between: what was made ahead is then made again.

        Raises:
            UserError: if a process was killed.
            RuntimeError: for a fault in a process, with its traceback.
        """
        turn = None
        for number in range(start, stop):
            with self._watch_processes():
                if turn is None or self._turn is not turn:
                    turn = self._turn = object()
                    self._places.asked_for = map(places, range(number, stop))
                    made = iter(self._loader)
                batch = next(made)
            yield self._open(batch) if isinstance(batch, Shared) else batch
            del batch  # a step's pixels are let go before the next step is waited for

    def _open(self, batch: Shared) -> Any:
        if batch.in_pipe and not self._in_pipe:
            self._in_pipe = True
            print(
                f"{'workers':<10} /dev/shm is too small for batches of {len(batch.buffer) / 2**20:,.0f} MiB; they go "
                "through pipes, which takes longer (containers: docker run --shm-size=16g)",
                flush=True,
            )
        return batch.open()

    @contextlib.contextmanager
    def _watch_processes(self) -> Iterator[None]:
        """Raise UserError as soon as a process is lost.

        torch looks only now and then, and waits forever for the rest of a message whose sender was killed.
        """

        def check(*_: object) -> None:
            if not all(process.is_alive() for process in self._processes):
                raise UserError(
                    "a data worker was killed; is there enough memory, also in /dev/shm? Lower data.workers, or "
                    "optim.pairs_per_step"
                )

        with contextlib.ExitStack() as after:
            if self._processes and threading.current_thread() is threading.main_thread():
                usual = signal.signal(signal.SIGCHLD, check)
                after.callback(signal.signal, signal.SIGCHLD, usual or signal.SIG_DFL)
            check()
            try:
                yield
            except (RuntimeError, EOFError, OSError):
                # A lost process shows as any of them, sometimes before it has quite ended.
                ended = wait([process.sentinel for process in self._processes], timeout=SECONDS_TO_END)
                for process in self._processes:
                    if process.sentinel in ended:
                        process.join()  # its pipes close before the system calls it dead
                check()
                raise

    def close(self) -> None:
        """End the processes."""
        if self._processes:
            self._end()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _start_worker(parent: int, _: int) -> None:
    """Prepare a process that was just forked."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the trainer decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # A worker must not outlive a killed trainer.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _make_and_share(make_batch: Callable[[list[Any]], Any], rows: list[Any]) -> Shared:
    shared = share(make_batch(rows))
    with contextlib.suppress(AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)  # what processing the images took lies in holes between their pixels
    return shared
