"""How a run ends before its last step: by a signal, or for a reason that is no mistake of the config."""

import signal
import threading
from pathlib import Path
from types import FrameType


class TrainingStopped(Exception):
    """The run ended before its last step, for a reason that is no mistake of the config."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Interrupts:
    """SIGTERM and the first Ctrl-C let the step finish and be checkpointed; the second Ctrl-C stops at once."""

    def __enter__(self) -> "Interrupts":
        self.received: signal.Signals | None = None
        in_main = threading.current_thread() is threading.main_thread()  # the only one that may set handlers
        numbers = (signal.SIGTERM, signal.SIGINT) if in_main else ()
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
