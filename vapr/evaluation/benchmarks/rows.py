"""Rows of a benchmark's own files, JSON, JSON lines, CSV or TSV, and the pictures beside them."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vapr.errors import UserError, one_line
from vapr.evaluation.scoring.prediction import read_json_lines
from vapr.yaml_file import read_text

DELIMITERS = {".csv": ",", ".tsv": "\t"}

Placed = tuple[str, dict[str, Any]]
"""A row behind its place, for messages."""


def read_json(path: Path) -> Any:
    """Read a file that holds one JSON document.

    Raises:
        UserError: if it cannot be read, or is cut short or damaged.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg}); is the file whole? Copy it again") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({one_line(error)}); is the file whole? Copy it again") from None


def read_rows(path: Path) -> Iterator[Placed]:
    """Yield place and columns of each row.

    A .json file holds a list of rows, an object whose ``questions`` are that list, or one row a line.

    Raises:
        UserError: for a file of another kind, one that cannot be read, or a row that is none.
    """
    if path.suffix in DELIMITERS:
        yield from _delimited(path)
        return
    if path.suffix not in (".json", ".jsonl"):
        what = "a folder" if path.is_dir() else f"a file that ends in '{path.suffix}'"
        raise UserError(f"{path}: {what}; rows are read from .jsonl, .json, .csv or .tsv")
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


def read_objects(path: Path, keys: Sequence[str], what: str) -> list[Placed]:
    """Read all rows of a file, each of which has the keys; a value may be null.

    Raises:
        UserError: naming file and row of what cannot be used.
    """
    rows = list(read_rows(path))
    for where, row in rows:
        if missing := [key for key in keys if key not in row]:
            raise _lacks(where, row, missing[0], keys, what)
    return rows


def require(row: Mapping[str, Any], where: str, keys: Sequence[str], what: str) -> None:
    """Refuse a row without one of the keys, or with null under it.

    Raises:
        UserError: naming it, and what a row of this kind has.
    """
    if missing := [key for key in keys if row.get(key) is None]:
        raise _lacks(where, row, missing[0], keys, what)


def _lacks(where: str, row: Mapping[str, Any], key: str, keys: Sequence[str], what: str) -> UserError:
    has = ", ".join(map(repr, list(row)[:8])) or "nothing"
    return UserError(f"{where}: no '{key}' (it has {has}); {what} has {', '.join(keys)}")


def text_of(row: Mapping[str, Any], key: str, where: str) -> str:
    """Return a text of a row.

    Raises:
        UserError: if it is something else.
    """
    if not isinstance(row[key], str):
        raise UserError(f"{where}: '{key}' is {json.dumps(row[key])[:40]}, not a text")
    return str(row[key])


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


def picture(folder: Path, name: str, places: Sequence[str] = ()) -> Path:
    """Return where a picture lies: in the folder, or in one of ``places`` under it. The first if in none."""
    return next((at for place in ("", *places) if (at := folder / place / name).is_file()), folder / name)


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


def _delimited(path: Path) -> Iterator[Placed]:
    lines = read_text(path).splitlines(keepends=True)
    reader = csv.DictReader(lines, delimiter=DELIMITERS[path.suffix], strict=True)
    before = 1
    try:
        for row in reader:
            where = f"{path}:{before + 1}"
            before = reader.line_num
            if None in row or None in row.values():
                raise UserError(f"{where}: a row of another number of fields than the header has")
            yield where, row
    except csv.Error as error:
        raise UserError(f"{path}:{before + 1}: not a readable row ({one_line(error)})") from None
