"""How a command ends before it is done: by a signal, or for a reason that is no mistake of the config."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType


class Stopped(Exception):
    """The command ended early: one line for the user, and an exit code."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class TrainingStopped(Stopped):
    """The run ended before its last step, for a reason that is no mistake of the config."""


class Interrupts:
    """SIGTERM and the first Ctrl-C let the step finish and be checkpointed; the second Ctrl-C stops at once."""

    def __enter__(self) -> "Interrupts":
        self.received: signal.Signals | None = None
        numbers = (signal.SIGTERM, signal.SIGINT) if _in_main_thread() else ()
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def stopped(self, saved: Path) -> TrainingStopped:
        assert self.received is not None
        message = f"{self.received.name}: stopped after writing {saved}; continue with --resume"
        return TrainingStopped(message, 128 + self.received)


@contextlib.contextmanager
def stopped_at_once(message: Callable[[], str]) -> Iterator[None]:
    """SIGTERM and Ctrl-C end what runs inside, wherever it is: for work of which nothing half done counts.

    Args:
        message: for the user.

    Raises:
        Stopped: after a signal.
    """
    received = [signal.SIGINT]

    def stop(number: int, frame: FrameType | None) -> None:
        received[0] = signal.Signals(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop) if _in_main_thread() else None
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(f"{received[0].name}: {message()}", 128 + received[0]) from None
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _in_main_thread() -> bool:
    """The only thread that may set handlers."""
    return threading.current_thread() is threading.main_thread()
