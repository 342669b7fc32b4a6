"""Rows of a file of questions: JSON lines, a JSON list, CSV or TSV."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vapr.errors import UserError, one_line
from vapr.evaluation.scoring.prediction import read_json_lines
from vapr.yaml_file import read_text

DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place of each row, for messages, and the row.

    Raises:
        UserError: for a file of another kind, or a row that is none.
    """
    if path.suffix == ".jsonl":
        for number, row in read_json_lines(path):
            yield f"{path}:{number}", row
    elif path.suffix in DELIMITERS:
        yield from _csv_rows(path)
    elif path.suffix == ".json":
        yield from _json_rows(path)
    else:
        what = "a folder" if path.is_dir() else f"a file that ends in '{path.suffix}'"
        raise UserError(f"{path}: {what}; questions are read from .jsonl, .json, .csv or .tsv")


def text_of(value: Any) -> str | None:
    """Return a value as a judge reads it, lists with commas; None for none and for an empty text."""
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return None if value is None or not str(value).strip() else str(value)


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not valid JSON ({one_line(error)})") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: a JSON {type(rows).__name__}, not a list of rows")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}: row {number} is a JSON {type(row).__name__}, not an object with keys")
        yield f"{path}: row {number}", row


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
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
