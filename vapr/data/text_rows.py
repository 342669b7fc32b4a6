"""Rows of a text file or tar shard by number, found through an index of their places, without holding the file.

The index is built in one pass when a file is first seen, and kept in the user's cache folder. After that, opening a
file of a million rows takes as long as opening one of ten.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import tarfile
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Protocol
from zlib import crc32

import numpy as np

from vapr.cache import file_identity, one_at_a_time, user_cache, written_whole
from vapr.data.remote import display_name
from vapr.errors import BadRow, UserError, one_line

SUFFIXES = (".jsonl", ".json", ".tar")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")

BLOCK = 1 << 20
"""Characters of a JSON list that are read at a time."""
SPACE = re.compile(r"[ \t\r\n]*")

DESCRIBE = (
    "Describe this image in detail.",
    "What can be seen in this picture? Give a detailed description.",
    "Please write down everything this image shows.",
    "Tell me in detail what is going on in this picture.",
)
"""HA-DPO's descriptions come without a question; the image id picks one of these."""


class Rows(Protocol):
    """Raw rows by number."""

    digest: str
    """Hash of the content, equal only for equal rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Any:
        """Return one row as plain data. Raise BadRow if it cannot be decoded."""

    def where(self, number: int) -> str:
        """Return ``file:line`` for a text file, ``file:row`` for others, counted from 1."""


def open_rows(file: Path) -> Rows:
    """Open a .jsonl, .json or .tar file; tables are opened by :mod:`vapr.data.table_rows`.

    Raises:
        UserError: naming the file, if it is of another kind, cannot be read, or the index cannot be written.
    """
    try:
        if file.suffix == ".jsonl":
            return JsonLines(file)
        if file.suffix == ".json":
            return _as_lines(file, "json", _json_rows)
        if file.suffix == ".tar":
            return TarSamples(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    raise UserError(f"{file}: unknown file type; use {', '.join(SUFFIXES)}")


class JsonLines:
    """One JSON value a line. Blank lines are not rows.

    Args:
        path: the file.
        name: the file that ``path`` was made from, if it was; a row's place is named after that one.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self._name = name or display_name(path)
        self._by_row = name is not None
        self._file = path.open("rb")
        self._index, self.digest = _line_index(path)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, number: int) -> Any:
        start, length, line = (int(value) for value in self._index[number])
        text = _read_at(self._file, start, length, self._name)
        try:
            return json.loads(text.decode("utf-8-sig" if line == 1 else "utf-8"))
        except UnicodeDecodeError:
            raise BadRow("not UTF-8 text") from None
        except json.JSONDecodeError as error:
            raise BadRow(f"not valid JSON ({error.msg} at column {error.colno})") from None
        except RecursionError:
            raise BadRow("not a row: JSON nested too deeply") from None
        except ValueError as error:  # a number of thousands of digits
            raise BadRow(f"not readable as JSON ({one_line(error)})") from None

    def where(self, number: int) -> str:
        return f"{self._name}:{number + 1 if self._by_row else int(self._index[number][2])}"


def _read_at(file: IO[bytes], start: int, length: int, name: str | Path) -> bytes:
    """Read bytes of a file. Threads and forked workers can share its descriptor: pread has no file position."""
    data = os.pread(file.fileno(), length, start)
    if len(data) < length:
        raise UserError(f"{name}: was cut short while it was being read; restore it and continue")
    return data


def _cache_place(file: Path) -> Path:
    """Return the beginning of the names under which the cache keeps what is made of a file."""
    return user_cache() / "index" / hashlib.sha256(file_identity(file).encode()).hexdigest()[:24]


def _line_index(path: Path) -> tuple[np.ndarray, str]:
    """Find the lines that are not blank.

    Returns:
        Start, length and line number of each, (number of lines, 3) int64, memory-mapped; and the file's hash.
    """
    place = _cache_place(path)
    if (known := _known_index(place)) is not None:
        return known
    with one_at_a_time(place):
        return _known_index(place) or _new_index(path, place)


