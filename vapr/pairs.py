"""PreferencePair, and the readers of pair files.

Formats so far: vapr rows and TRL rows. A new format is one more function from a row to a PreferencePair,
called from :func:`_pair_from_row`.
"""

import difflib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vapr.errors import UserError

Message = dict[str, Any]
"""``{"role": str, "content": [{"type": "text", "text": str} | {"type": "image"}, ...]}``"""


@dataclass(frozen=True, slots=True)
class Edit:
    """Characters ``start:end`` of the chosen text, which the rejected text replaces with ``to``."""

    start: int
    end: int
    to: str


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One prompt with a chosen and a rejected completion. Images stay undecoded: paths or encoded bytes."""

    id: str
    images: tuple[Path | bytes, ...]  # in the order of the prompt's image parts
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    weight: float = 1.0
    edits: tuple[Edit, ...] = ()
    category: str | None = None
    where: str = field(default="", compare=False)  # "pairs.jsonl:17", for error messages


KNOWN_KEYS = frozenset(
    ("id", "images", "image", "prompt", "chosen", "rejected", "weight", "edits", "category", "provenance")
)
"""Other keys may be there and mean nothing to training; a near miss of one of these is a mistake."""


class _BadRow(Exception):
    """What is wrong with a row, before its place is known."""


def read_pairs(
    source: Path, *, format: str = "auto", image_root: Path | None = None, on_bad_row: str = "error"
) -> tuple[list[PreferencePair], list[str]]:
    """Read every pair of a file, or of all pair files of a folder in name order.

    Args:
        source: a .jsonl, .json or .parquet file, or a folder. Of a folder with ``pairs/`` in it only that is read, and
            image paths start at the folder itself.
        format: ``auto``, ``vapr`` or ``trl``.
        image_root: folder all images must lie in; by default paths start at the data file's folder.
        on_bad_row: ``error`` raises at the first bad row; ``skip`` leaves it out and reports it.

    Returns:
        The pairs, and one line for each skipped row.

    Raises:
        UserError: naming file and row.
    """
    pairs: list[PreferencePair] = []
    skipped: list[str] = []
    ids: dict[str, str] = {}
    if image_root is not None and not image_root.is_dir():
        raise UserError(f"data.image_root: {image_root}: no such folder")
    files, folder = _pair_files(source)
    for file in files:
        for number, row in _READERS[file.suffix](file):
            where = f"{file}:{number}"
            try:
                if isinstance(row, _BadRow):
                    raise row
                pair = _pair_from_row(row, format, image_root or folder, image_root is not None, where)
                if pair.id in ids:
                    raise _BadRow(f"id '{pair.id}' was already used at {ids[pair.id]}; ids must be unique")
            except _BadRow as error:
                if on_bad_row == "error":
                    raise UserError(f"{where}: {error}") from None
                skipped.append(f"{where}: {error}")
                continue
            ids[pair.id] = where
            pairs.append(pair)
    if not pairs:
        raise UserError(f"{source}: no pairs in it" + (f" ({len(skipped)} rows skipped)" if skipped else ""))
    return pairs, skipped


def write_pairs(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows of vapr's own shape as jsonl, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _pair_files(source: Path) -> tuple[list[Path], Path]:
    """The files to read, and the folder that relative image paths start at."""
    if source.is_file():
        if source.suffix not in _READERS:
            raise UserError(f"{source}: unknown file type; use {', '.join(_READERS)}")
        return [source], source.parent
    if not source.is_dir():
        raise UserError(f"{source}: no such file or folder (a data set of the hub has to be downloaded first)")
    folder = source / "pairs" if (source / "pairs").is_dir() else source
    files = sorted(file for file in folder.glob("*") if file.suffix in _READERS)
    if not files:
        raise UserError(f"{folder}: no {', '.join(_READERS)} file in this folder")
    return files, source


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError:
                yield number, _BadRow("not UTF-8 text")
            except json.JSONDecodeError as error:
                yield number, _BadRow(f"not valid JSON ({error.msg} at column {error.colno})")
            except RecursionError:
                yield number, _BadRow("not a row: JSON nested too deeply")


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise UserError(f"{path}: JSON nested too deeply") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: a .json file of pairs is one list of rows")
    yield from enumerate(rows, start=1)


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow; pip install 'vapr[data]'") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({' '.join(str(error).split())})") from None


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _pair_from_row(row: Any, format: str, root: Path, confined: bool, where: str) -> PreferencePair:
    if not isinstance(row, dict):
        raise _BadRow("a row must be an object with prompt, chosen and rejected")
    row = {key: value for key, value in row.items() if value is not None}  # null means absent, as in parquet
    for key in row.keys() - KNOWN_KEYS:
        if close := difflib.get_close_matches(key, KNOWN_KEYS, n=1, cutoff=0.8):
            raise _BadRow(f"unknown key '{key}'; did you mean '{close[0]}'?")
    missing = [key for key in ("chosen", "rejected") if key not in row]
    # TRL's implicit prompt: chosen and rejected are whole conversations that begin alike.
    implicit = "prompt" not in row and not missing and all(isinstance(row[k], list) for k in ("chosen", "rejected"))
    if "prompt" not in row and not implicit:
        missing.insert(0, "prompt")
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        names = " and ".join(f"'{key}'" for key in missing)
        raise _BadRow(f"{names} {verb} missing; a pair needs prompt, chosen and rejected")
    chosen = _messages(row["chosen"], "chosen", "assistant")
    rejected = _messages(row["rejected"], "rejected", "assistant")
    if implicit:
        prompt, chosen, rejected = _split_implicit_prompt(chosen, rejected)
    else:
        prompt = _messages(row["prompt"], "prompt", "user")
    images = row.get("images", row.get("image")) if format != "vapr" else row.get("images")
    if images is None:
        images = []
    elif not isinstance(images, list):
        images = [images]
    prompt = _check_turns(prompt, chosen, rejected, len(images))
    return PreferencePair(
        id=_row_id(row, where),
        images=tuple(_image(image, root, confined) for image in images),
        prompt=tuple(prompt),
        chosen=tuple(chosen),
        rejected=tuple(rejected),
        weight=_weight(row.get("weight", 1.0)),
        edits=_edits(row.get("edits"), chosen),
        category=row.get("category"),
        where=where,
    )


def _row_id(row: dict[str, Any], where: str) -> str:
    given = row.get("id", where)
    if not isinstance(given, str | int):
        raise _BadRow(f"'id' must be text, got {given!r}")
    return str(given)


def _weight(weight: Any) -> float:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise _BadRow(f"'weight' must be a number of at least 0, got {weight!r}")
    try:
        return float(weight)
    except OverflowError:
        raise _BadRow("'weight' is too large") from None


def _messages(value: Any, key: str, role: str) -> list[Message]:
    """Plain text becomes one message; contents become lists of parts, as every chat template accepts them."""
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise _BadRow(f"'{key}' must be text or a list of messages, got {value!r:.60}")
    messages = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise _BadRow(f"'{key}' holds a message without role and content: {message!r:.60}")
        if message["role"] not in ("system", "user", "assistant"):
            raise _BadRow(f"'{key}' holds role '{message['role']}'; known roles: system, user, assistant")
        messages.append({"role": message["role"], "content": _parts(message["content"], key)})
    return messages


def _parts(content: Any, key: str) -> list[dict[str, str]]:
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise _BadRow(f"'{key}' holds a content that is neither text nor a list of parts: {content!r:.60}")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            try:
                part["text"].encode()
            except UnicodeEncodeError:
                raise _BadRow(f"'{key}' holds half a character (a lone surrogate, from a cut emoji)") from None
            parts.append({"type": "text", "text": part["text"]})
        elif kind == "image":
            inline = [name for name in ("image", "url", "path", "base64") if part.get(name)]
            if inline:
                raise _BadRow(
                    f"'{key}' holds an image part with '{inline[0]}'; put images into the row's 'images' list"
                )
            parts.append({"type": "image"})
        else:
            raise _BadRow(f"'{key}' holds a part that is neither text nor image: {part!r:.60}")
    return parts


def _split_implicit_prompt(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and chosen[shared - 1]["role"] == "assistant":
        shared -= 1
    if shared == 0:
        raise _BadRow("'prompt' is missing, and chosen and rejected do not begin with the same messages")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _check_turns(
    prompt: list[Message], chosen: list[Message], rejected: list[Message], num_images: int
) -> list[Message]:
    """Roles in order, nothing empty, completions that differ, one image part for each image.

    Returns the prompt; where images are given but no part places them, they are put before the first user text.
    """
    roles = [message["role"] for message in prompt]
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise _BadRow(f"'prompt' must be user and assistant in turn and end with user, got {', '.join(roles)}")
    for key, completion in (("chosen", chosen), ("rejected", rejected)):
        if not completion or completion[0]["role"] != "assistant":
            raise _BadRow(f"'{key}' must begin with an assistant message")
        if any(part["type"] == "image" for message in completion for part in message["content"]):
            raise _BadRow(f"'{key}' holds an image part; images belong in the prompt")
        if not any(part["text"].strip() for message in completion for part in message["content"]):
            raise _BadRow(f"'{key}' is empty")
    if chosen == rejected:
        raise _BadRow("chosen and rejected are the same text; there is nothing to prefer")
    if num_images and any("<image>" in part.get("text", "") for message in prompt for part in message["content"]):
        raise _BadRow("'prompt' holds '<image>' as text; write an image part {\"type\": \"image\"} in its place")
    num_parts = sum(part["type"] == "image" for message in prompt for part in message["content"])
    if num_parts == 0 and num_images:
        first = roles.index("user")
        placed = {**prompt[first], "content": [{"type": "image"}] * num_images + prompt[first]["content"]}
        return [*prompt[:first], placed, *prompt[first + 1 :]]
    if num_parts != num_images:
        raise _BadRow(f"the prompt places {num_parts} image(s) but the row has {num_images} in 'images'")
    return prompt


def _image(image: Any, root: Path, confined: bool) -> Path | bytes:
    if isinstance(image, bytes) and image:
        return image
    if isinstance(image, dict):
        if isinstance(image.get("bytes"), bytes):
            return image["bytes"]
        image = image.get("path")
    if not isinstance(image, str) or not image:
        raise _BadRow(f"an image must be a path or {{'bytes', 'path'}}, got {image!r:.60}")
    path = root / image
    try:
        if confined and not path.resolve().is_relative_to(root.resolve()):
            raise _BadRow(f"image '{image}' lies outside data.image_root ({root})")
        if not path.is_file():
            raise _BadRow(f"image '{image}' not found (looked for {path})")
    except (OSError, ValueError):  # too long, or with a NUL: base64 or a data URL instead of a path
        raise _BadRow(f"image {image!r:.60} is no path; save it to a file, or give its bytes in parquet") from None
    return path


def _edits(edits: Any, chosen: list[Message]) -> tuple[Edit, ...]:
    if not edits:
        return ()
    if not isinstance(edits, list):
        raise _BadRow(f"'edits' must be a list, got {edits!r:.60}")
    text = "".join(part["text"] for part in chosen[0]["content"])
    spans = []
    for edit in edits:
        try:
            span = Edit(start=edit["start"], end=edit["end"], to=edit["to"])
            whole = isinstance(span.start, int) and isinstance(span.end, int)
            valid = whole and 0 <= span.start <= span.end <= len(text) and isinstance(span.to, str)
        except (TypeError, KeyError):
            valid = False
        if not valid:
            raise _BadRow(f"an edit needs start, end and to within the chosen text, got {edit!r:.80}")
        if edit.get("from") not in (None, text[span.start : span.end]):
            raise _BadRow(
                f"edit says 'from' is {edit['from']!r} but the chosen text has {text[span.start : span.end]!r}"
            )
        spans.append(span)
    return tuple(spans)
