"""How many requests a server gets at once: half as many when it is too much for it, and slowly more again."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Iterator

TOO_MUCH = (429, 503)
"""Statuses by which a server says that it is asked too much."""
SLOW = 0.5
"""A reply that takes this share of the timeout has waited in the server's queue: the next ones would be lost."""


class Pace:
    """The number of requests in flight: additive increase, multiplicative decrease, as TCP has it.

    Args:
        most: never more than so many.
        timeout_seconds: after which a request is given up.

    Attributes:
        limit: requests that may be in flight now.
    """

    def __init__(self, most: int, timeout_seconds: float) -> None:
        self._most, self._slow_seconds = most, SLOW * timeout_seconds
        self.limit = float(most)
        self._lowered_at = self._resume_at = -1.0
        self._clear()

    def _clear(self) -> None:
        self._in_flight = 0
        self._first: deque[asyncio.Future[None]] = deque()
        self._again: deque[asyncio.Future[None]] = deque()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Begin without anybody waiting; what was learned about the server stays."""
        self._clear()
        try:
            yield
        finally:
            self._clear()

    # Who may send

    async def enter(self, *, again: bool = False) -> None:
        """Wait until one more request may be in flight; those that were refused before go first."""
        place = asyncio.get_running_loop().create_future()
        (self._again if again else self._first).append(place)
        self._let_in()
        await place

    def leave(self) -> None:
        """Give the place of a request to the next."""
        self._in_flight -= 1
        self._let_in()

    def _let_in(self) -> None:
        while self._in_flight < int(self.limit) and (self._again or self._first):
            place = (self._again or self._first).popleft()
            if not place.done():  # its task was cancelled
                self._in_flight += 1
                place.set_result(None)

    # What the server says

    def seconds_to_wait(self) -> float:
        """Return how long the server has asked everybody to wait from now."""
        return max(self._resume_at - time.monotonic(), 0.0)

    def answered(self, sent_at: float) -> None:
        """Take note of a reply to what was sent at ``sent_at``, in seconds of ``time.monotonic``."""
        if time.monotonic() - sent_at > self._slow_seconds:
            self.too_much(sent_at)
        else:
            self.limit = min(self.limit + 1 / self.limit, float(self._most))

    def too_much(self, sent_at: float, wait: float = 0.0) -> None:
        """Take note that the server was asked too much by what was sent at ``sent_at``: it is asked half as much.

        Once for all that were under way when that was noticed.

        Args:
            sent_at: in seconds of ``time.monotonic``.
            wait: seconds in which nothing is sent.
        """
        now = time.monotonic()
        self._resume_at = max(self._resume_at, now + wait)
        if sent_at > self._lowered_at:
            self._lowered_at = now
            self.limit = max(self.limit / 2, 1.0)