def _known_index(place: Path) -> tuple[np.ndarray, str] | None:
    """Find a file's index in the cache; a damaged one is deleted."""
    for known in place.parent.glob(f"{place.name}.*.npy"):
        try:
            _, digest, checksum, _ = known.name.split(".")
            index = np.load(known, mmap_mode="r", allow_pickle=False)
            if format(crc32(index.data), "08x") == checksum:
                return index, digest
        except (OSError, ValueError, EOFError):
            pass
        known.unlink(missing_ok=True)
    return None


def _new_index(path: Path, place: Path) -> tuple[np.ndarray, str]:
    """Read a file once and keep its index in the cache."""
    places, sha = array("q"), hashlib.sha256()
    start = 0
    with path.open("rb") as file:
        if b"\0" in file.peek(4096)[:4096]:
            raise UserError(f"{path}: not a text file")
        for number, line in enumerate(file, start=1):
            sha.update(line)
            if line.strip():
                places.extend((start, len(line), number))
            start += len(line)
    index = np.frombuffer(places, np.int64).reshape(-1, 3)
    digest = sha.hexdigest()
    if len(index) == 0:
        return index, digest
    name = place.with_name(f"{place.name}.{digest}.{crc32(index.data):08x}.npy")
    with written_whole(name) as out:
        np.save(out, index, allow_pickle=False)
    return np.load(name, mmap_mode="r", allow_pickle=False), digest


def _as_lines(file: Path, kind: str, rows: Callable[[Path], Iterator[Any]]) -> JsonLines:
    """Copy a file's rows as JSON lines into the user's cache folder, if it does not hold them yet."""
    place = _cache_place(file)
    with one_at_a_time(place):
        return _known_lines(file, place, kind) or _new_lines(file, place, kind, rows)


def _known_lines(file: Path, place: Path, kind: str) -> JsonLines | None:
    """Find a file's rows as lines in the cache; a damaged copy is deleted."""
    for known in place.parent.glob(f"{place.name}.{kind}.*.jsonl"):
        lines = JsonLines(known, name=display_name(file))
        if lines.digest == known.name.split(".")[2]:
            return lines
        known.unlink(missing_ok=True)
    return None


def _new_lines(file: Path, place: Path, kind: str, rows: Callable[[Path], Iterator[Any]]) -> JsonLines:
    new, sha = place.with_name(f"{place.name}.{kind}.new"), hashlib.sha256()
    with written_whole(new) as out:
        for row in rows(file):
            text = json.dumps(row).encode() + b"\n"
            sha.update(text)
            out.write(text)
    path = new.replace(place.with_name(f"{place.name}.{kind}.{sha.hexdigest()}.jsonl"))
    return JsonLines(path, name=display_name(file))


def _json_rows(path: Path) -> Iterator[Any]:
    """Yield the elements of one long JSON list, a piece of the file at a time, or the pairs of HA-DPO's object."""
    with _read_errors(path), path.open(encoding="utf-8-sig") as file:
        if file.read(1024).lstrip().startswith("["):
            file.seek(0)
            yield from _list_elements(file, path)
            return
        file.seek(0)
        try:
            whole = json.load(file)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno})") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not readable as JSON ({one_line(error)})") from None
    if not isinstance(whole, dict) or not whole or not all(_is_description(value) for value in whole.values()):
        raise UserError(f"{path}: a .json file of pairs is one list of rows")
    for image_id, answers in whole.items():
        question = DESCRIBE[crc32(image_id.encode(errors="replace")) % len(DESCRIBE)]
        for chosen in answers["chosen"]:
            for reject in answers["rejected"]:
                pair = {"chosen": chosen, "reject": reject, "correct": False}
                yield {"image_id": image_id, "question": question, **pair}


