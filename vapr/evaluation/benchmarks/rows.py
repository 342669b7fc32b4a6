"""Rows of a benchmark's own files, JSON and JSON lines. Tables are turned into such files by the readers."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vapr.errors import UserError, one_line
from vapr.evaluation.scoring.prediction import read_json_lines


def read_json(path: Path) -> Any:
    """Read a file that holds one JSON document.

    Raises:
        UserError: if it cannot be read, or is cut short or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON, or cut short ({one_line(error)}); get or write it again") from None


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the columns of each row of a .jsonl or .json file.

    A .json file holds a list of rows, an object whose ``questions`` are that list, or one row a line.

    Raises:
        UserError: for a file of another kind, one that cannot be read, or a row that is no object.
    """
    if path.suffix not in (".json", ".jsonl"):
        raise UserError(f"{path}: unknown file type; use .json or .jsonl")
    if path.suffix == ".jsonl" or _is_lines(path):
        for number, row in read_json_lines(path):
            yield f"{path}:{number}", row
        return
    rows = read_json(path)
    if isinstance(rows, dict):
        rows = rows.get("questions", [rows])
    if not isinstance(rows, list):
        raise UserError(f"{path}: a JSON {type(rows).__name__}, not a list of rows")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {number}: a JSON {type(row).__name__}, not an object with keys")
        yield f"{path}, row {number}", row


def files_of(path: Path, patterns: Sequence[str], where_from: str) -> list[Path]:
    """Return the files of a folder that match the first pattern that any matches; a file is returned itself.

    Raises:
        UserError: if there is none, saying where to get them.
    """
    if not path.is_dir():
        return [path]
    for pattern in patterns:
        if files := sorted(path.glob(pattern)):
            return files
    raise UserError(f"{path}: no {' or '.join(patterns)} in it; get them from {where_from}")


def require(row: Mapping[str, Any], where: str, keys: Sequence[str], what: str) -> None:
    """Refuse a row without one of the keys.

    Raises:
        UserError: naming it, and what a row of this kind has.
    """
    if missing := [key for key in keys if row.get(key) is None]:
        raise UserError(f"{where}: no '{missing[0]}'; {what} has {', '.join(keys)}")


def pictures(value: Any, folder: Path) -> tuple[Path, ...]:
    """Return the pictures that a row names, from ``folder`` on; None and "" name none."""
    names = value if isinstance(value, list) else [value]
    return tuple(folder / str(name) for name in names if name not in (None, ""))


def _is_lines(path: Path) -> bool:
    """Return whether the first line of a .json file is a whole object, and another follows."""
    try:
        with path.open("rb") as file:
            first, second = file.readline(), file.readline()
        return isinstance(json.loads(first), dict) and bool(second.strip())
    except (OSError, ValueError, RecursionError):
        return False
