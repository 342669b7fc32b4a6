"""Ways in which a command ends before it is done: by a signal, or for a reason that is no mistake of the config."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

END = b"\0"  # no signal has this number


class Stopped(Exception):
    """The command ended early: one line for the user, and an exit code."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class TrainingStopped(Stopped):
    """The run ended before its last step, for a reason that is no mistake of the config."""


class Interrupts:
    """SIGTERM and the first Ctrl-C let the step finish and be checkpointed; the second Ctrl-C stops at once.

    The first one is answered at once, even in the middle of a long backward pass: Python's own handlers would wait for
    its end, so a thread reads what the interpreter writes for each signal (``signal.set_wakeup_fd``).

    Args:
        say: shows a line; called from that thread.

    Attributes:
        received: the signal that this process has received.
        shared: the one that all ranks know of, and act on at the same place.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self.received: signal.Signals | None = None
        self.shared: signal.Signals | None = None

    def __enter__(self) -> "Interrupts":
        self._before: dict[signal.Signals, Any] = {}
        if _in_main_thread():
            reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._answering = threading.Thread(target=self._answer, args=(reader,), daemon=True)
            self._answering.start()
            self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.write(self._writer, END)
        self._answering.join()
        os.close(self._writer)

    def _answer(self, reader: int) -> None:
        answered = False
        while (byte := os.read(reader, 1)) != END:
            if byte[0] in self._before and not answered:
                answered = True
                name = signal.Signals(byte[0]).name
                self._say(f"{name}: finishing this step, then a checkpoint follows; Ctrl-C again ends now")
        os.close(reader)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def share(self, number: float) -> bool:
        """Take note of what all ranks have heard of when they said so together; tell whether that is a signal.

        ``number`` is the largest of their ``received``, 0 for none. A signal that comes to one rank later waits for the
        next time: it must not decide alone what all of them do.
        """
        self.shared = signal.Signals(int(number)) if number else None
        return self.shared is not None

    def stopped(self, saved: Path) -> TrainingStopped:
        """Return the exception that ends the run after its checkpoint ``saved``."""
        received = self.shared or self.received
        assert received is not None
        message = f"{received.name}: stopped after writing {saved}; continue with --resume"
        return TrainingStopped(message, 128 + received)


@contextlib.contextmanager
def stopped_at_once(message: Callable[[], str]) -> Iterator[None]:
    """End what runs inside at SIGTERM or Ctrl-C, wherever it is, because nothing half done of it counts.

    Args:
        message: gives the line for the user, once the work has ended.

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
    """Return whether this is the main thread, the only one that may set handlers."""
    return threading.current_thread() is threading.main_thread()
