"""Nested subsets of sets of pairs: the first pairs of one order that depends on nothing but the number of rows."""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vapr.config import DataConfig, SourceConfig, Sources
from vapr.data.convert import convert
from vapr.data.pair import PreferencePair
from vapr.data.pairs import Pairs, PairSet
from vapr.data.sources import open_sets
from vapr.data.text_rows import Rows
from vapr.errors import UserError


@dataclass(frozen=True)
class DataSet:
    """A named set of pairs.

    Attributes:
        name: as the study calls it.
        given: what a run's ``data.train`` says to have all of it.
        pairs: its pairs.
        sources: ``given``, with what it leaves out filled in.
    """

    name: str
    given: Sources
    pairs: Pairs
    sources: Sequence[SourceConfig]

    @property
    def num_pairs(self) -> int:
        """The pairs of an epoch."""
        return sum(round(size * weight) for size, weight in self.pairs.weighted_sizes)

    def subset(self, size: int, folder: Path) -> Path:
        """Return the file of the first ``size`` pairs of the order, in vapr's own format, written if it is not there.

        Rows that cannot be used are passed over where the base skips such rows; the next ones take their place.

        Raises:
            UserError: if there are fewer pairs, or the rows have weights, which a subset would lose.
        """
        if weighted := [source.path for source in self.sources if source.weight != 1]:
            raise UserError(
                f"data.{self.name}: {weighted[0]} has a weight, which sizes would lose; repeat rows instead"
            )
        path = folder / f"{self.name}-{size}-{self.pairs.digest[:10]}.jsonl"
        if not path.is_file():
            picked = self._first(size)
            parts = [
                dataclasses.replace(part, rows=_Picked(part.rows, rows), source=None)
                for part, start in self._starts()
                if (rows := [number - start for number in picked if 0 <= number - start < len(part.rows)])
            ]
            convert(Pairs(parts), "vapr", path, quiet=True)
        return path

    def _first(self, size: int) -> list[int]:
        """Return the numbers of the first usable pairs of the order."""
        picked: list[int] = []
        for number in np.random.default_rng(0).permutation(len(self.pairs)).tolist():
            if len(picked) == size:
                break
            if isinstance(self.pairs.read(number), PreferencePair):
                picked.append(number)
        if len(picked) < size:
            raise UserError(
                f"sizes: {size:,} is more than the {len(picked):,} pairs of data.{self.name}; take it out, or leave "
                f"the combination out with exclude: [{{data: {self.name}, size: {size}}}]"
            )
        return picked

    def _starts(self) -> list[tuple[PairSet, int]]:
        """Return the parts, each with the number of its first row."""
        lengths = [len(part.rows) for part in self.pairs.sets]
        return list(zip(self.pairs.sets, itertools.accumulate(lengths, initial=0), strict=False))


class _Picked:
    """Some rows of others."""

    def __init__(self, rows: Rows, numbers: Sequence[int]) -> None:
        self._rows, self._numbers = rows, numbers
        self.digest = f"{rows.digest}|{numbers}"

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, number: int) -> Any:
        return self._rows[self._numbers[number]]

    def where(self, number: int) -> str:
        return self._rows.where(self._numbers[number])


def open_data_sets(data: DataConfig, named: dict[str, Sources]) -> list[DataSet]:
    """Open sets of pairs; what a source leaves out is taken from the base's ``data``.

    Raises:
        UserError: naming the set that cannot be opened.
    """
    opened = []
    for name, given in named.items():
        sources = data.filled(given)
        try:
            pairs = Pairs([part for source in sources for part in open_sets(source)], data.on_bad_row)
            pairs.check()
        except UserError as error:
            raise UserError(f"data.{name}: {error}") from None
        opened.append(DataSet(name, given, pairs, sources))
    return opened
