"""Preference pairs by number, out of files of any format, folders, shards, hub data sets and mixtures of them.

Rows stay in their files and are decoded and checked when they are asked for, so a million cost no memory.
"""

import contextlib
import hashlib
import itertools
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from vapr.cache import one_at_a_time, user_cache, written_whole
from vapr.data.formats import as_vapr, keys_read
from vapr.data.pair import PreferencePair, pair_from_row, row_id
from vapr.data.rendered import rendered_marker, rendered_warning
from vapr.data.row_values import map_columns, says_something
from vapr.data.text_rows import Rows
from vapr.errors import BadRow, NoPair, UserError
from vapr.progress import Display

NO_IMAGE = -1

CHECKED_AT_START = 5_000
"""Rows that are checked before a model is loaded. More would make the start grow with the data."""

NOTES = frozenset({"provenance", "checks", "source", "licence", "license"})
"""Columns of a pair that say where it is from. Nobody expects them to be trained on."""


@dataclass(frozen=True, slots=True, eq=False)
class PairSet:
    """Rows of one format with one image folder."""

    rows: Rows
    format: str
    columns: Mapping[str, str] | None
    root: Path
    confined: bool
    weight: float = 1.0
    """How often each row is seen in an epoch: 2 is twice, 0.25 a quarter of the rows, others each epoch."""
    source: object = None
    """The same for all sets of one source, whose weight they share."""
    images_needed: bool = True
    """Whether an image whose file is missing makes a row a bad one."""

    def as_vapr(self, number: int) -> Any:
        """Return a row in vapr's own shape, not yet checked."""
        row = self.rows[number]
        return as_vapr(map_columns(row, self.columns) if self.columns else row, self.format)


