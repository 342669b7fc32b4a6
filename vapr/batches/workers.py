"""Background processes that turn pairs into tokens and pixels. They never change the order; a lost one is replaced.

What is pickled goes through a pipe between a process and the child it forked, never to or from a file.
"""

import ctypes
import dataclasses
import itertools
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import traceback
import weakref
import zlib
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vapr.batches.families import load_model_config
from vapr.batches.model_folder import find_model
from vapr.batches.tokenize import ProcessedImage, Processor, TokenizedPair
from vapr.config import Config, TokenWeights
from vapr.data.pair import PreferencePair
from vapr.errors import UserError

RECENT_IMAGES_BYTES = 512 * 2**20
"""Processed images remembered by all workers together."""

ATTEMPTS = 3
"""Workers that a pair may lose before it is blamed."""

Result = TokenizedPair | UserError


def default_workers() -> int:
    """Half of the CPU cores this process may use, between 1 and 8."""
    return max(1, min(8, len(os.sched_getaffinity(0)) // 2))


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
        self._token_weights = token_weights
        self._turns = itertools.cycle(range(max(count, 1)))
        processor.remember_images(RECENT_IMAGES_BYTES // max(count, 1))
        self._workers = [_Worker(processor, token_weights, say) for _ in range(count)]
        self._end = weakref.finalize(self, _close, self._workers)  # also where nobody says close()

    @property
    def process_ids(self) -> list[int]:
        return [worker.process_id for worker in self._workers]

    def submit(self, pair: PreferencePair) -> Callable[[], Result]:
        """Begin with a pair; calling what is returned waits for its tokens, or what is wrong with it."""
        if not self._workers:
            return lambda: tokenize(self.processor, pair, self._token_weights)
        worker = next(self._turns)
        if pair.images:
            image = pair.images[0]
            worker = zlib.crc32(image if isinstance(image, bytes) else str(image).encode()) % len(self._workers)
        return self._workers[worker].submit(pair).result

    def close(self) -> None:
        """End the processes."""
        self._end()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _close(workers: "list[_Worker]") -> None:
    for worker in workers:
        worker.close()


class _Worker:
    """One process at a time, and the thread that feeds it and replaces it when it is lost."""

    _forking = threading.Lock()
    """A pipe's far end must be known to its own process alone, else the pipe does not close when that one is killed."""

    def __init__(self, processor: Processor, token_weights: TokenWeights | None, say: Callable[[str], None]) -> None:
        self._run = processor, token_weights
        self._say = say
        self._tasks: queue.SimpleQueue[tuple[PreferencePair, Future[Result]] | None] = queue.SimpleQueue()
        self._closed = False
        self._changing = threading.Lock()  # a process that is just being started must not escape close()
        # Pixels that some pair in the making still holds need not be sent again: image source -> pixels.
        self._held: weakref.WeakValueDictionary[Path | bytes, ProcessedImage] = weakref.WeakValueDictionary()
        self._start()
        self._thread = threading.Thread(target=self._feed, name="vapr-worker", daemon=True)
        self._thread.start()

    @property
    def process_id(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def submit(self, pair: PreferencePair) -> "Future[Result]":
        future: Future[Result] = Future()
        self._tasks.put((pair, future))
        return future

    def close(self) -> None:
        with self._changing:
            self._closed = True
            self._process.kill()
        self._tasks.put(None)
        self._thread.join()
        self._process.join()

    def _start(self) -> None:
        fork = multiprocessing.get_context("fork")
        with self._forking:
            self._pipe, far_end = fork.Pipe()
            self._process = fork.Process(target=_serve, args=(far_end, *self._run, os.getpid()), daemon=True)
            self._process.start()
            far_end.close()

    def _feed(self) -> None:
        while (task := self._tasks.get()) is not None:
            pair, future = task
            try:
                answer = self._ask(pair)
            except Exception as error:  # noqa: BLE001 - whoever waits for the pair has to hear of it
                answer = error
            if answer is None:
                return
            if isinstance(answer, TokenizedPair | UserError):
                future.set_result(answer)
            else:
                future.set_exception(answer)

    def _ask(self, pair: PreferencePair) -> Result | Exception | None:
        """The process's answer; None if it was closed meanwhile."""
        sources = [*pair.images, *(pair.rejected_images or ())]
        held = {image.content_hash: image for source in sources if (image := self._held.get(source)) is not None}
        for _ in range(ATTEMPTS):
            try:
                self._pipe.send((pair, frozenset(held)))
                answer: Result | Exception = _receive(self._pipe)
            except (EOFError, OSError):  # killed, perhaps in the middle of an answer
                with self._changing:
                    if self._closed:
                        return None
                    self._process.join()
                    self._start()
                self._say("a data worker was killed (out of memory?); another took over, nothing is lost")
            else:
                if isinstance(answer, TokenizedPair):
                    answer = _with_pixels(answer, held)
                    images = [answer.paths[0].images, answer.paths[1].images][: 1 + (pair.rejected_images is not None)]
                    self._held.update(zip(sources, itertools.chain(*images), strict=True))
                return answer
        message = f"{ATTEMPTS} data workers were killed on this row; is there enough memory?"
        return UserError(f"{pair.where}: row '{pair.id}': {message} (data.workers: 0 uses none)")


def _serve(pipe: Connection, processor: Processor, token_weights: TokenWeights | None, parent: int) -> None:
    """What a worker process does: answer pairs one by one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the trainer decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # A worker must not outlive a killed trainer.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    while True:
        pair, held = pipe.recv()
        answer: Result | Exception
        try:
            answer = tokenize(processor, pair, token_weights)
            if isinstance(answer, TokenizedPair):
                answer = _with_pixels(answer, dict.fromkeys(held, NO_PIXELS))
        except Exception as error:  # noqa: BLE001 - a fault of vapr's own: raised again in the trainer
            # As text: not every exception survives the way through a pipe.
            answer = RuntimeError(f"in a data worker, at {pair.where}: {error!r}\n{traceback.format_exc()}")
        _send(pipe, answer)


NO_PIXELS = np.empty(0, np.float32)


def _with_pixels(pair: TokenizedPair, pixels: dict[str, Any]) -> TokenizedPair:
    """The pair with each image that is named by its content in ``pixels`` replaced by that, or holding those pixels."""
    new: dict[str, ProcessedImage] = {}
    for image in (image for path in pair.paths for image in path.images):
        value = pixels.get(image.content_hash, image)
        if isinstance(value, np.ndarray):
            value = dataclasses.replace(image, pixel_values=value)
        new.setdefault(image.content_hash, value)
    paths = [dataclasses.replace(path, images=tuple(new[i.content_hash] for i in path.images)) for path in pair.paths]
    return dataclasses.replace(pair, paths=tuple(paths))


def _send(pipe: Connection, value: object) -> None:
    """Send arrays as they lie in memory, instead of copying them into a pickle first."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    pipe.send_bytes(len(buffers).to_bytes(4, "little") + head)
    for buffer in buffers:
        pipe.send_bytes(buffer.raw())


def _receive(pipe: Connection) -> Any:
    head = pipe.recv_bytes()
    buffers = [pipe.recv_bytes() for _ in range(int.from_bytes(head[:4], "little"))]
    return pickle.loads(memoryview(head)[4:], buffers=buffers)


def open_workers(config: Config) -> Workers:
    """The model's processor, and the processes that run it. No weights are loaded."""
    model = find_model(config.policy.model, config.policy.base).model
    processor = Processor(model, load_model_config(model), config.data.image_backend)
    count = default_workers() if config.data.workers is None else config.data.workers
    return Workers(processor, config.token_weights, count)


def tokenize(processor: Processor, pair: PreferencePair, token_weights: TokenWeights | None) -> Result:
    """The pair's tokens, or what is wrong with it."""
    try:
        return processor.tokenize_pair(pair, token_weights)
    except UserError as error:
        return error
