"""Files of a benchmark's authors: JSON lists or lines of objects, and the pictures beside them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vapr.errors import UserError
from vapr.evaluation.scoring.prediction import read_json_lines


def read_objects(file: Path, keys: Sequence[str], title: str) -> list[tuple[str, dict[str, Any]]]:
    """Read the objects of a JSON list, or of JSON lines, each with its place for messages.

    Args:
        file: to read.
        keys: that each object must have.
        title: of what the objects are, for messages.

    Raises:
        UserError: naming file and row of what is cut short, no object, or lacks a key.
    """
    if file.suffix == ".jsonl":
        rows = [(f"{file}:{number}", row) for number, row in read_json_lines(file)]
    else:
        whole = read_json(file)
        if not isinstance(whole, list):
            raise UserError(f"{file}: a JSON {_kind(whole)}, not the list of objects that {title} is")
        rows = [(f"{file}, row {number}", row) for number, row in enumerate(whole, start=1)]
    for where, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{where}: a JSON {_kind(row)}, not an object with {', '.join(keys)}")
        if missing := [key for key in keys if key not in row]:
            has = ", ".join(map(repr, list(row)[:8])) or "nothing"
            raise UserError(f"{where}: no '{missing[0]}' (it has {has}); {title} has {', '.join(keys)}")
    return rows


def read_json(file: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: for a file that is missing, cut short, or no JSON.
    """
    try:
        return json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8 text; save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not JSON ({error.msg}); is the file whole? Copy it again") from None
    except RecursionError:
        raise UserError(f"{file}: JSON nested too deep to be a benchmark's") from None


def text_of(row: dict[str, Any], key: str, where: str) -> str:
    """Return a text of an object.

    Raises:
        UserError: if it is something else.
    """
    if not isinstance(row[key], str):
        raise UserError(f"{where}: '{key}' is {json.dumps(row[key])[:40]}, not a text")
    return str(row[key])


def picture(folder: Path, name: str, places: Sequence[str] = ()) -> Path:
    """Return where a picture lies: in the folder, or in one of ``places`` under it. The first if in none."""
    return next((at for place in ("", *places) if (at := folder / place / name).is_file()), folder / name)


def _kind(value: Any) -> str:
    return {dict: "object", list: "list", str: "text", bool: "truth value", type(None): "null"}.get(
        type(value), "number"
    )
