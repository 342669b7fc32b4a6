"""The user's own checks: regular expressions and a Python function, in a process that may hang or die without harm."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vapr.data.pair import Edit
from vapr.editing.config import CheckConfig
from vapr.editing.draft import own_check_process
from vapr.editing.draft.checks import Verdict
from vapr.editing.rules.categories import Category
from vapr.editing.rules.turns import Turn
from vapr.errors import UserError

OWN_CHECK = "own check"
NO_VERDICT = "own check without verdict"
PATTERN = "pattern"
LOAD_SECONDS = 300.0
"""Longest time for the user's file to be imported: it may import torch."""
GRACE_SECONDS = 5.0
"""Time over after which the process ends itself: vapr, which would have ended it, is gone."""
GIVE_UP_AFTER = 20
"""Pairs in a row that end the process or its time; what comes after them is not tried, or a job would wait for days."""


def file_of(config: CheckConfig) -> Path | None:
    """Return the file of the user's function, if there is one.

    Raises:
        UserError: if it is not there.
    """
    if config.python is None:
        return None
    file = Path(config.python.rpartition(":")[0])
    if not file.is_file():
        raise UserError(f"checks.python: {file}: no such file")
    return file


class NoVerdict(Exception):
    """The user's check has not said anything about a pair; the message is the reason."""


class OwnChecks:
    """The checks of a config that are the user's own.

    Args:
        config: the settings; ``patterns`` and ``python`` are read.

    Raises:
        UserError: if the file of the function cannot be loaded, in one line.
    """

    def __init__(self, config: CheckConfig) -> None:
        file, self._where = file_of(config), config.python
        self._seconds = config.python_seconds
        self._names = [*([PATTERN] if config.patterns else []), *([OWN_CHECK] if config.python else [])]
        self._settings = {
            "file": str(file.absolute()) if file is not None else None,
            "function": (config.python or "").rpartition(":")[2],
            "patterns": config.patterns,
            "seconds": config.python_seconds,
            "load_seconds": LOAD_SECONDS,
            "grace_seconds": GRACE_SECONDS,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""
        self._in_vain = 0
        try:
            self._start()
        except NoVerdict as error:
            raise UserError(f"checks.python {self._where}: {error}") from None

    def judge(self, turn: Turn, rejected: str, edits: Sequence[Edit], category: Category) -> list[Verdict]:
        """Return the verdicts on a pair, one for each kind of check that came to it.

        Raises:
            NoVerdict: if the user's function fails, hangs, ends its process, or returns what is no verdict.
        """
        if self._in_vain >= GIVE_UP_AFTER:
            raise NoVerdict(f"not tried any more: {GIVE_UP_AFTER} in a row ended its process or took too long")
        try:
            if self._process is None:
                self._start()
            reply = self._ask(_as_dict(turn, rejected, edits, category))
        except NoVerdict:
            self._in_vain += 1
            raise
        self._in_vain = 0
        if (broken := reply.get("broken")) is not None:
            raise NoVerdict(broken)
        if (pattern := reply.get("pattern")) is not None:
            return [Verdict(PATTERN, False, note=f"{pattern} is found in the result, and must not be")]
        passed = [Verdict(name, True) for name in self._names]
        if (refused := reply.get("refused")) is not None:
            return [*passed[:-1], Verdict(OWN_CHECK, False, note=refused)]
        return passed

    def close(self) -> None:
        """End the process."""
        if self._process is None:
            return
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)  # with what the function has started
        self._process.wait()
        self._process, self._rest = None, b""

    def _start(self) -> None:
        command = [sys.executable, own_check_process.__file__, json.dumps(self._settings)]
        # A session of its own: Ctrl-C is vapr's, which then ends the process.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        reply = self._read(LOAD_SECONDS, f"was not loaded within {LOAD_SECONDS:g} s")
        if problem := reply.get("problem"):
            self.close()
            raise NoVerdict(problem)

    def _ask(self, pair: dict[str, Any]) -> dict[str, Any]:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is gone, which the reading says
            self._process.stdin.write(json.dumps(pair).encode() + b"\n")
            self._process.stdin.flush()
        return self._read(self._seconds, f"no answer within {self._seconds:g} s")

    def _read(self, seconds: float, too_late: str) -> dict[str, Any]:
        """Return the next reply; a process that does not give one in time is ended, and the next pair has a new one."""
        assert self._process is not None and self._process.stdout is not None
        pipe, end = self._process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._rest:
            ready, _, _ = select.select([pipe], [], [], max(0.0, end - time.monotonic()))
            piece = os.read(pipe, 1 << 16) if ready else b""
            if not piece:
                process = self._process
                code = None if not ready else _exit_code(process)
                self.close()
                raise NoVerdict(too_late if not ready else f"its process has ended ({code})")
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        return dict(json.loads(line))


def _exit_code(process: "subprocess.Popen[bytes]") -> str:
    try:
        code = process.wait(1)
    except subprocess.TimeoutExpired:  # it has closed its pipe and lives on
        return "no answer"
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def _as_dict(turn: Turn, rejected: str, edits: Sequence[Edit], category: Category) -> dict[str, Any]:
    """Return a pair as the user's function gets it: plain data, all that a text check can want."""
    return {
        "question": turn.question,
        "chosen": turn.answer,
        "rejected": rejected,
        "category": category.name,
        "edits": [{"start": e.start, "end": e.end, "from": turn.answer[e.start : e.end], "to": e.to} for e in edits],
        "earlier": [
            {"role": message["role"], "text": "".join(part.get("text", "") for part in message["content"])}
            for message in turn.prompt[:-1]
        ],
        "images": [str(image) if isinstance(image, Path) else None for image in turn.images],
        "source": turn.source,
        "source_id": turn.source_id,
        "place": turn.where,
    }
