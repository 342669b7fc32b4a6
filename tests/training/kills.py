"""Runs in processes of their own that are killed at the n-th line of vapr's code, and what is left of them."""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import vapr
from tests.several_ranks import SERVER
from vapr.config import Config
from vapr.errors import UserError
from vapr.interrupts import Stopped
from vapr.model import sharded_cache
from vapr.training import trainer
from vapr.training.ledger import read_ledger

SECONDS = 200.0
"""Longest wait for a process; a test that goes wrong ends all the same."""

VAPR = Path(vapr.__file__).parent
FILES = {
    "steps": ["training/trainer.py", "training/step.py", "training/engine.py", "training/metrics.py", "training/ledger.py"],
    "checkpoints": ["training/checkpoint.py", "training/checksums.py", "training/run_state.py", "cache.py", shutil.__file__],
    "caches": ["model/sharded_cache.py", "model/reference.py", "cache.py"],
    "final": ["training/checkpoint.py", shutil.__file__],
}  # fmt: skip
"""Where each kind of kill may happen: before any line of these files."""
ONLY_UNDER = {"final": "save_final"}
"""A function in whose calls alone it may."""


class Lines:
    """Counts the lines of each kind that are about to be run, and kills this process at one of them.

    Args:
        deadly: kind, and number of the line from 1; None only counts.
    """

    def __init__(self, deadly: tuple[str, int] | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self._deadly = deadly
        self._inside: Counter[str] = Counter()  # calls of the functions in ONLY_UNDER that have not returned
        self._kinds: dict[str, list[str]] = {}  # by file
        for kind, names in FILES.items():
            for name in names:
                self._kinds.setdefault(str(VAPR / name), []).append(kind)

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Be the tracer of :func:`sys.settrace`."""
        if frame.f_code.co_filename not in self._kinds:
            return None
        if frame.f_code.co_name in ONLY_UNDER.values():
            self._inside[frame.f_code.co_name] += 1
        return self._line

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            for kind in self._kinds[frame.f_code.co_filename]:
                if kind not in ONLY_UNDER or self._inside[ONLY_UNDER[kind]]:
                    self.counts[kind] += 1
                    if self._deadly == (kind, self.counts[kind]):
                        os.kill(os.getpid(), signal.SIGKILL)
        if event == "return" and frame.f_code.co_name in ONLY_UNDER.values():
            self._inside[frame.f_code.co_name] -= 1
        return self._line


def count_lines(config: Config) -> Counter[str]:
    """Train in a process of its own, and return how many lines of each kind that took."""
    receiver, sender = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=_live, args=(dict(os.environ), config, None, sender))
    process.start()
    process.join(SECONDS)
    assert process.exitcode == 0
    return receiver.recv()


def killed_at(kind: str, line: int, config: Config) -> bool:
    """Train in a process that is killed at the n-th line of a kind; tell whether it was, or ended before."""
    process = SERVER.Process(target=_live, args=(dict(os.environ), config, (kind, line)))
    process.start()
    process.join(SECONDS)
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode != 0


def _live(environment: dict[str, str], config: Config, deadly: tuple[str, int] | None, sender: Any = None) -> None:
    os.environ.update(environment)
    sharded_cache.FLUSH_BYTES = 2000  # several shards a step, so that kills fall between them
    lines = Lines(deadly)
    sys.settrace(lines)
    train_quietly(config)
    sys.settrace(None)
    if sender is not None:
        sender.send(lines.counts)


def train_quietly(config: Config) -> None:
    """Train as ``vapr train`` does, with ``--resume`` where there is something."""
    with Path(os.devnull).open("w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        trainer.train(config, resume=Path(config.run_dir).exists())


def train_as_rank(config: Config, killed_rank: int, deadly: tuple[str, int] | None) -> None:
    """Be one of several ranks, one of which may be killed at a line; write how many lines there were."""
    sharded_cache.FLUSH_BYTES = 2000
    lines = Lines(deadly if int(os.environ["RANK"]) == killed_rank else None)
    sys.settrace(lines)
    try:
        trainer.train(config, resume=Path(config.run_dir).exists())
    except (UserError, Stopped) as error:  # as the command line ends
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else error.exit_code)
    sys.settrace(None)
    print(json.dumps(lines.counts))


def consumed(config: Config) -> Counter[str]:
    """How often each id is in the ledger of a run, whose steps must stand in it once and in order."""
    entries = list(read_ledger(Path(config.run_dir)))
    assert [entry["step"] for entry in entries] == list(range(1, len(entries) + 1))
    return Counter(id for entry in entries for id in entry["ids"])


@contextlib.contextmanager
def without_roots_rights() -> Iterator[None]:
    """Have files' permissions count for root, too: take away the capabilities that pass over them (capabilities(7))."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, before = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, before)
    without = (ctypes.c_uint32 * 6)(*before)
    without[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, of those in effect
    assert libc.capset(header, without) == 0
    try:
        yield
    finally:
        libc.capset(header, before)
