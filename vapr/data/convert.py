"""Write pairs in the formats of other trainers. What a format cannot hold is refused, or counted and said."""

import contextlib
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from vapr.cache import written_whole
from vapr.data.annotation import (
    ARGILLA,
    RECORDS,
    TOOLS,
    Asked,
    annotation_row,
    asked_of,
    layout_of,
    local_file_url,
    next_steps,
    write_layout,
)
from vapr.data.pair import PreferencePair
from vapr.data.pairs import Pairs
from vapr.data.remote import fetched, is_remote, url_of
from vapr.data.writers import ORIGIN_KEYS, WRITER_NAMES, WRITERS, keep_origin
from vapr.errors import BadRow, UserError
from vapr.progress import Display


def convert(
    pairs: Pairs, to: str, out: Path, *, leave_out: Collection[int] = (), quiet: bool = False
) -> dict[str, Any]:
    """Write every pair to ``out``, whole or not at all.

    Image paths are written relative to ``out``'s folder where they lie below it, else absolute. Images that were bytes
    become files in ``<name>_images/``, except in parquet, which holds them; RLAIF-V's parquet holds those of files too.

    Args:
        pairs: what to write; bad rows are errors, or skipped if the pairs say so.
        to: one of :data:`vapr.data.writers.WRITER_NAMES`, or of :data:`vapr.data.annotation.TOOLS`.
        out: a new file, whose suffix decides between jsonl, json and parquet; for Argilla, a new folder.
        leave_out: rows that are not written.
        quiet: show no progress.

    Returns:
        ``written``, ``skipped`` (reason by place), ``lost`` (how many pairs lost which key), ``images`` written, and
        what comes ``next`` with a tool for people.

    Raises:
        UserError: if ``out`` exists or has the wrong suffix, or a pair cannot be expressed.
    """
    check_target(to, out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out.parent}: cannot be made a folder ({error.strerror})") from None
    entries = _entries_of_llama_factory(out) if to == "llama-factory" else {}
    if to == ARGILLA:
        out = out / RECORDS
    asked = _first_asked(pairs) if to in TOOLS else None
    layout = layout_of(to, asked, out) if asked is not None else {}
    if there := next((file for file in layout if file.exists()), None):
        raise UserError(f"{there}: already exists; give a new name with --out")
    with _Images(out, read_files=to == "rlaif-v") as images:
        make_row = _row_of(to, asked, out, images)
        lost, written = _write_all(pairs, to, out, make_row, leave_out, quiet)
        if not written:
            out.unlink()
            raise UserError(f"{out}: no pair could be written; the first: {next(iter(pairs.skipped.values()))}")
        if to == "llama-factory":
            _describe_for_llama_factory(out, entries)
        write_layout(layout)
    counts = {"written": written, "skipped": dict(pairs.skipped), "lost": dict(lost), "images": images.num_written}
    return counts | ({"next": next_steps(to, out)} if to in TOOLS else {})


