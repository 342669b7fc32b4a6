"""Write down what a step did once the next one was given to the device, which then has no need to wait for the host."""

from collections.abc import Callable
from typing import Generic, TypeVar

Step = TypeVar("Step")


class LateLines(Generic[Step]):
    """Steps in their order, each of which is written when the next one comes, or when nothing may be due any more.

    Args:
        write: writes one down, and waits for the device to have done it. What it raises ends the run.
    """

    def __init__(self, write: Callable[[Step], None]) -> None:
        self._write = write
        self._due: Step | None = None

    @property
    def is_due(self) -> bool:
        """Tell whether a step was not written down yet."""
        return self._due is not None

    def add(self, step: Step) -> None:
        """Take a step, and write down the one before."""
        before, self._due = self._due, step
        self._write_one(before)

    def catch_up(self) -> None:
        """Write down what is due: before whatever reads the run's files, tells how far it is, or ends it."""
        due, self._due = self._due, None
        self._write_one(due)

    def _write_one(self, step: Step | None) -> None:
        if step is None:
            return
        try:
            self._write(step)
        except BaseException:
            self._due = None  # no later step is written where this one is missing
            raise
