"""Claims a folder for a job: settings of another job are refused, unless nothing has come of that one yet."""

import time
import uuid
from pathlib import Path
from typing import Any

from vapr.editing.config import EditConfig
from vapr.editing.job.json_files import write_json, write_json_once
from vapr.editing.job.leases import Lease, any_held, take
from vapr.editing.job.scan import SCAN, TRUTHS, TURNS
from vapr.errors import UserError

JOB, EDITOR, SHARDS, LEASES = "job.json", "editor.json", "shards", "leases"
ID = "id"
"""The key of a job's settings that tells it from another one of the same settings, wherever its folder is moved."""
AT_WORK = "at-work"
WAIT_SECONDS = 1.0
OF_A_START = ("engine", "editors")
"""Keys of the config that a job's settings leave out: how models are run, and editors, whose servers may move."""
HASHES = {
    "source.digest": "the rows of the source have changed",
    "prompts": "prompts or categories have changed",
    "own_check": "the file of checks.python has changed",
}
"""Settings that are hashes, with what a difference means to a user."""


def claim_folder(folder: Path, described: dict[str, Any]) -> Lease:
    """Make or find the folder of a job.

    Args:
        folder: the folder of the job.
        described: the settings of the job.

    Returns:
        A lease that keeps the folder from jobs of other settings as long as no editor is noted in it.

    Raises:
        UserError: if the folder belongs to another job or to no job.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        used = any(file.name != LEASES and not file.name.startswith(".") for file in folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be made a folder ({error.strerror or error})") from None
    if used and not (folder / JOB).exists():
        raise UserError(f"{folder}: holds files but no edit job; give a new folder with --out")
    while (alone := take(folder / LEASES, "claim")) is None:
        time.sleep(WAIT_SECONDS / 10)
    with alone:  # nobody else begins or withdraws a job here until this process is known to be at work
        problem = _other_settings(folder, described)
        if problem is not None and _is_untouched(folder) and not any_held(folder / LEASES, AT_WORK):
            for name in (SCAN, TURNS, TRUTHS):
                (folder / name).unlink(missing_ok=True)
            write_json(folder / JOB, described | {ID: uuid.uuid4().hex})
            problem = _other_settings(folder, described)
        if problem is not None:
            raise UserError(f"{folder}: holds a job of other settings: {problem}; use them, or give another --out")
        lease = take(folder / LEASES, f"{AT_WORK}-{uuid.uuid4().hex}")
        assert lease is not None
        return lease


def _other_settings(folder: Path, described: dict[str, Any]) -> str | None:
    found = write_json_once(folder / JOB, described | {ID: uuid.uuid4().hex})
    if isinstance(found.get("config"), dict):  # of an older version, which did what a newer key's default says
        found["config"] = _completed(found["config"], EditConfig().as_dict())
    for key, ours, theirs in differences(described, found):
        if key not in ("vapr", "source.path", ID):  # the digest says whether the rows are the same
            return HASHES.get(key, f"{key} is {theirs}, not {ours}")
    return None


def _completed(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return a config with the defaults of the keys that it lacks."""
    lacking = {key: value for key, value in defaults.items() if key not in config and key not in OF_A_START}
    deeper = {
        key: _completed(value, defaults[key])
        for key, value in config.items()
        if isinstance(value, dict) and isinstance(defaults.get(key), dict)
    }
    return {**config, **lacking, **deeper}


def _is_untouched(folder: Path) -> bool:
    return not (folder / EDITOR).exists() and not any((folder / SHARDS).glob("*.json"))


def differences(ours: Any, theirs: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Return the dotted keys whose values differ, with both values."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        found = []
        for name in dict.fromkeys([*ours, *theirs]):
            found += differences(ours.get(name), theirs.get(name), f"{key}.{name}".lstrip(".").removeprefix("config."))
        return found
    return [] if ours == theirs else [(key, ours, theirs)]
