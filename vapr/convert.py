"""Writes pairs in the formats of other trainers. What a format cannot hold is refused, or counted and said."""

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from vapr.cache import written_whole
from vapr.display import Display
from vapr.errors import BadRow, UserError
from vapr.formats import PLACEHOLDER
from vapr.pairs import Pairs
from vapr.preference_pair import Message, PreferencePair

WriterName = Literal["vapr", "trl", "llama-factory", "ms-swift", "povid"]
WRITER_NAMES: tuple[str, ...] = get_args(WriterName)

SUFFIXES_OF_FORMATS = {
    "vapr": (".jsonl", ".json", ".parquet"),
    "trl": (".jsonl", ".json", ".parquet"),
    "llama-factory": (".json", ".jsonl"),
    "ms-swift": (".jsonl", ".json"),
    "povid": (".json",),
}


def convert(pairs: Pairs, to: str, out: Path) -> dict[str, Any]:
    """Write every pair to ``out``, whole or not at all.

    Image paths are written relative to ``out``'s folder where they lie below it, else absolute. Images that were bytes
    become files in ``<name>_images/``, except in parquet, which holds them.

    Args:
        pairs: what to write; bad rows are errors, or skipped if the pairs say so.
        to: one of :data:`WRITER_NAMES`.
        out: a new file; its suffix decides between jsonl, json and parquet.

    Returns:
        ``written``, ``skipped`` (reason by place), ``lost`` (how many pairs lost which key) and ``images`` written.

    Raises:
        UserError: if ``out`` exists or has the wrong suffix, or a pair cannot be expressed.
    """
    if to not in WRITER_NAMES:
        raise UserError(f"--to {to}: unknown format; vapr writes {', '.join(WRITER_NAMES)}")
    if out.suffix not in SUFFIXES_OF_FORMATS[to]:
        raise UserError(f"{out}: {to} is written as {' or '.join(SUFFIXES_OF_FORMATS[to])}")
    if out.exists():
        raise UserError(f"{out}: already exists; give a new file with --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out.parent}: cannot be made a folder ({error.strerror})") from None
    images = _Images(out)
    lost: Counter[str] = Counter()
    written = 0
    with _sink(out) as write, Display("convert", len(pairs), unit="row") as display:
        for number in range(len(pairs)):
            display.advance("")
            pair = pairs.read(number)
            if not isinstance(pair, PreferencePair):
                continue
            try:
                row = _WRITERS[to](pair, images.names)
            except BadRow as error:
                if pairs.on_bad_row == "error":
                    raise UserError(f"{pair.where}: {error}; --on-bad-row skip leaves such rows out") from None
                pairs.skipped[pair.where] = f"{pair.where}: {error}"
                continue
            lost.update(_lost(pair, row))
            lost.update(pairs.extra_keys(number))
            write(row)
            written += 1
    if not written:
        out.unlink()
        raise UserError(f"{out}: no pair could be written; the first: {next(iter(pairs.skipped.values()))}")
    if to == "llama-factory":
        _describe_for_llama_factory(out)
    return {"written": written, "skipped": dict(pairs.skipped), "lost": dict(lost), "images": images.num_written}


def _lost(pair: PreferencePair, row: dict[str, Any]) -> list[str]:
    held = {"weight": pair.weight != 1.0, "edits": bool(pair.edits), "category": pair.category is not None}
    return [key for key, there in held.items() if there and key not in row]


class _Images:
    """Names of images as ``out`` refers to them; writes those that have no file."""

    def __init__(self, out: Path) -> None:
        self._folder = out.parent.resolve()
        self._new = out.parent / f"{out.stem}_images"
        self._embedded = out.suffix == ".parquet"
        self.num_written = 0

    def names(self, images: tuple[Path | bytes, ...]) -> list[Any]:
        return [self._name(image) for image in images]

    def _name(self, image: Path | bytes) -> Any:
        if isinstance(image, bytes):
            if self._embedded:
                return {"bytes": image, "path": None}
            name = self._new / f"{hashlib.sha256(image).hexdigest()[:24]}{_suffix(image)}"
            if not name.exists():
                with written_whole(name) as file:
                    file.write(image)
                self.num_written += 1
            image = name
        path = Path(os.path.abspath(image))
        text = str(path.relative_to(self._folder)) if path.is_relative_to(self._folder) else str(path)
        return {"bytes": None, "path": text} if self._embedded else text


def _suffix(image: bytes) -> str:
    magic = {b"\x89PNG": ".png", b"\xff\xd8": ".jpg", b"RIFF": ".webp", b"GIF8": ".gif", b"BM": ".bmp"}
    return next((suffix for start, suffix in magic.items() if image.startswith(start)), ".img")