@contextlib.contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _list_elements(file: IO[str], path: Path) -> Iterator[Any]:
    """Yield the elements of a JSON list, parsed by the standard library. Only the element in hand is held."""
    decoder = json.JSONDecoder()
    text = file.read(BLOCK)
    at = text.index("[") + 1
    lines_before = 0
    wanted = "an element or ']'"
    while True:
        at = SPACE.match(text, at).end()  # type: ignore[union-attr]
        problem = f"expected {wanted}"
        if text[at : at + 1] == "]" and wanted != "an element":
            return
        if wanted == "',' or ']'" and text[at : at + 1] == ",":
            at, wanted = at + 1, "an element"
            continue
        if wanted != "',' or ']'":
            try:
                value, end = decoder.raw_decode(text, at)
                if end < len(text):  # else a number may go on in the next piece
                    yield value
                    at, wanted = end, "',' or ']'"
                    continue
            except json.JSONDecodeError as error:
                problem, failed_at = error.msg, error.pos
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{lines_before + text.count(chr(10), 0, at) + 1}: {one_line(error)}") from None
        more = file.read(max(BLOCK, len(text)))  # twice as much each time: a long element is parsed only a few times
        if not more:
            place = failed_at if problem != f"expected {wanted}" else at
            line, column = lines_before + text.count("\n", 0, place) + 1, place - text.rfind("\n", 0, place)
            raise UserError(f"{path}:{line}: not valid JSON ({problem} at column {column})")
        lines_before += text.count("\n", 0, at)
        text, at = text[at:] + more, 0


def _is_description(value: Any) -> bool:
    """Return whether a value is what HA-DPO's ``desc_data.json`` holds for an image."""
    return isinstance(value, dict) and all(isinstance(value.get(key), list) for key in ("chosen", "rejected"))


class TarSamples:
    """Samples of a webdataset shard: members that share a name up to the first dot of its last part.

    A sample's ``.json`` member is the row. Its image members are the row's images: in the order in which the row names
    them, or else by name, numbers in it by value.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._samples = _as_lines(path, "tar", _tar_samples)
        self._file = path.open("rb")
        self.digest = self._samples.digest

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, number: int) -> Any:
        sample = self._samples[number]
        if not sample["row"]:
            raise BadRow(f"sample '{sample['key']}' needs one .json member, with something in it")
        try:
            row = json.loads(sample["row"])
        except (ValueError, RecursionError) as error:
            raise BadRow(f"'{sample['key']}.json' is not valid JSON ({one_line(error)})") from None
        if not isinstance(row, dict):
            raise BadRow(f"'{sample['key']}.json' must hold an object")
        if row.get("id") is None:
            row["id"] = sample["key"]
        places = {Path(name).name: place for name, *place in sample["images"]}
        if places:
            named = row.pop("images", None) or row.pop("image", None) or []
            named = named if isinstance(named, list) else [named]
            names = [Path(name).name for name in named if isinstance(name, str)]
            row.pop("image", None)
            order = names if names and places.keys() >= set(names) else list(places)
            row["images"] = [
                _read_at(self._file, start, length, self._path) for start, length in (places[name] for name in order)
            ]
        return row

    def where(self, number: int) -> str:
        return self._samples.where(number)


def _tar_samples(path: Path) -> Iterator[dict[str, Any]]:
    """Yield key, JSON text, and (name, start, length) of each image of every sample, whose members lie side by side."""
    try:
        with _read_errors(path), tarfile.open(path, "r:") as tar:
            for key, members in itertools.groupby(_tar_files(tar), key=_sample_key):
                files = sorted(members, key=lambda member: _by_number(member.name))
                texts = [member for member in files if member.name.endswith(".json")]
                text = tar.extractfile(texts[0]).read().decode("utf-8") if len(texts) == 1 else ""  # type: ignore[union-attr]
                images = [(m.name, m.offset_data, m.size) for m in files if m.name.lower().endswith(PICTURES)]
                yield {"key": key, "row": text, "images": images}
                tar.members = []  # type: ignore[attr-defined]  # tarfile would remember every member
    except tarfile.TarError as error:
        raise UserError(f"{path}: not a readable tar file ({error}); a compressed one has to be unpacked") from None


def _tar_files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        if member.islnk() or member.issym() or member.issparse():
            raise tarfile.TarError(f"'{member.name}' is a link or a sparse file; pack plain files")
        if member.isfile():
            yield member


def _by_number(name: str) -> list[Any]:
    """Return a key for sorting in which 10 comes after 9."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _sample_key(member: tarfile.TarInfo) -> str:
    folder, _, name = member.name.rpartition("/")
    stem = name.split(".", 1)[0]
    return f"{folder}/{stem}" if folder else stem
