"""Whose folder it is: of the settings that a job was begun with. If nothing has come of them, others may have it."""

import contextlib
import json
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic

from vapr.cache import written_whole
from vapr.editing.job.leases import Lease, anyone, take
from vapr.editing.job.scan import SCAN, TRUTHS, TURNS
from vapr.errors import UserError, one_line

JOB, EDITOR, SHARDS, LEASES = "job.json", "editor.json", "shards", "leases"
AT_WORK = "at-work"
WAIT_SECONDS = 1.0
ANY = pydantic.TypeAdapter(dict[str, Any])
BEGIN_AGAIN = "begin again in a new folder"
HAVE_CHANGED = {
    "source.digest": "the rows of the source have changed",
    "prompts": "prompts or categories have changed",
}
"""What a hash does not say."""


def claim_folder(folder: Path, described: dict[str, Any]) -> Lease:
    """Make or find the folder of a job; what is returned keeps it from others while no editor is noted in it.

    Raises:
        UserError: if it is of another job or not of a job.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = any(file.name != LEASES and not file.name.startswith(".") for file in folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be made a folder ({error.strerror or error})") from None
    if there and not (folder / JOB).exists():
        raise UserError(f"{folder}: holds files but no edit job; give a new folder with --out")
    while (alone := take(folder / LEASES, "claim")) is None:
        time.sleep(WAIT_SECONDS / 10)
    with alone:  # nobody else begins or withdraws a job here until this process is known to be at work
        problem = _other_job(folder, described)
        if problem is not None and _nothing_done(folder) and not anyone(folder / LEASES, AT_WORK):
            for name in (SCAN, TURNS, TRUTHS):
                (folder / name).unlink(missing_ok=True)
            with written_whole(folder / JOB) as stream:
                stream.write(_as_json(described))
            problem = _other_job(folder, described)
        if problem is not None:
            raise UserError(f"{folder}: holds a job of other settings: {problem}; use them, or give another --out")
        lease = take(folder / LEASES, f"{AT_WORK}-{uuid.uuid4().hex}")
        assert lease is not None
        return lease


def _other_job(folder: Path, described: dict[str, Any]) -> str | None:
    known = claim(folder / JOB, described)
    for key, ours, theirs in differences(described, known):
        if key not in ("vapr", "source.path"):  # the digest says whether the rows are the same
            return HAVE_CHANGED.get(key, f"{key} is {theirs}, not {ours}")
    return None


def _nothing_done(folder: Path) -> bool:
    return not (folder / EDITOR).exists() and not any((folder / SHARDS).glob("*.json"))


def claim(file: Path, described: dict[str, Any]) -> dict[str, Any]:
    """Write a description if there is none yet, and return the one that is there. Of several processes one writes.

    Raises:
        UserError: if the file can be neither written nor read.
    """
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        if not file.exists():
            with written_whole(temporary) as stream:
                stream.write(_as_json(described))
            with contextlib.suppress(FileExistsError):
                os.link(temporary, file)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return read_json(file)


def _as_json(described: Mapping[str, Any]) -> bytes:
    return json.dumps(described, indent=1, ensure_ascii=False).encode(errors="replace") + b"\n"


def read_json(file: Path, shape: pydantic.TypeAdapter[Any] = ANY, or_else: str = BEGIN_AGAIN) -> dict[str, Any]:
    """An object in a file.

    Args:
        file: that vapr wrote.
        shape: that it must have.
        or_else: what can be done if it is damaged and cannot be restored.

    Raises:
        UserError: if it is damaged.
    """
    try:
        text = file.read_bytes()
        shape.validate_json(text, strict=True)
        return dict(json.loads(text))
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        found = ": ".join([*map(str, problem["loc"]), problem["msg"]])
    except (OSError, ValueError, TypeError) as error:
        found = one_line(error)
    raise UserError(f"{file}: cannot be read ({found}); restore it, or {or_else}")


def differences(ours: Any, theirs: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted keys whose values differ, with both values."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        found = []
        for name in dict.fromkeys([*ours, *theirs]):
            found += differences(ours.get(name), theirs.get(name), f"{key}.{name}".lstrip(".").removeprefix("config."))
        return found
    return [] if ours == theirs else [(key, ours, theirs)]