def check_target(to: str, out: Path) -> None:
    """Check a format and where it is to be written.

    Raises:
        UserError: if ``out`` exists, has the wrong suffix, or the format is unknown.
    """
    if to not in (*WRITER_NAMES, *TOOLS):
        raise UserError(f"--to {to}: unknown format; vapr writes {', '.join((*WRITER_NAMES, *TOOLS))}")
    suffixes = TOOLS[to] if to in TOOLS else WRITERS[to].suffixes
    if out.suffix not in suffixes:
        written_as = " or ".join(suffixes) if any(suffixes) else "a folder; give a name without a suffix"
        raise UserError(f"{out}: {to} is written as {written_as}")
    if out.exists() and not (to == ARGILLA and out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: already exists; give a new file with --out")


def _first_asked(pairs: Pairs) -> Asked:
    """Return what the first readable pair lets people compare; a layout has room for one of them."""
    found = (pairs.read(number) for number in range(len(pairs)))
    return next((asked_of(pair) for pair in found if isinstance(pair, PreferencePair)), "answers")


def _row_of(to: str, asked: Asked | None, out: Path, images: "_Images") -> Callable[[PreferencePair], dict[str, Any]]:
    """Return what makes a row of a pair."""
    if asked is None:
        return lambda pair: WRITERS[to].row(pair, images.names)
    if to == ARGILLA:  # its client opens files wherever it is started
        folder = os.path.abspath(out.parent)
        return annotation_row(
            to, asked, lambda shown: [n if "://" in n else os.path.join(folder, n) for n in images.names(shown)]
        )
    return annotation_row(to, asked, lambda shown: [local_file_url(name) for name in images.beside(shown)])


def _write_all(
    pairs: Pairs,
    to: str,
    out: Path,
    make_row: Callable[[PreferencePair], dict[str, Any]],
    leave_out: Collection[int],
    quiet: bool,
) -> tuple[Counter[str], int]:
    """Write every pair; return how many pairs lost which key, and how many were written."""
    lost: Counter[str] = Counter()
    written = 0
    with _sink(out, to) as write, Display("convert", len(pairs), unit="row", quiet=quiet) as display:
        for number in range(len(pairs)):
            display.advance("")
            if number in leave_out:
                continue
            pair = pairs.read(number)
            if not isinstance(pair, PreferencePair):
                continue
            try:
                row = make_row(pair)
            except BadRow as error:
                if pairs.on_bad_row == "error":
                    raise UserError(f"{pair.where}: {error}; --on-bad-row skip leaves such rows out") from None
                pairs.skipped[pair.where] = f"{pair.where}: {error}"
                continue
            extra = set(pairs.extra_keys(number))
            if to == "rlaif-v":
                extra = extra - ORIGIN_KEYS | keep_origin(row, pairs.raw(number))
            lost.update([*_lost(pair, row.get("data") or row.get("metadata") or row), *sorted(extra)])
            write(row)
            written += 1
    return lost, written


def _lost(pair: PreferencePair, row: dict[str, Any]) -> list[str]:
    held = {"weight": pair.weight != 1.0, "edits": bool(pair.edits), "category": pair.category is not None}
    held |= {"beta": pair.beta is not None, "margin": pair.margin != 0.0}
    if "origin_split" in row:
        held["category"] = False  # stands in there
    return [key for key, there in held.items() if there and key not in row]


class _Images:
    """Names images as ``out`` refers to them, and writes those that have no file.

    With ``read_files`` a table holds the bytes of all images. Used in a ``with`` block: if an error ends it, the files
    are removed again.
    """

    def __init__(self, out: Path, *, read_files: bool) -> None:
        self._folder = out.parent.resolve()
        self._new = out.parent / f"{out.stem}_images"
        self._embedded = out.suffix == ".parquet"
        self._read_files = read_files and self._embedded
        self._written: list[Path] = []

    @property
    def num_written(self) -> int:
        return len(self._written)

    def __enter__(self) -> "_Images":
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is None:
            return
        for name in self._written:
            name.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not there, or not empty
            self._new.rmdir()

    def names(self, images: tuple[Path | bytes, ...]) -> list[Any]:
        return [self._name(image) for image in images]

    def beside(self, images: tuple[Path | bytes, ...]) -> list[Any]:
        """Name images like :meth:`names`, after files that lie elsewhere were copied: a server shows one folder."""
        return [self._name(image if self._is_below(image) else _bytes_of(image)) for image in images]

    def _is_below(self, image: Path | bytes) -> bool:
        return isinstance(image, bytes) or is_remote(image) or Path(os.path.abspath(image)).is_relative_to(self._folder)

    def _name(self, image: Path | bytes) -> Any:
        if self._read_files:
            return _content(image)
        if isinstance(image, bytes):
            if self._embedded:
                return {"bytes": image, "path": None}
            name = self._new / _new_name(image)
            if not name.exists():
                with written_whole(name) as file:
                    file.write(image)
                self._written.append(name)
            image = name
        if is_remote(image):
            return {"bytes": None, "path": url_of(image)} if self._embedded else url_of(image)
        path = Path(os.path.abspath(image))
        text = str(path.relative_to(self._folder)) if path.is_relative_to(self._folder) else str(path)
        return {"bytes": None, "path": text} if self._embedded else text


def _content(image: Path | bytes) -> dict[str, Any]:
    name = _new_name(image) if isinstance(image, bytes) else image.name
    return {"bytes": _bytes_of(image), "path": name}


def _bytes_of(image: Path | bytes) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        return fetched(image).read_bytes()
    except OSError as error:
        raise BadRow(f"image '{image}' cannot be read ({error.strerror})") from None


def _new_name(image: bytes) -> str:
    magic = {b"\x89PNG": ".png", b"\xff\xd8": ".jpg", b"RIFF": ".webp", b"GIF8": ".gif", b"BM": ".bmp"}
    suffix = next((suffix for start, suffix in magic.items() if image.startswith(start)), ".img")
    return f"{hashlib.sha256(image).hexdigest()[:24]}{suffix}"


@contextlib.contextmanager
def _sink(out: Path, to: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that takes rows one by one; the file appears when all are in."""
    with written_whole(out) as file:
        if out.suffix == ".parquet":
            with _parquet_writer(file, to) as write:
                yield write
            return
        start, between, end, indent = ("", "", "\n", None) if out.suffix == ".jsonl" else ("[\n", ",\n", "", 1)
        separators = itertools.chain([start], itertools.repeat(between))

        def write_text(row: dict[str, Any]) -> None:
            file.write(f"{next(separators)}{json.dumps(row, ensure_ascii=False, indent=indent)}{end}".encode())

        yield write_text
        if out.suffix == ".json":
            file.write(b"\n]\n")


@contextlib.contextmanager
def _parquet_writer(file: Any, to: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError:
        raise UserError("parquet needs pyarrow; pip install 'vapr[data]'") from None
    schema = _schema_of_rlaif_v(pa) if to == "rlaif-v" else _schema(pa)
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


def _schema(pa: Any) -> Any:
    """Return the columns of vapr's and TRL's rows."""
    part = pa.struct({"type": pa.string(), "text": pa.string()})
    messages = pa.list_(pa.struct({"role": pa.string(), "content": pa.list_(part)}))
    images = pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    edit = pa.struct({"start": pa.int64(), "end": pa.int64(), "from": pa.string(), "to": pa.string()})
    return pa.schema(
        {"id": pa.string(), "images": images, "prompt": messages, "chosen": messages, "rejected": messages}
        | {"rejected_images": images, "weight": pa.float64(), "category": pa.string(), "edits": pa.list_(edit)}
        | {"beta": pa.float64(), "margin": pa.float64()}
    )


def _schema_of_rlaif_v(pa: Any) -> Any:
    """Return the columns, in order, of the hub's openbmb/RLAIF-V-Dataset."""
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    texts = ("question", "chosen", "rejected", "origin_dataset", "origin_split")
    return pa.schema(
        {"ds_name": pa.string(), "image": image, **dict.fromkeys(texts, pa.string())}
        | {"idx": pa.int64(), "image_path": pa.string()}
    )


def _entries_of_llama_factory(out: Path) -> dict[str, Any]:
    """Read the folder's dataset_info.json, where LLaMA-Factory looks a file up.

    Raises:
        UserError: if it cannot be read, or has an entry of the name of ``out``.
    """
    file = out.parent / "dataset_info.json"
    try:
        entries = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read, so {out.name} cannot be added to it ({error})") from None
    if not isinstance(entries, dict):
        raise UserError(f"{file}: not an object of data sets, so {out.name} cannot be added to it")
    if out.stem in entries:
        raise UserError(f"{file}: describes a set '{out.stem}' already; take it out, or give another name with --out")
    return entries


def _describe_for_llama_factory(out: Path, entries: dict[str, Any]) -> None:
    """Add ``out`` to the entries and write them."""
    file = out.parent / "dataset_info.json"
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "images": "images"}
    entries[out.stem] = {"file_name": out.name, "formatting": "sharegpt", "ranking": True, "columns": columns}
    with written_whole(file) as stream:
        stream.write(json.dumps(entries, indent=2, ensure_ascii=False).encode() + b"\n")
