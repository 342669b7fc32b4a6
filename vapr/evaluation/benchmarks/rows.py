"""Rows of a benchmark's own files: JSON, JSON lines and parquet, as their authors publish them."""

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
    """Yield the place and the columns of each row of a .jsonl, .json or .parquet file.

    A .json file holds a list of rows, an object whose ``questions`` are that list, or one row a line.

    Raises:
        UserError: for a file of another kind, one that cannot be read, or a row that is no object.
    """
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
    elif path.suffix == ".jsonl" or (path.suffix == ".json" and _is_lines(path)):
        for number, row in read_json_lines(path):
            yield f"{path}:{number}", row
    elif path.suffix == ".json":
        rows = read_json(path)
        rows = rows["questions"] if isinstance(rows, dict) and "questions" in rows else rows
        if not isinstance(rows, list):
            raise UserError(f"{path}: a JSON {type(rows).__name__}, not a list of rows")
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict):
                raise UserError(f"{path}: row {number} is a JSON {type(row).__name__}, not an object with keys")
            yield f"{path}, row {number}", row
    else:
        raise UserError(f"{path}: unknown file type; use .jsonl, .json or .parquet")


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


def pictures(value: Any, folder: Path) -> tuple[Path | bytes, ...]:
    """Return the pictures of a row: bytes as parquet holds them, or files named from ``folder`` on."""
    if isinstance(value, Mapping):  # an Image column of the datasets library
        value = value.get("bytes") or value.get("path")
    if isinstance(value, list):
        return tuple(one for inner in value for one in pictures(inner, folder))
    if value is None or value == "":
        return ()
    return (value,) if isinstance(value, bytes) else (folder / str(value),)


def _is_lines(path: Path) -> bool:
    """Return whether the first line of a .json file is a whole object, and another follows."""
    try:
        with path.open("rb") as file:
            first, second = file.readline(), file.readline()
        return isinstance(json.loads(first), dict) and bool(second.strip())
    except (OSError, ValueError, RecursionError):
        return False


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow; pip install 'vapr[data]'") from None
    try:
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=64):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not readable as parquet ({one_line(error)}); get it again") from None
