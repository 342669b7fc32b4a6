"""Values of raw rows: what counts as absent, objects in JSON text, and keys and rows that are mistaken for others."""

import difflib
import json
from collections.abc import Iterable
from typing import Any

from vapr.errors import BadRow

Row = dict[str, Any]

DEEPEST = 12
"""Levels of a row that a format looks into, and more."""


def without_nulls(value: Any, depth: int = DEEPEST) -> Any:
    """The value without keys that are null, at every depth: a table gives each object all keys of its column."""
    if depth and isinstance(value, dict):
        return {key: without_nulls(inner, depth - 1) for key, inner in value.items() if inner is not None}
    if depth and isinstance(value, list):
        return [without_nulls(inner, depth - 1) for inner in value]
    return value


def says_something(value: Any, depth: int = DEEPEST) -> bool:
    """Whether there is more than nulls in a value."""
    if depth and isinstance(value, dict | list):
        inside = value.values() if isinstance(value, dict) else value
        return any(says_something(inner, depth - 1) for inner in inside)
    return value is not None


def json_object(text: Any) -> Row:
    """The object in a JSON text, or the object that is there already, without nulls; empty if there is none."""
    try:
        value = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        return {}
    return without_nulls(value) if isinstance(value, dict) else {}


def refuse_near_misses(row: Row, wanted: Iterable[str]) -> None:
    """Raise BadRow for a key of the row that is nearly one of ``wanted``, which it lacks."""
    for key in wanted:
        if key not in row and (close := difflib.get_close_matches(key, row, n=1, cutoff=0.8)):
            raise BadRow(f"unknown key '{close[0]}'; did you mean '{key}'?")


def refuse_instruction_data(row: Row) -> None:
    """Raise BadRow for a row that has an answer but, under whatever name, no second one."""
    talks = {"conversations", "messages"} & row.keys()
    asks = {"prompt", "question", "instruction", "query"} & row.keys()
    answers = {"answer", "completion", "response", "output"} & row.keys()
    if (talks or (asks and answers)) and not any("chosen" in key or "reject" in key for key in row):
        raise BadRow(
            "'rejected' is missing: this row looks like instruction data, a question with one answer; make pairs of it "
            "with vapr edit DATA --out DIR (if it has a worse answer as well, name that with data.columns)"
        )
