"""Preference pairs by number, out of files of any format, folders, shards, hub data sets and mixtures of them.

Rows stay in their files and are decoded and checked when they are asked for, so a million cost no memory.
"""

import contextlib
import glob
import hashlib
import itertools
import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vapr.cache import user_cache, written_whole
from vapr.display import Display
from vapr.errors import BadRow, NoPair, UserError
from vapr.formats import FORMAT_NAMES, as_vapr, detect, map_columns
from vapr.preference_pair import PreferencePair, pair_from_row
from vapr.rows import SUFFIXES, TABLES, Rows, open_hub, open_rows, open_saved, open_table

NO_IMAGE = 0

CHECKED_AT_START = 5_000
"""Rows of each file that are checked before a model is loaded. More would make the start grow with the data."""


@dataclass(frozen=True, slots=True, eq=False)
class PairSet:
    """Rows of one format with one image folder.

    ``weight`` is how often each row is seen in an epoch: 2 is twice, 0.25 a quarter of the rows, others each epoch.
    """

    rows: Rows
    format: str
    columns: Mapping[str, str] | None
    root: Path
    confined: bool
    weight: float = 1.0

    def as_vapr(self, number: int) -> Any:
        """A row in vapr's own shape, not yet checked."""
        row = self.rows[number]
        return as_vapr(map_columns(row, self.columns) if self.columns else row, self.format)


