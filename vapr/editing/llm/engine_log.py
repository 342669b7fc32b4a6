"""Keeps the output of an engine and its processes off the terminal, and finds the cause of a fault in it."""

import contextlib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vapr.errors import one_line

CAUSE = re.compile(r"\b(\w+(?:Error|Exception): \S.*)")
ELSEWHERE = "root cause"
"""The words by which vLLM says that another process knows: "See stack trace (above) for the root cause"."""


class EngineLog:
    """A temporary file that an engine's own processes write into as long as they live: they inherit its descriptors.

    Where an engine fails it prints tens of thousands of characters; users get one line, and the name of this file.
    """

    def __init__(self) -> None:
        descriptor, name = tempfile.mkstemp(prefix="vapr-engine-", suffix=".log")
        self._file = Path(name)
        self._stream = os.fdopen(descriptor, "a", encoding="utf-8", errors="replace")
        self._kept = False

    @contextlib.contextmanager
    def taking_the_terminal(self) -> Iterator[None]:
        """Send stdout and stderr of this process, and for good those of the processes it starts inside, to the file."""
        with contextlib.ExitStack() as back:
            for number, stream in ((1, sys.stdout), (2, sys.stderr)):
                stream.flush()
                before = os.dup(number)
                back.callback(os.close, before)
                back.callback(os.dup2, before, number)
                back.callback(stream.flush)
                os.dup2(self._stream.fileno(), number)
            yield

    def take(self, logger: str) -> None:
        """Have the handlers of a logger of this process write into the file."""
        for handler in logging.getLogger(logger).handlers:
            if type(handler) is logging.StreamHandler:  # not one that somebody has made of it, to read what is logged
                handler.setStream(self._stream)

    def cause(self, error: BaseException) -> str:
        """Return the engine's last error line: the exception's, unless that says that the cause is elsewhere."""
        said = f"{type(error).__name__}: {one_line(error)}".removesuffix(": ")
        if ELSEWHERE not in said:
            return said
        self._stream.flush()
        lines = self._file.read_text(encoding="utf-8", errors="replace").splitlines()
        causes = [match[1] for line in lines if (match := CAUSE.search(line)) and ELSEWHERE not in line]
        return " ".join(causes[-1].split())[:300] if causes else said

    def keep(self) -> Path:
        """Return the file, which outlives :meth:`close` from now on."""
        self._kept = True
        return self._file

    def close(self) -> None:
        """Delete the file unless somebody was told of it. What is still written goes nowhere."""
        if not self._kept:
            self._file.unlink(missing_ok=True)