class Pairs(Sequence[PreferencePair]):
    """Every pair of one or more sets. ``pairs[n]`` reads row ``n`` and checks it; iterating can leave bad rows out.

    Args:
        sets: one after the other.
        on_bad_row: ``error`` or ``skip``, for iterating.

    Attributes:
        skipped: reason by place, for the rows that iterating left out.
        unused: in how many of the checked rows a column says something that no pair takes, by column.
        warnings: lines on what :meth:`check` found strange but not wrong.
    """

    def __init__(self, sets: Sequence[PairSet], on_bad_row: str = "error") -> None:
        self.sets = tuple(sets)
        self.on_bad_row = on_bad_row
        self.skipped: dict[str, str] = {}
        self.unused: Counter[str] = Counter()
        self._num_checked = 0
        self.warnings: list[str] = []
        self._roots = list(dict.fromkeys(part.root for part in sets))
        self._starts = [0, *itertools.accumulate(len(part.rows) for part in sets)]

    def __len__(self) -> int:
        """Return the number of rows, good and bad."""
        return self._starts[-1]

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        part, row = self._find(number)
        where = part.rows.where(row)
        try:
            shaped = part.as_vapr(row)
            return pair_from_row(
                shaped, root=part.root, confined=part.confined, where=where, number=number,
                images_needed=part.images_needed,
            )  # fmt: skip
        except BadRow as error:
            raise type(error)(f"{where}: {error}") from None

    def __iter__(self) -> Iterator[PreferencePair]:
        for number in range(len(self)):
            pair = self.read(number)
            if isinstance(pair, PreferencePair):
                yield pair

    def read(self, number: int) -> PreferencePair | BadRow:
        """Return pair ``number``, or the reason why its row is skipped, which is also noted in ``skipped``.

        Raises:
            UserError: if it is bad and bad rows are errors.
        """
        try:
            return cast(PreferencePair, self[number])
        except BadRow as error:
            if self.on_bad_row == "error" and not isinstance(error, NoPair):
                raise
            self.skipped[self.where(number)] = str(error)
            return error

    def raw(self, number: int) -> Any:
        """Return row ``number`` as its file has it, all keys included. Raise BadRow if it cannot be decoded."""
        part, row = self._find(number)
        return part.rows[row]

    def rows_in(self, others: "Pairs") -> int:
        """Count the rows in files or data sets whose content is that of one of the others', whatever their names."""
        known = {part.rows.digest for part in others.sets}
        return sum(len(part.rows) for part in self.sets if part.rows.digest in known)

    def folder(self, number: int) -> Path:
        """Return the folder where relative image paths of row ``number`` start."""
        return self._find(number)[0].root

    def extra_keys(self, number: int) -> list[str]:
        """Return the keys of a row that no part of its pair comes from."""
        part, _ = self._find(number)
        used = keys_read(part.format, part.columns)
        return sorted(key for key, value in self.raw(number).items() if says_something(value) and key not in used)

    def where(self, number: int) -> str:
        """Return the place of row ``number`` as ``file:line``."""
        part, row = self._find(number)
        return part.rows.where(row)

    def _find(self, number: int) -> tuple[PairSet, int]:
        part = bisect_right(self._starts, number) - 1
        return self.sets[part], number - self._starts[part]

    @property
    def weighted_sizes(self) -> list[tuple[int, float]]:
        """The number of rows and the weight of each source, in order."""
        sources = itertools.groupby(self.sets, key=lambda part: (id(part.source), part.weight))
        return [(sum(len(part.rows) for part in parts), weight) for (_, weight), parts in sources]

    @property
    def digest(self) -> str:
        """Hash of the rows and of how they are read: a row's number means nothing in data of another digest."""
        digest = hashlib.sha256()
        for part in self.sets:
            columns = sorted(part.columns.items()) if part.columns else None
            place = self._roots.index(part.root)  # which sets share a folder, not where it is
            digest.update(repr((part.rows.digest, part.format, columns, part.weight, place)).encode())
        return digest.hexdigest()

    @property
    def formats(self) -> list[str]:
        """One line for each set: where it is from, its size and its format."""
        return [
            f"{source_name(part.rows)} ({len(part.rows):,} rows, format {part.format}"
            + (f", weight {part.weight:g}" if part.weight != 1 else "")
            + ")"
            for part in self.sets
        ]

    def check(self, limit: int = CHECKED_AT_START) -> str:
        """Check the first rows of each set, about ``limit`` in all, and its last row; their ids must be unique.

        Returns:
            A line that says how many rows were checked and how many of them have images.

        Raises:
            UserError: for the first bad row, unless bad rows are skipped.
        """
        num_checked = num_with_images = 0
        self.unused.clear()
        rendered: list[tuple[str, str]] = []
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
                    self.unused.update(key for key in self.extra_keys(start + row) if key not in NOTES)
                    if (marker := rendered_marker(pair)) is not None:
                        rendered.append((pair.where, marker))
        self._num_checked = num_checked
        self.warnings = [rendered_warning(*rendered[0], len(rendered), num_checked)] if rendered else []
        checked = "all rows" if num_checked == len(self) else f"{num_checked:,} rows, the others when they are read"
        return f"checked {checked}; {num_with_images:,} have images"

    def image_groups(self) -> np.ndarray:
        """Number the images that rows show first, in the order in which they appear.

        Every row is read once for that; the result is kept in the user's cache folder.

        Returns:
            The number of each row's first image, or NO_IMAGE, (number of rows,) int64.
        """

        def compute() -> np.ndarray:
            keys = self._key_of_every_row("group by image", self._image_key)
            _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
            rank = np.empty(len(first), np.int64)
            rank[np.argsort(first)] = np.arange(len(first))
            return np.where(keys == 0, NO_IMAGE, rank[inverse])

        return _computed_once(f"images-{self.digest[:32]}", compute)

    @property
    def notes(self) -> list[str]:
        """A line on the columns of the checked rows that no pair uses; empty if there are none."""
        among = "" if self._num_checked == len(self) else f" among the {self._num_checked:,} rows checked"
        return [f"columns that no pair uses{among}: {columns_told(self.unused)}"] if self.unused else []

    @property
    def num_images(self) -> int:
        """The number of distinct first images; every row is read once for that."""
        groups = np.unique(self.image_groups())
        return len(groups) - int(NO_IMAGE in groups)

    def ids_among(self, wanted: Collection[str]) -> set[str]:
        """Return those of ``wanted`` that are the id of a row.

        Every row is read once for that; what is found (8 bytes a row) is kept in the user's cache folder.
        """
        name = hashlib.sha256(repr((self.digest, self.formats)).encode()).hexdigest()[:32]
        keys = _computed_once(f"ids-{name}", lambda: self._key_of_every_row("look up ids", self._id_key))
        ids = list(wanted)
        there = np.isin(np.array([_hash(id.encode(errors="surrogatepass")) for id in ids], np.uint64), keys)
        return {id for id, found in zip(ids, there, strict=True) if found}

    def _key_of_every_row(self, label: str, key: Callable[[int], int]) -> np.ndarray:
        """Return ``key`` of each row, (number of rows,) uint64, and show the progress."""
        keys = np.empty(len(self), np.uint64)
        with Display(label, len(self), unit="row") as display:
            for number in range(len(self)):
                keys[number] = key(number)
                if (number + 1) % 1000 == 0:
                    display.advance("", 1000)
        return keys

    def _id_key(self, number: int) -> int:
        part, row = self._find(number)
        try:
            return _hash(row_id(part.as_vapr(row), part.rows.where(row)).encode())
        except BadRow:
            return 0  # its fault is told when it is read

    def _image_key(self, number: int) -> int:
        part, row = self._find(number)
        try:
            images = part.as_vapr(row).get("images")
        except BadRow:
            return 0  # its fault is told when it is read
        image = images[0] if isinstance(images, list) and images else images
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        if not image:
            return 0
        root = self._roots.index(part.root)
        return _hash(image if isinstance(image, bytes) else f"{root}|{image}".encode(errors="replace"))


def _computed_once(name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Load an array from the user's cache folder, or compute it and keep it there."""
    known = user_cache() / "index" / f"{name}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):
        return np.load(known, mmap_mode="r", allow_pickle=False)
    with one_at_a_time(known):
        with contextlib.suppress(OSError, ValueError, EOFError):
            return np.load(known, mmap_mode="r", allow_pickle=False)
        array = compute()
        with written_whole(known) as file:
            np.save(file, array, allow_pickle=False)
    return array


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def columns_told(counts: Mapping[str, int], most: int = 10) -> str:
    """List columns with the number of their rows, common ones first; beyond ``most`` of them say how many more."""
    common_first = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    told = [f"{key} ({count:,} row{'s' if count > 1 else ''})" for key, count in common_first]
    return ", ".join(told[:most]) + (f" and {len(told) - most:,} more" if len(told) > most else "")


def source_name(rows: Rows) -> str:
    """Return the file or data set that rows are from."""
    return rows.where(0).rsplit(":", 1)[0]


def check_id(pair: PreferencePair, places: dict[str, str]) -> None:
    """Remember where the pair's id is used. Raise UserError if it was used before."""
    if pair.id in places:
        raise UserError(f"{pair.where}: id '{pair.id}' was already used at {places[pair.id]}; ids must be unique")
    places[pair.id] = pair.where


def write_pairs(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows of vapr's own shape as jsonl, whole or not at all."""
    with written_whole(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
