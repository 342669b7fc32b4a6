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
from vapr.preference_pair import KNOWN_KEYS, PreferencePair, pair_from_row
from vapr.rows import SUFFIXES, TABLES, Rows, open_hub, open_rows, open_saved, open_table

NO_IMAGE = -1

USED_KEYS = KNOWN_KEYS - {"provenance"}

CHECKED_AT_START = 5_000
"""Rows that are checked before a model is loaded. More would make the start grow with the data."""


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
    source: object = None
    """The same for all sets of one source, whose weight they share."""

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
        self._roots = list(dict.fromkeys(part.root for part in sets))
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

    def extra_keys(self, number: int) -> list[str]:
        """Keys of a row of vapr's or TRL's shape that mean nothing to vapr."""
        part, row = self._find(number)
        raw = part.rows[row] if part.format in ("vapr", "trl") and not part.columns else {}
        return sorted(key for key, value in raw.items() if value is not None and key not in USED_KEYS)

    def where(self, number: int) -> str:
        """The place of row ``number``: ``file:line``."""
        part, row = self._find(number)
        return part.rows.where(row)

    def _find(self, number: int) -> tuple[PairSet, int]:
        part = bisect_right(self._starts, number) - 1
        return self.sets[part], number - self._starts[part]

    @property
    def weighted_sizes(self) -> list[tuple[int, float]]:
        """Rows and weight of each source, in order."""
        sources = itertools.groupby(self.sets, key=lambda part: (id(part.source), part.weight))
        return [(sum(len(part.rows) for part in parts), weight) for (_, weight), parts in sources]

    @property
    def digest(self) -> str:
        """Hash of the rows and how they are read; a place in the data means nothing in other data."""
        digest = hashlib.sha256()
        for part in self.sets:
            columns = sorted(part.columns.items()) if part.columns else None
            place = self._roots.index(part.root)  # which sets share a folder, not where it is
            digest.update(repr((part.rows.digest, part.format, columns, part.weight, place)).encode())
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
        """Check the first rows of each set, about ``limit`` in all, and its last; no id may be used twice among them.

        Returns:
            A line that says how many rows were checked and how many of them have images.

        Raises:
            UserError: for the first bad row, unless bad rows are skipped.
        """
        num_checked = num_with_images = 0
        each = max(1, limit // max(len(self.sets), 1))
        for part, start in zip(self.sets, self._starts, strict=False):
            ids: dict[str, str] = {}
            size = len(part.rows)
            for row in [*range(min(size, each)), *range(max(size - 1, each), size)]:
                num_checked += 1
                pair = self.read(start + row)
                if isinstance(pair, PreferencePair):
                    if self.on_bad_row == "error" and part.format in ("vapr", "trl"):  # others count in their own ways
                        check_id(pair, ids)
                    num_with_images += bool(pair.images)
        checked = "all rows" if num_checked == len(self) else f"{num_checked:,} rows, the others when they are read"
        return f"checked {checked}; {num_with_images:,} have images"

    def image_groups(self) -> np.ndarray:
        """A number for each row (n,) int64, equal where rows show the same first image; NO_IMAGE for those without.

        Images are numbered as they first appear. Every row is read once for that; the result is kept in the user's
        cache folder.
        """
        known = user_cache() / "index" / f"images-{self.digest[:32]}.npy"
        with contextlib.suppress(OSError, ValueError, EOFError):
            return np.load(known, mmap_mode="r", allow_pickle=False)
        keys = np.empty(len(self), np.uint64)
        with Display("group by image", len(self), unit="row") as display:
            for number in range(len(self)):
                keys[number] = self._image_key(number)
                if (number + 1) % 1000 == 0:
                    display.advance("", 1000)
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        rank = np.empty(len(first), np.int64)
        rank[np.argsort(first)] = np.arange(len(first))
        groups = np.where(keys == 0, NO_IMAGE, rank[inverse])
        with written_whole(known) as file:
            np.save(file, groups, allow_pickle=False)
        return groups

    @property
    def num_images(self) -> int:
        """Distinct first images; every row is read once for that."""
        groups = np.unique(self.image_groups())
        return len(groups) - int(NO_IMAGE in groups)

    def _image_key(self, number: int) -> int:
        part, row = self._find(number)
        image: object = None
        try:
            images = part.as_vapr(row).get("images")
            first = images[0] if isinstance(images, list) and images else images
            if isinstance(first, dict):
                first = first.get("bytes") or first.get("path")
            image = first or None
        except (BadRow, AttributeError):
            pass  # a row of its own; its fault is told when it is read
        if image is None:
            return 0
        root = self._roots.index(part.root)
        data = image if isinstance(image, bytes) else f"{root}|{image}".encode(errors="replace")
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
            has ``pairs/``, only that); a folder that ``save_to_disk`` wrote, or one with LLaMA-Factory's
            ``dataset_info.json``; or a hub id.
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
    given_source = object()
    for rows, folder, given, mapped in _open(str(source), split, subset, columns):
        if not len(rows):
            continue
        name = given if format == "auto" else format
        if name is None:
            name = "columns" if columns else _detect(rows)
        if mapped:
            _check_columns(rows, mapped)
        sets.append(PairSet(rows, name, mapped, root or folder, root is not None, weight, source=given_source))
    if not sets:
        raise UserError(f"{source}: no pairs in it")
    return sets


