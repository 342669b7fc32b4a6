"""JSON files of a job's folder: written whole or not at all, and read by a shape."""

import contextlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic

from vapr.cache import written_whole
from vapr.errors import UserError, one_line

ANY_OBJECT = pydantic.TypeAdapter(dict[str, Any])


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write an object into a file, whole or not at all.

    Raises:
        UserError: if the file cannot be written.
    """
    with written_whole(file) as stream:
        stream.write(json.dumps(content, indent=1, ensure_ascii=False).encode(errors="replace") + b"\n")


def write_json_once(file: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Write an object unless the file is there, and return what is in it. Of several processes only one writes.

    Raises:
        UserError: if the file can be neither written nor read.
    """
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        if not file.exists():
            write_json(temporary, content)
            with contextlib.suppress(FileExistsError):
                os.link(temporary, file)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return read_json(file)


def read_json(
    file: Path,
    shape: pydantic.TypeAdapter[Any] = ANY_OBJECT,
    way_out: str = "begin again in a new folder",
) -> dict[str, Any]:
    """Read an object that vapr wrote.

    Args:
        file: the file to read.
        shape: the shape that its content must have.
        way_out: what the user can do if the file is damaged and cannot be restored.

    Raises:
        UserError: if the file is damaged.
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
    raise UserError(f"{file}: cannot be read ({found}); restore it, or {way_out}")
