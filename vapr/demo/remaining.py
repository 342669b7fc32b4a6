"""How much time a demo still takes: known proportions of its stages, at the speed that this machine shows."""

import time
from collections.abc import Mapping


class Remaining:
    """Keeps track of stages and says how long the rest will take.

    Args:
        costs: stage -> seconds that it takes on the machine of ``docs/demo.md``; only their proportions count, once
            anything is done.
    """

    def __init__(self, costs: Mapping[str, float]) -> None:
        self.costs = dict(costs)
        self.seconds: dict[str, float] = {}  # that finished stages took
        self.said: list[dict[str, float | str]] = []
        self._began = self._stage_began = time.monotonic()
        self._stage = ""

    def begin(self, stage: str) -> str:
        """Begin a stage, which ends the one before it; return "stage 2 of 6, about 4 min left"."""
        self.end()
        self._stage = stage
        self.said.append({"stage": stage, "after": time.monotonic() - self._began, "seconds_left": self.left()})
        return self.line()

    def end(self) -> None:
        """End the stage."""
        now = time.monotonic()
        if self._stage:
            self.seconds[self._stage] = now - self._stage_began
        self._stage, self._stage_began = "", now

    def left(self, share: float = 0.0) -> float:
        """Return the seconds that are left.

        Args:
            share: how much of the current stage is done, in [0, 1].
        """
        here = self.costs.get(self._stage, 0.0)
        done = sum(self.costs[stage] for stage in self.seconds) + share * here
        spent = sum(self.seconds.values()) + (time.monotonic() - self._stage_began if share else 0.0)
        # A machine is as fast as what it did so far; at the beginning, as fast as the one that was measured.
        pace = (spent + PRIOR) / (done + PRIOR)
        return pace * (sum(self.costs.values()) - done)

    def line(self, share: float = 0.0) -> str:
        """Return "stage 2 of 6, about 4 min left"."""
        number = list(self.costs).index(self._stage) + 1
        return f"stage {number} of {len(self.costs)}, {in_words(self.left(share))} left"


PRIOR = 5.0
"""Seconds for which the measured machine counts, so that the first moments of a run do not decide."""


def in_words(seconds: float) -> str:
    """Write a time as ``about 4 min`` or ``less than a minute``."""
    return f"about {seconds / 60:.0f} min" if seconds >= 60 else "less than a minute"