@contextlib.contextmanager
def _sink(out: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that takes rows one by one; the file appears when all are in."""
    with written_whole(out) as file:
        if out.suffix == ".parquet":
            with _parquet_writer(file) as write:
                yield write
        elif out.suffix == ".jsonl":
            yield lambda row: _ignore(file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n"))
        else:
            between = iter([b"[\n"])
            yield lambda row: _ignore(
                file.write(next(between, b",\n") + json.dumps(row, ensure_ascii=False, indent=1).encode())
            )
            file.write(b"\n]\n")


def _ignore(_: object) -> None:
    """The number of bytes written is nobody's business."""


@contextlib.contextmanager
def _parquet_writer(file: Any) -> Iterator[Callable[[dict[str, Any]], None]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError:
        raise UserError("parquet needs pyarrow; pip install 'vapr[data]'") from None
    part = pa.struct({"type": pa.string(), "text": pa.string()})
    messages = pa.list_(pa.struct({"role": pa.string(), "content": pa.list_(part)}))
    images = pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    edit = pa.struct({"start": pa.int64(), "end": pa.int64(), "from": pa.string(), "to": pa.string()})
    schema = pa.schema(
        {"id": pa.string(), "images": images, "prompt": messages, "chosen": messages, "rejected": messages}
        | {"rejected_images": images, "weight": pa.float64(), "category": pa.string(), "edits": pa.list_(edit)}
    )
    waiting: list[dict[str, Any]] = []
    with pyarrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer:

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(waiting, schema))
            waiting.clear()

        def write(row: dict[str, Any]) -> None:
            waiting.append(row)
            if len(waiting) == 256:
                flush()

        yield write
        if waiting:
            flush()


Names = Callable[[tuple[Path | bytes, ...]], list[Any]]


def _vapr(pair: PreferencePair, names: Names) -> dict[str, Any]:
    row = _sides(pair, names)
    if pair.rejected_images is not None:
        row["rejected_images"] = names(pair.rejected_images)
    if pair.weight != 1.0:
        row["weight"] = pair.weight
    if pair.category is not None:
        row["category"] = pair.category
    if pair.edits:
        text = "".join(part["text"] for part in pair.chosen[0]["content"])
        row["edits"] = [{"start": e.start, "end": e.end, "from": text[e.start : e.end], "to": e.to} for e in pair.edits]
    return row


def _trl(pair: PreferencePair, names: Names) -> dict[str, Any]:
    _same_images(pair, "trl")
    return _sides(pair, names)


def _sides(pair: PreferencePair, names: Names) -> dict[str, Any]:
    sides = {key: [dict(message) for message in getattr(pair, key)] for key in ("prompt", "chosen", "rejected")}
    return {"id": pair.id, "images": names(pair.images), **sides}


def _llama_factory(pair: PreferencePair, names: Names) -> dict[str, Any]:
    _same_images(pair, "llama-factory")
    return {
        "id": pair.id,
        "conversations": _llava_turns(pair.prompt),
        "chosen": _llava_turns(_one_answer(pair.chosen))[0],
        "rejected": _llava_turns(_one_answer(pair.rejected))[0],
        "images": names(pair.images),
    }


def _ms_swift(pair: PreferencePair, names: Names) -> dict[str, Any]:
    chosen = [*pair.prompt, *_one_answer(pair.chosen)]
    row: dict[str, Any] = {
        "id": pair.id,
        "messages": [{"role": message["role"], "content": _text([message])} for message in chosen],
        "images": names(pair.images),
    }
    if pair.rejected != pair.chosen:
        row["rejected_response"] = _text(_one_answer(pair.rejected))
    if pair.rejected_images is not None:
        row["rejected_images"] = names(pair.rejected_images)
    return row


def _povid(pair: PreferencePair, names: Names) -> dict[str, Any]:
    _same_images(pair, "povid")
    if len(pair.images) > 1:
        raise BadRow(f"povid rows show one image; this pair has {len(pair.images)}")
    prompt = _llava_turns(pair.prompt, own_line=True)
    if prompt[0]["from"] == "system":
        raise BadRow("povid rows have no system turn")
    row = {
        "id": pair.id,
        "conversations": prompt + _llava_turns(pair.chosen),
        "rejected_conversations": prompt + _llava_turns(pair.rejected),
    }
    return {**row, "image": names(pair.images)[0]} if pair.images else row


def _same_images(pair: PreferencePair, name: str) -> None:
    if pair.rejected_images is not None:
        raise BadRow(f"{name} rows have no place for 'rejected_images'")


def _one_answer(completion: tuple[Message, ...]) -> tuple[Message, ...]:
    if len(completion) > 1:
        raise BadRow("a completion of several turns does not fit this format; vapr, trl and povid can hold it")
    return completion


def _llava_turns(messages: tuple[Message, ...], *, own_line: bool = False) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[message["role"]], "value": _text([message], own_line=own_line)} for message in messages]


def _text(messages: Any, *, own_line: bool = False) -> str:
    """Text of messages with ``<image>`` for every image part, as :func:`vapr.formats.with_image_parts` reads it.

    That takes one line break beside a placeholder away, so one is added where the text has its own; with ``own_line``,
    LLaVA's custom, everywhere.
    """
    text, before = "", None
    for part in (part for message in messages for part in message["content"]):
        if PLACEHOLDER in part.get("text", ""):
            raise BadRow(f"'{PLACEHOLDER}' stands in a text, where this format would take it for an image")
        if before is not None and before["type"] != part["type"]:
            touching = part["text"][:1] if before["type"] == "image" else text[-1:]
            text += "\n" if own_line or touching == "\n" else ""
        text += PLACEHOLDER if part["type"] == "image" else part["text"]
        before = part
    return text


def _describe_for_llama_factory(out: Path) -> None:
    """Add the file to the folder's dataset_info.json, which LLaMA-Factory looks it up in."""
    file = out.parent / "dataset_info.json"
    try:
        entries = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if not isinstance(entries, dict):
            raise ValueError
    except ValueError:
        raise UserError(f"{file}: not an object of data sets, so {out.name} could not be added to it") from None
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "images": "images"}
    entries[out.stem] = {"file_name": out.name, "formatting": "sharegpt", "ranking": True, "columns": columns}
    with written_whole(file) as stream:
        stream.write(json.dumps(entries, indent=2, ensure_ascii=False).encode() + b"\n")


_WRITERS: dict[str, Callable[[PreferencePair, Names], dict[str, Any]]] = {
    "vapr": _vapr,
    "trl": _trl,
    "llama-factory": _llama_factory,
    "ms-swift": _ms_swift,
    "povid": _povid,
}
