"""Pictures inside the tables of benchmarks (base64, other rows' indices, structs of bytes), and missing ones."""

import ast
import base64
import binascii
import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vapr.errors import UserError
from vapr.evaluation.scoring.prediction import Question

LONGEST_INDEX = 64
"""Characters up to which VLMEvalKit takes an ``image`` for the index of another row, whose picture is meant."""

UNNAMED = "index-"
"""How the names of pictures begin that have none but their place in a table."""


def several(value: Any) -> list[Any]:
    """Return the pictures of a field that may hold a list, also as text; of an empty field none."""
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("[") and text.endswith("]"):
            for read in (json.loads, ast.literal_eval):
                try:
                    return list(read(text))
                except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                    continue
        return [text] if text else []
    if isinstance(value, list | tuple):
        return list(value)
    return [] if value is None else [value]


def encoded(value: Any, where: str) -> bytes:
    """Return a picture's file content: of bytes, of ``{"bytes": ..., "path": ...}``, or of base64.

    Raises:
        UserError: if it is none of these.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes")
    if isinstance(value, bytes) and value:
        return value
    if not isinstance(value, str) or not value:
        raise UserError(f"{where} holds no picture; fetch the file again, with its pictures")
    text = value.partition(",")[2] if value.startswith("data:") else value
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise UserError(
            f"{where} is not base64, or cut short ({value[:20]!r}..., {len(value):,} characters); fetch the file again"
        ) from None


def save(content: bytes, file: Path) -> None:
    """Write a picture, whole or not at all; one that is there stays."""
    if file.is_file():
        return
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{file}: cannot be written ({error.strerror or error}); XDG_CACHE_HOME can name another folder"
        ) from None


def resolve(own: Mapping[str, Any], pointers: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Return, for each index whose ``image`` names another, what the picture's own row holds.

    Args:
        own: what rows with a picture hold, by index.
        pointers: for the others, the index that they name, and the place of the row.

    Raises:
        UserError: for a name that no row has, and for names that go in a circle.
    """
    found = {}
    for index, (name, where) in pointers.items():
        seen = [index]
        while name not in own:
            if name in seen:
                raise UserError(
                    f"{where}: 'image' of index {index} leads in a circle: {' -> '.join([*seen, name])}; give one of "
                    "them a picture"
                )
            if name not in pointers:
                raise UserError(
                    f"{where}: 'image' of index {index} is {name[:30]!r}, neither a picture nor an index that has one; "
                    "fetch the file again"
                )
            seen.append(name)
            name = pointers[name][0]
        found[index] = own[name]
    return found


def missing_images(questions: Sequence[Question]) -> list[str]:
    """Return a line for each question whose picture is not there; none is decoded."""
    missing: list[str] = []
    there: dict[Path, bool] = {}
    for question in questions:
        for image in question.images:
            if not isinstance(image, Path):
                continue
            if image not in there:
                there[image] = image.is_file()
            if not there[image]:
                missing.append(f"question '{question.id}' of {question.benchmark}: image '{image}' is not there")
                break
    return missing


def require_images(questions: Sequence[Question]) -> None:
    """Refuse questions whose pictures are missing, before anything is generated.

    Raises:
        UserError: with how many there are, and the first.
    """
    if missing := missing_images(questions):
        raise UserError(
            f"{missing[0]} ({len(missing):,} of {len(questions):,} questions lack a picture); put the pictures where "
            "the questions name them"
        )
