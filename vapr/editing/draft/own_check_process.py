"""The process of a user's own checks, started by path: it imports nothing of vapr, so that it is ready at once.

One line of JSON comes in for each pair, one goes out. What the user's function prints goes to stderr.
"""

import contextlib
import importlib.util
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def main() -> None:
    """Load the function, say so, and judge pairs until nobody asks any more."""
    settings = json.loads(sys.argv[1])
    # The function's own stdin and stdout are others: what it reads and prints is not what vapr asks and is told.
    pairs, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)

    def reply(**content: Any) -> None:
        replies.write(json.dumps(content) + "\n")
        replies.flush()

    patterns = [(pattern, re.compile(pattern, re.IGNORECASE)) for pattern in settings["patterns"]]
    function = None
    if settings["file"] is not None:
        sys.path[0] = str(Path(settings["file"]).parent)  # the user's modules, and not those beside this one
        with _ending_itself(settings["load_seconds"] + settings["grace_seconds"]):
            function, problem = _load(settings["file"], settings["function"])
        if problem is not None:
            reply(problem=problem)
            return
    reply(ready=True)
    for line in pairs:
        with _ending_itself(settings["seconds"] + settings["grace_seconds"]):
            result = _judge(json.loads(line), patterns, function, settings["file"])
        reply(**result)


@contextlib.contextmanager
def _ending_itself(seconds: float) -> Iterator[None]:
    """Have the kernel end this process where code hangs and vapr, which ends it sooner, is gone."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)


def _load(file: str, name: str) -> tuple[Callable[[dict[str, Any]], Any] | None, str | None]:
    """Return the function of a file, or the problem."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # what dataclasses and pickle want
    try:
        spec.loader.exec_module(module)
    except BaseException as error:  # noqa: BLE001 - the user's code may raise anything
        return None, _told(error, file)
    function = getattr(module, name, None)
    if not callable(function):
        return None, f"has no function '{name}'"
    return function, None


def _judge(
    pair: dict[str, Any], patterns: list[tuple[str, re.Pattern[str]]], function: Callable[..., Any] | None, file: str
) -> dict[str, str]:
    """Return ``pattern`` or ``refused``, why a pair does not pass; ``broken``, why nobody knows; or nothing."""
    for text, pattern in patterns:
        if pattern.search(pair["rejected"]):
            return {"pattern": text}
    if function is None:
        return {}
    try:
        result = function(pair)
    except BaseException as error:  # noqa: BLE001 - sys.exit() as well
        return {"broken": _told(error, file)}
    if type(result).__name__ in ("bool", "bool_"):  # numpy's, too
        return {} if result else {"refused": "refused"}
    if result is None:
        return {}
    if isinstance(result, str) and result.strip():
        return {"refused": _one_line(result)}
    shown = "an empty text" if isinstance(result, str) else f"{_shown(result)} ({type(result).__name__})"
    return {"broken": f"returned {shown} instead of True, None, False or a reason"}


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.40}"
    except BaseException:  # noqa: BLE001 - the user's own repr
        return "something"


def _told(error: BaseException, file: str) -> str:
    """Return an exception in one line, with the last line of the user's file that it went through."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
        lines.append(error.lineno)
    try:
        message = str(error)
    except BaseException:  # noqa: BLE001 - the user's own exception
        message = ""
    name = type(error).__name__
    told = _one_line(f"{name}: {message}" if message else name)
    return f"{told} ({Path(file).name} line {lines[-1]})" if lines else told


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    main()
