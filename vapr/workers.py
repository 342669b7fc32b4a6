"""Background processes that turn pairs into tokens and pixels. They never change the order; a lost one is replaced."""

import ctypes
import itertools
import multiprocessing
import os
import signal
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch

from vapr.config import Config, TokenWeights
from vapr.errors import UserError
from vapr.model import load_model_config
from vapr.preference_pair import PreferencePair
from vapr.processor import Processor, TokenizedPair

RECENT_IMAGES_BYTES = 512 * 2**20
"""Processed images remembered by all workers together."""

ATTEMPTS = 3
"""Workers a pair may lose before it is blamed."""


def default_workers() -> int:
    """Half of the CPU cores this process may use, between 1 and 8."""
    return max(1, min(8, len(os.sched_getaffinity(0)) // 2))


@dataclass(slots=True, eq=False)
class Task:
    """A pair on its way through a worker."""

    pair: PreferencePair
    worker: int
    future: Future | None
    attempts: int = 1


class Workers:
    """Tokenises pairs in ``count`` processes; with 0, in the caller's own when a result is asked for.

    Pairs of one image go to one worker, which remembers the pixels. Processes are forked at once, so make this object
    before anything is put on a GPU.

    Args:
        processor: what the workers run.
        token_weights: weights of changed and unchanged tokens.
        count: number of processes.
        say: shown a line when a worker was lost.
    """

    def __init__(
        self,
        processor: Processor,
        token_weights: TokenWeights | None = None,
        count: int = 0,
        say: Callable[[str], None] = print,
    ) -> None:
        self.processor = processor
        self.num_lost = 0
        self._token_weights = token_weights
        self._say = say
        self._turns = itertools.cycle(range(count)) if count else None
        processor.remember_images(RECENT_IMAGES_BYTES // max(count, 1))
        self._pools = [self._new_pool() for _ in range(count)]

    def _new_pool(self) -> ProcessPoolExecutor:
        pool = ProcessPoolExecutor(
            1,
            mp_context=multiprocessing.get_context("fork"),
            initializer=_start,
            initargs=(self.processor, self._token_weights, os.getpid()),
        )
        pool.submit(_ready)  # forks now
        return pool

    def submit(self, pair: PreferencePair) -> Task:
        """Begin with a pair. Raises nothing; see :meth:`result`."""
        if self._turns is None:
            return Task(pair, 0, None)
        worker = next(self._turns)
        if pair.images:
            image = pair.images[0]
            worker = zlib.crc32(image[:4096] if isinstance(image, bytes) else str(image).encode()) % len(self._pools)
        return Task(pair, worker, self._begin(worker, pair))

    def _begin(self, worker: int, pair: PreferencePair) -> Future:
        try:
            return self._pools[worker].submit(_tokenize, pair)
        except BrokenProcessPool as error:  # told when the result is asked for, in order
            failed: Future = Future()
            failed.set_exception(error)
            return failed

    def result(self, task: Task) -> TokenizedPair | UserError:
        """Wait for a pair: its tokens, or what is wrong with it.

        Raises:
            UserError: if worker after worker was killed on it.
        """
        if task.future is None:
            return tokenize(self.processor, task.pair, self._token_weights)
        while True:
            try:
                return task.future.result()
            except BrokenProcessPool:
                pass
            if task.attempts == ATTEMPTS:
                raise UserError(
                    f"{task.pair.where}: row '{task.pair.id}': {ATTEMPTS} data workers were killed, the last on this "
                    "row; is there enough memory? (data.workers: 0 uses no processes)"
                )
            task.attempts += 1
            self._replace(task.worker)
            task.future = self._begin(task.worker, task.pair)

    def _replace(self, worker: int) -> None:
        """Start another process, unless an earlier pair of the lost one has seen to that."""
        try:
            self._pools[worker].submit(_ready)
        except BrokenProcessPool:
            self.num_lost += 1
            self._say("a data worker was killed (out of memory?); another took over, nothing is lost")
            self._pools[worker].shutdown(wait=False)
            self._pools[worker] = self._new_pool()

    def close(self) -> None:
        """End the processes."""
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_workers(config: Config) -> Workers:
    """The model's processor, and the processes that run it. No weights are loaded."""
    processor = Processor(config.policy.model, load_model_config(config.policy.model), config.data.image_backend)
    count = default_workers() if config.data.workers is None else config.data.workers
    return Workers(processor, config.token_weights, count)


def tokenize(
    processor: Processor, pair: PreferencePair, token_weights: TokenWeights | None
) -> TokenizedPair | UserError:
    """The pair's tokens, or what is wrong with it."""
    try:
        return processor.tokenize_pair(pair, token_weights)
    except UserError as error:
        return error


_mine: tuple[Processor, TokenWeights | None]
"""What this worker process runs; set by its start."""


def _start(processor: Processor, token_weights: TokenWeights | None, parent: int) -> None:
    global _mine
    _mine = processor, token_weights
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the trainer decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # A worker must not outlive a killed trainer, whose lock on the run folder it has inherited.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _ready() -> None:
    """The first task, so that the process is there."""


def _tokenize(pair: PreferencePair) -> TokenizedPair | UserError:
    processor, token_weights = _mine
    return tokenize(processor, pair, token_weights)
