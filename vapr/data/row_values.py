"""What the formats share: absent values, mapped columns, image placeholders, JSON in texts, and mistaken keys."""

import difflib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vapr.errors import BadRow

Row = dict[str, Any]

PLACEHOLDER = "<image>"

DEEPEST = 12
"""Levels of nesting that are looked into: more than any format has."""


class OneOf(tuple[str, ...]):
    """Names under which an image may lie. Data sets that give only an id do not say how its file is called."""


def require_object(row: Any) -> None:
    """Raise BadRow for a row that is not a JSON object."""
    if not isinstance(row, dict):
        raise BadRow(f"a row must be an object, got {row!r:.60}")


def require_keys(row: Row, *keys: str) -> None:
    """Raise BadRow if the row lacks one of the keys, with a hint if it has one that is spelled nearly like it."""
    refuse_near_misses(row, keys)
    if missing := [key for key in keys if key not in row]:
        raise BadRow(f"{are_missing(missing)}; this row has {', '.join(row)}")


def are_missing(keys: Iterable[str]) -> str:
    """Return ``'a' and 'b' are missing``, or ``'a' is missing`` for a single key."""
    names = [f"'{key}'" for key in keys]
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing"


def refuse_near_misses(row: Row, wanted: Iterable[str]) -> None:
    """Raise BadRow for a key of the row that is spelled nearly like one of ``wanted`` that the row lacks."""
    for key in wanted:
        if key not in row and (close := difflib.get_close_matches(key, row, n=1, cutoff=0.8)):
            raise BadRow(f"unknown key '{close[0]}'; did you mean '{key}'?")


def refuse_instruction_data(row: Row) -> None:
    """Raise BadRow for a row that has an answer but no second one under any name."""
    talks = {"conversations", "messages"} & row.keys()
    asks = {"prompt", "question", "instruction", "query"} & row.keys()
    answers = {"answer", "completion", "response", "output"} & row.keys()
    if (talks or (asks and answers)) and not any("chosen" in key or "reject" in key for key in row):
        raise BadRow(
            "'rejected' is missing: this row looks like instruction data, a question with one answer; make pairs of it "
            "with vapr edit DATA --out DIR (if it has a worse answer as well, name that with data.columns)"
        )


def without_nulls(value: Any, depth: int = DEEPEST) -> Any:
    """Remove keys that are null, at every depth: a table gives each object all keys of its column."""
    if depth and isinstance(value, dict):
        return {key: without_nulls(inner, depth - 1) for key, inner in value.items() if inner is not None}
    if depth and isinstance(value, list):
        return [without_nulls(inner, depth - 1) for inner in value]
    return value


def says_something(value: Any, depth: int = DEEPEST) -> bool:
    """Return whether a value holds anything but nulls."""
    if depth and isinstance(value, dict | list):
        inside = value.values() if isinstance(value, dict) else value
        return any(says_something(inner, depth - 1) for inner in inside)
    return value is not None


def json_object(text: Any) -> Row:
    """Decode an object that may be given as JSON text, without its nulls; return {} if there is none."""
    try:
        value = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        return {}
    return without_nulls(value) if isinstance(value, dict) else {}


def num_shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how many elements two lists have in common at their beginning."""
    return sum(1 for _ in itertools.takewhile(lambda both: both[0] == both[1], zip(one, other, strict=False)))


def map_columns(row: Any, columns: Mapping[str, str]) -> Row:
    """Return the row with the keys of ``columns``, whose values say where in the row their content is.

    ``a.b.0`` goes down into objects, lists, and texts that hold them as JSON. What a row does not have is left out, as
    rows without images have none.

    Raises:
        BadRow: if the row is not an object.
    """
    require_object(row)
    mapped: Row = {}
    for key, column in columns.items():
        value: Any = row
        for part in [column] if column in row else column.split("."):
            try:
                value = json.loads(value) if isinstance(value, str) else value
                value = value[int(part)] if isinstance(value, list) else value[part]
            except (KeyError, IndexError, TypeError, ValueError, RecursionError):
                break
        else:
            mapped[key] = value
    return {**{key: value for key, value in row.items() if key not in columns}, **mapped}


def image_list(images: Any) -> list[Any]:
    """Return what a row gives as its images as a list."""
    if images is None:
        return []
    return images if isinstance(images, list) else [images]


def images_of(row: Row) -> Any:
    """Return the row's images, under ``images`` or ``image``; None if it has none.

    Raises:
        BadRow: if both hold images that differ: it is not for us to choose.
    """
    given = [row[key] for key in ("images", "image") if row.get(key) not in (None, [], "")]
    if len(given) == 2 and image_list(given[0]) != image_list(given[1]):
        raise BadRow("both 'images' and 'image' hold images; leave one out")
    return given[0] if given else None


def with_image_parts(value: Any, key: str) -> Any:
    """Turn every ``<image>`` in a text, or in turns of text, into an image part.

    One line break next to a placeholder belongs to it: chat templates write their own.

    Raises:
        BadRow: naming ``key``, if one of the turns is not an object.
    """
    if isinstance(value, str):
        return [{"role": "user", "content": _text_and_image_parts(value)}] if PLACEHOLDER in value else value
    if not isinstance(value, list):
        return value
    turns = []
    for turn in value:
        if not isinstance(turn, dict):
            raise BadRow(f"'{key}' holds a turn that is no object: {turn!r:.60}")
        role, text = ("from", "value") if "from" in turn else ("role", "content")
        content = turn.get(text)
        if isinstance(content, str) and PLACEHOLDER in content:
            content = _text_and_image_parts(content)
        turns.append({"role": turn.get(role), "content": content})
    return turns


def _text_and_image_parts(text: str) -> list[dict[str, str]]:
    pieces = text.split(PLACEHOLDER)
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(pieces):
        if number > 0:
            parts.append({"type": "image"})
            piece = piece.removeprefix("\n")
        if number < len(pieces) - 1:
            piece = piece.removesuffix("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts
