"""Rows of a text file or tar shard by number, without holding the file: an index of places.

An index is built the first time a file is seen, in one pass, and kept in the user's cache folder; after that opening a
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

from vapr.cache import file_identity, user_cache, written_whole
from vapr.errors import BadRow, UserError, one_line

SUFFIXES = (".jsonl", ".json", ".tar")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Rows(Protocol):
    """Raw rows by number."""

    digest: str
    """Hash of the content: equal only for equal rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Any:
        """One row as plain data. Raises BadRow if it cannot be decoded."""

    def where(self, number: int) -> str:
        """``file:line`` of a text file, ``file:row`` of others, counted from 1."""


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
    """One JSON value a line. Blank lines are no rows.

    Args:
        path: the file.
        name: the file a row's place is named after, where ``path`` was made from another one.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self._name = name or str(path)
        self._by_row = name is not None
        self._path = path
        self._file = path.open("rb")
        self._index, self.digest = _line_index(path)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, number: int) -> Any:
        start, length, line = (int(value) for value in self._index[number])
        # pread has no file position, so threads and forked workers can share the descriptor.
        text = os.pread(self._file.fileno(), length, start)
        if len(text) < length:
            raise UserError(f"{self._name}: was cut short while it was being read; restore it and continue")
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


def _line_index(path: Path) -> tuple[np.ndarray, str]:
    """(start, length, line number) of each line that is not blank, memory-mapped; and the file's hash."""
    folder = user_cache() / "index"
    key = hashlib.sha256(file_identity(path).encode()).hexdigest()[:24]
    for known in folder.glob(f"{key}.*.npy") if folder.is_dir() else ():
        try:
            _, digest, checksum, _ = known.name.split(".")
            index = np.load(known, mmap_mode="r", allow_pickle=False)
            if format(crc32(index.data), "08x") == checksum:
                return index, digest
        except (OSError, ValueError, EOFError):
            pass
        known.unlink(missing_ok=True)  # damaged: built again
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
    name = folder / f"{key}.{digest}.{crc32(index.data):08x}.npy"
    with written_whole(name) as out:
        np.save(out, index, allow_pickle=False)
    return np.load(name, mmap_mode="r", allow_pickle=False), digest


def _as_lines(file: Path, kind: str, rows: Callable[[Path], Iterator[Any]]) -> JsonLines:
    """A file's rows copied as JSON lines into the user's cache folder, the first time the file is seen."""
    folder = user_cache() / "index"
    key = hashlib.sha256(file_identity(file).encode()).hexdigest()[:24]
    for known in folder.glob(f"{key}.{kind}.*.jsonl") if folder.is_dir() else ():
        lines = JsonLines(known, name=str(file))
        if lines.digest == known.name.split(".")[2]:
            return lines
        known.unlink(missing_ok=True)  # damaged: written again
    texts = (json.dumps(row).encode() + b"\n" for row in rows(file))
    sha = hashlib.sha256()
    with written_whole(folder / f"{key}.{kind}.new") as out:
        for text in texts:
            sha.update(text)
            out.write(text)
    path = folder / f"{key}.{kind}.{sha.hexdigest()}.jsonl"
    (folder / f"{key}.{kind}.new").replace(path)
    return JsonLines(path, name=str(file))


def _json_rows(path: Path) -> Iterator[Any]:
    """The elements of one long JSON list, a piece of the file at a time; or the pairs of HA-DPO's object."""
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
    """The elements of a JSON list, by the standard library's own parser. Only the element in hand is held."""
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


BLOCK = 1 << 20
SPACE = re.compile(r"[ \t\r\n]*")

DESCRIBE = (
    "Describe this image in detail.",
    "What can be seen in this picture? Give a detailed description.",
    "Please write down everything this image shows.",
    "Tell me in detail what is going on in this picture.",
)
"""HA-DPO's descriptions come without a question; the image id picks one of these."""


def _is_description(value: Any) -> bool:
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
            row["images"] = [
                self._read(*places[name]) for name in (names if places.keys() >= set(names) and names else places)
            ]
        return row

    def _read(self, start: int, length: int) -> bytes:
        data = os.pread(self._file.fileno(), length, start)
        if len(data) < length:
            raise UserError(f"{self._path}: was cut short while it was being read; restore it and continue")
        return data

    def where(self, number: int) -> str:
        return self._samples.where(number)


def _tar_samples(path: Path) -> Iterator[dict[str, Any]]:
    """key, JSON text, and (name, start, length) of each image of every sample; a sample's members lie side by side."""
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
    """Sort key in which 10 comes after 9."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _sample_key(member: tarfile.TarInfo) -> str:
    folder, _, name = member.name.rpartition("/")
    stem = name.split(".", 1)[0]
    return f"{folder}/{stem}" if folder else stem