class Pairs(Sequence[PreferencePair]):
    """Every pair of one or more sets. ``pairs[n]`` reads row ``n`` and checks it; iterating can leave bad rows out.

    Args:
        sets: one after the other.
        on_bad_row: ``error`` or ``skip``, for iterating.

    Attributes:
        skipped: reason by place, for the rows that iterating left out.
    """

    def __init__(self, sets: Sequence[PairSet], on_bad_row: str = "error") -> None:
        self.sets = tuple(sets)
        self.on_bad_row = on_bad_row
        self.skipped: dict[str, str] = {}
        self._starts = [0, *itertools.accumulate(len(part.rows) for part in sets)]

    def __len__(self) -> int:
        """Rows, good and bad."""
        return self._starts[-1]

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        part, row = self._find(number)
        where = part.rows.where(row)
        try:
            shaped = part.as_vapr(row)
            return pair_from_row(shaped, root=part.root, confined=part.confined, where=where, number=number)
        except BadRow as error:
            raise type(error)(f"{where}: {error}") from None

    def __iter__(self) -> Iterator[PreferencePair]:
        for number in range(len(self)):
            pair = self.read(number)
            if isinstance(pair, PreferencePair):
                yield pair

    def read(self, number: int) -> PreferencePair | BadRow:
        """Row ``number``, or why it is skipped (which is also noted in ``skipped``).

        Raises:
            UserError: if it is bad and bad rows are errors.
        """
        try:
            pair: PreferencePair = self[number]
            return pair
        except BadRow as error:
            if self.on_bad_row == "error" and not isinstance(error, NoPair):
                raise
            self.skipped[self.where(number)] = str(error)
            return error

    def where(self, number: int) -> str:
        """The place of row ``number``: ``file:line``."""
        part, row = self._find(number)
        return part.rows.where(row)

    def _find(self, number: int) -> tuple[PairSet, int]:
        part = bisect_right(self._starts, number) - 1
        return self.sets[part], number - self._starts[part]

    @property
    def weighted_sizes(self) -> list[tuple[int, float]]:
        """Rows and weight of each set."""
        return [(len(part.rows), part.weight) for part in self.sets]

    @property
    def digest(self) -> str:
        """Hash of the rows and how they are read; a place in the data means nothing in other data."""
        digest = hashlib.sha256()
        for part in self.sets:
            columns = sorted(part.columns.items()) if part.columns else None
            digest.update(repr((part.rows.digest, part.format, columns, part.weight)).encode())
        return digest.hexdigest()

    @property
    def formats(self) -> list[str]:
        """One line a set: where it is from, its size and format."""
        return [
            f"{_source_name(part.rows)} ({len(part.rows):,} rows, format {part.format}"
            + (f", weight {part.weight:g}" if part.weight != 1 else "")
            + ")"
            for part in self.sets
        ]

    def check(self, limit: int = CHECKED_AT_START) -> str:
        """Check the first ``limit`` rows and the last one of each set, and that no id is used twice among them.

        Returns:
            A line that says how many rows were checked and how many of them have images.

        Raises:
            UserError: for the first bad row, unless bad rows are skipped.
        """
        num_checked = num_with_images = 0
        for part, start in zip(self.sets, self._starts, strict=False):
            ids: dict[str, str] = {}
            size = len(part.rows)
            for row in [*range(min(size, limit)), *range(max(size - 1, limit), size)]:
                num_checked += 1
                pair = self.read(start + row)
                if isinstance(pair, PreferencePair):
                    if self.on_bad_row == "error" and part.format in ("vapr", "trl"):  # others count in their own ways
                        check_id(pair, ids)
                    num_with_images += bool(pair.images)
        checked = "all rows" if num_checked == len(self) else f"{num_checked:,} rows, the others when they are read"
        return f"checked {checked}; {num_with_images:,} have images"

    def image_keys(self) -> np.ndarray:
        """A number for each row (n,) uint64, equal where rows show the same first image; NO_IMAGE for those without.

        Every row is read once for that; the result is kept in the user's cache folder.
        """
        known = user_cache() / "index" / f"images-{self.digest[:32]}.npy"
        try:
            return np.load(known, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            keys = np.empty(len(self), np.uint64)
        with Display("group by image", len(self), unit="row") as display:
            for number in range(len(self)):
                keys[number] = self._image_key(number)
                if (number + 1) % 1000 == 0:
                    display.advance("", 1000)
        with written_whole(known) as file:
            np.save(file, keys, allow_pickle=False)
        return keys

    @property
    def num_images(self) -> int:
        """Distinct first images; every row is read once for that."""
        keys = np.unique(self.image_keys())
        return len(keys) - int(NO_IMAGE in keys)

    def _image_key(self, number: int) -> int:
        part, row = self._find(number)
        image: object = None
        try:
            images = part.as_vapr(row).get("images")
            first = images[0] if isinstance(images, list) and images else images
            if isinstance(first, dict):
                first = first.get("bytes") or first.get("path") or str(first.get("any_of"))
            if isinstance(first, str | bytes) and first:
                image = first
        except (BadRow, AttributeError):
            pass  # a row of its own; its fault is told when it is read
        if image is None:
            return NO_IMAGE
        data = image if isinstance(image, bytes) else f"{part.root}|{image}".encode(errors="replace")
        return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _source_name(rows: Rows) -> str:
    return rows.where(0).rsplit(":", 1)[0]


def check_id(pair: PreferencePair, places: dict[str, str]) -> None:
    """Remember where the pair's id is used. Raises UserError if that was before."""
    if pair.id in places:
        raise UserError(f"{pair.where}: id '{pair.id}' was already used at {places[pair.id]}; ids must be unique")
    places[pair.id] = pair.where


def read_pairs(
    source: str | Path,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    image_root: str | Path | None = None,
    split: str = "train",
    subset: str | None = None,
    on_bad_row: str = "error",
) -> Pairs:
    """Open a file, a folder, a glob of files or a hub data set as pairs, and check its first rows.

    Args:
        source: .jsonl, .json, .parquet, .arrow or .tar; a folder of such files, read in name order (if it
            has ``pairs/``, only that); a folder that ``save_to_disk`` wrote; a folder with LLaMA-Factory's ``dataset_info.json``; or a hub id.
        format: one of ``vapr.formats.FORMAT_NAMES``, or ``auto``: told from the first row's keys.
        columns: names of columns for ``prompt``, ``chosen``, ``rejected``, ``images``, ...; ``a.b.0`` goes down.
        image_root: folder all images must lie in; by default paths start at the data file's folder.
        split, subset: of a hub data set; ``subset`` also picks an entry of a ``dataset_info.json``.
        on_bad_row: ``error`` raises at a bad row; ``skip`` leaves it out when iterating and notes it.

    Raises:
        UserError: naming file and row.
    """
    sets = open_sets(source, format, columns, image_root, split=split, subset=subset)
    pairs = Pairs(sets, on_bad_row)
    pairs.check()
    return pairs


def write_pairs(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows of vapr's own shape as jsonl, whole or not at all."""
    with written_whole(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def open_sets(
    source: str | Path,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    image_root: str | Path | None = None,
    *,
    split: str = "train",
    subset: str | None = None,
    weight: float = 1.0,
) -> list[PairSet]:
    """The sets of one source; see :func:`read_pairs`."""
    root = Path(image_root) if image_root is not None else None
    if root is not None and not root.is_dir():
        raise UserError(f"data.image_root: {root}: no such folder")
    if format != "auto" and format not in FORMAT_NAMES:
        raise UserError(f"unknown format '{format}'; known: auto, {', '.join(FORMAT_NAMES)}")
    sets = []
    for rows, folder, given, mapped in _open(str(source), split, subset, columns):
        if not len(rows):
            continue
        name = given if format == "auto" else format
        if name is None:
            name = "columns" if columns else _detect(rows)
        if mapped:
            _check_columns(rows, mapped)
        sets.append(PairSet(rows, name, mapped, root or folder, root is not None, weight))
    if not sets:
        raise UserError(f"{source}: no pairs in it")
    return sets


def _check_columns(rows: Rows, columns: Mapping[str, str]) -> None:
    """A column that no row has is a mistake, above all one for images: the pairs would be trained on without them."""
    seen: set[str] = set()
    found: set[str] = set()
    for number in range(min(len(rows), 100)):
        with contextlib.suppress(BadRow):
            row = rows[number]
            seen |= row.keys()
            found |= map_columns(row, columns).keys()
    for key, column in columns.items():
        if key not in found:
            raise UserError(
                f"data.columns.{key}: {_source_name(rows)} has no column '{column}' in its first rows; "
                f"there are {', '.join(sorted(seen)) or 'none'}"
            )


def _detect(rows: Rows) -> str:
    for number in range(min(len(rows), 10)):
        try:
            return detect(rows[number])
        except BadRow:
            continue
    return "vapr"


def _open(
    source: str, split: str, subset: str | None, columns: Mapping[str, str] | None
) -> Iterator[tuple[Rows, Path, str | None, Mapping[str, str] | None]]:
    """Rows, the folder relative image paths start at, the format if the source says it, and renamed columns."""
    path = Path(source).expanduser()
    if path.name == "dataset_info.json" or (
        (path / "dataset_info.json").is_file() and not (path / "state.json").is_file()
    ):
        folder = path.parent if path.name == "dataset_info.json" else path
        yield _llama_factory(folder, subset)
    elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        yield open_saved(path, split), path, None, columns
    elif path.exists() or any(c in source for c in "*?["):
        files, folder = _pair_files(path, source, split)
        for is_table, group in itertools.groupby(files, key=lambda file: file.suffix if file.suffix in TABLES else ""):
            for rows in [open_table(list(group))] if is_table else map(open_rows, group):
                yield rows, folder, None, columns
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source) and Path(source).suffix not in SUFFIXES:
        yield open_hub(source, subset, split), Path(), None, columns
    else:
        raise UserError(f"{source}: no such file or folder")


def _pair_files(path: Path, source: str, split: str) -> tuple[list[Path], Path]:
    """The files to read, and the folder that relative image paths start at."""
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(f"{path}: unknown file type; use {', '.join(SUFFIXES)}")
        return [path], path.parent
    if path.is_dir():
        folder = path / "pairs" if (path / "pairs").is_dir() else path
        files = sorted(file for file in folder.glob("*") if file.suffix in SUFFIXES)
    else:
        files = sorted(Path(file) for file in glob.glob(str(path)) if Path(file).suffix in SUFFIXES)
        folder = path = files[0].parent if files else Path()
    # Shards named as the hub names them: train-00000-of-00010.parquet. Test rows are not to be trained on.
    sharded = [file for file in files if re.search(r"-\d{5}-of-\d{5}\.", file.name)]
    if sharded and sharded == files and any(file.name.startswith(f"{split}-") for file in files):
        files = [file for file in files if file.name.startswith(f"{split}-")]
    if not files:
        raise UserError(f"{source}: no {', '.join(SUFFIXES)} file there")
    return files, path


def _llama_factory(folder: Path, subset: str | None) -> tuple[Rows, Path, str, Mapping[str, str] | None]:
    """The preference set that a ``dataset_info.json`` describes."""
    file = folder / "dataset_info.json"
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        ranked = {name: entry for name, entry in entries.items() if entry.get("ranking")}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: not a readable dataset_info.json ({error})") from None
    if not ranked:
        raise UserError(f'{file}: no entry with "ranking": true; name the pair file itself if there is one')
    if subset is None and len(ranked) > 1:
        raise UserError(f"{file}: several preference sets; choose one with subset: {', '.join(ranked)}")
    name = subset or next(iter(ranked))
    if name not in ranked:
        raise UserError(f"{file}: no preference set '{name}'; there are {', '.join(ranked)}")
    entry = ranked[name]
    if entry.get("formatting", "alpaca") != "sharegpt":
        raise UserError(f"{file}: '{name}' is not in sharegpt formatting; name its file and map it with data.columns")
    if "file_name" not in entry:
        raise UserError(f"{file}: '{name}' has no file_name; download it first")
    tags = {key: value for key, value in (entry.get("tags") or {}).items() if LLAMA_FACTORY_TAGS.get(key) != value}
    if tags:
        raise UserError(f"{file}: '{name}' has tags other than LLaVA's ({', '.join(tags)}); convert it first")
    named = {"messages": "conversations", **(entry.get("columns") or {})}
    columns = {{"messages": "conversations"}.get(key, key): column for key, column in named.items()}
    data = folder / entry["file_name"]
    if not data.is_file():
        raise UserError(f"{file}: '{name}' names {data}, which is not there")
    rows = open_table([data]) if data.suffix in TABLES else open_rows(data)
    with contextlib.suppress(BadRow, IndexError):
        columns |= {"id": "id"} if "id" in rows[0] else {}
    return rows, folder, "llama-factory", columns


LLAMA_FACTORY_TAGS = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt", "system_tag": "system",
}  # fmt: skip