def _check_columns(rows: Rows, columns: Mapping[str, str]) -> None:
    """A column that no row has is a mistake, above all one for images: the pairs would be trained on without them."""
    seen: set[str] = set()
    found: set[str] = set()
    for number in {*range(min(len(rows), 100)), *np.linspace(0, len(rows) - 1, 400).astype(int).tolist()}:
        with contextlib.suppress(BadRow, AttributeError):
            row = rows[number]
            seen |= row.keys()
            found |= {key for key, column in columns.items() if key in map_columns(row, {key: column})}
    for key, column in columns.items():
        if key not in found:
            raise UserError(
                f"data.columns.{key}: {_source_name(rows)} has no column '{column}'; there are "
                f"{', '.join(sorted(seen)) or 'none'} (leave {key} out if no row has it)"
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
        for is_table, folder, group in _pair_files(path, source, split):
            for rows in [open_table(group)] if is_table else map(open_rows, group):
                yield rows, folder, None, columns
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source) and Path(source).suffix not in SUFFIXES:
        yield open_hub(source, subset, split), Path(), None, columns
    else:
        raise UserError(f"{source}: no such file or folder")


def _pair_files(path: Path, source: str, split: str) -> list[tuple[bool, Path, list[Path]]]:
    """Files to read: whether they are tables, the folder relative image paths start at, and the files."""
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(f"{path}: unknown file type; use {', '.join(SUFFIXES)}")
        files = [path]
    elif path.is_dir():
        folder = path / "pairs" if (path / "pairs").is_dir() else path
        files = _of_split(folder.glob("*"), source, split)
    else:
        files = _of_split((Path(file) for file in glob.glob(str(path))), source, split)

    def kind(file: Path) -> tuple[bool, Path]:
        return file.suffix in TABLES, path if path.is_dir() else file.parent

    return [(*key, list(group)) for key, group in itertools.groupby(files, key=kind)]


def _of_split(found: Iterable[Path], source: str, split: str) -> list[Path]:
    """Pair files in name order; where every one is named after a split, only those of ``split``."""
    files = sorted(file for file in found if file.suffix in SUFFIXES and file.is_file())
    if not files:
        raise UserError(f"{source}: no {', '.join(SUFFIXES)} file there")
    names = [match[0] if (match := SPLIT_NAME.match(file.name)) else None for file in files]
    if None in names:
        return files
    wanted = [file for file, name in zip(files, names, strict=True) if name == split]
    if not wanted:
        there = ", ".join(sorted({name for name in names if name}))
        raise UserError(f"{source}: no file of split '{split}'; there are {there} (set split, or name the file)")
    return wanted


SPLIT_NAME = re.compile(r"(train|test|validation|valid|val|dev|eval)(?=[-_.])")
"""As the hub names its shards: train-00000-of-00010.parquet. Rows to test on are not to be trained on."""


def _llama_factory(folder: Path, subset: str | None) -> tuple[Rows, Path, str, Mapping[str, str] | None]:
    """The preference set that a ``dataset_info.json`` describes."""
    file = folder / "dataset_info.json"
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        ranked = {name: entry for name, entry in entries.items() if entry.get("ranking")}
        for entry in ranked.values():
            texts = [
                entry.get("file_name", ""),
                *(entry.get("columns") or {}).values(),
                *(entry.get("tags") or {}).values(),
            ]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError("file_name, columns and tags must be names")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
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
