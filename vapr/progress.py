"""Progress on the terminal: a bar with rate and ETA, or plain lines in a log."""

import math
import time
from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class Display:
    """A progress bar with rate and ETA on a terminal; plain lines, at most one every few seconds, in a log.

    ``quiet`` shows nothing: for a process whose parent shows what it does.
    """

    SECONDS_BETWEEN_LINES = 5.0

    def __init__(self, label: str, total: int, done: int = 0, unit: str = "step", *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, soft_wrap=True, highlight=False, quiet=quiet)
        self._label, self._total, self._unit = label, total, unit
        self._done, self._began, self._done_before = done, time.monotonic(), done
        self._last_line = -math.inf
        self._bar = None
        if self._console.is_terminal:
            self._bar = _Bar(
                TextColumn("{task.description}"), BarColumn(bar_width=10),
                TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}s"), _Rate(),
                TextColumn("ETA"), TimeRemainingColumn(), console=self._console,
            )  # fmt: skip
            self._task = self._bar.add_task(label, total=total, completed=done, note="", unit=unit)
            self._bar.start()

    def advance(self, note: str, amount: int = 1) -> None:
        """Count ``amount`` more units as done, and show the note beside them."""
        self._done += amount
        if self._bar is not None:
            self._bar.update(self._task, advance=amount, note=note)
            return
        now = time.monotonic()
        if now - self._last_line >= self.SECONDS_BETWEEN_LINES or self._done >= self._total:
            self._last_line = now
            rate = (self._done - self._done_before) / max(now - self._began, 1e-9)
            eta = (self._total - self._done) / rate if rate else math.inf
            done = f"{self._label} {self._unit} {self._done}/{self._total}"
            parts = (done, rate_in_words(rate, self._unit), note, f"ETA {_clock(eta)}")
            self._console.print(" | ".join(part for part in parts if part), markup=False)

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def note(self, note: str) -> None:
        """Show what happens between two steps."""
        if self._bar is not None:
            self._bar.update(self._task, note=note)
        elif time.monotonic() - self._last_line >= self.SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._console.print(f"{self._label} | {note}", markup=False)

    def say(self, line: str) -> None:
        """Print a line that stays, above the bar."""
        (self._bar.console if self._bar else self._console).print(line, markup=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class _Bar(Progress):
    """Bar, counts, rate and ETA in one line, the note in a line below, so that 80 columns hold both."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["note"]:
                yield Text(task.fields["note"], overflow="ellipsis", no_wrap=True)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(rate_in_words(task.speed, task.fields["unit"]))


def rate_in_words(rate: float | None, unit: str) -> str:
    """Write a rate as ``12.3 steps/s``, or ``2.0 s/step`` below one a second; empty if nothing is known yet."""
    if not rate:
        return ""
    if rate < 1:
        return f"{1 / rate:.1f} s/{unit}" if rate > 0.01 else f"{1 / rate:,.0f} s/{unit}"
    return f"{rate:.1f} {unit}s/s" if rate < 1000 else f"{rate:,.0f} {unit}s/s"


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "--:--"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"
