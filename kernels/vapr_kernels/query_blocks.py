"""QueryBlocks: in which blocks attention on a CPU takes its queries, which keys each block is multiplied with, and what
of the scores is hidden.

A block is queries in a row, often of several sequences that begin with the same keys. Its keys are taken where they
lie: from the first one that some query of it sees to the last, strangers between them included, whose scores are
hidden. Only where strangers are so many that their products cost more than a copy, keys are gathered.

T = queries, K = keys.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BLOCK = 128
"""Queries of a block: fewer waste less of the triangle, more make better products."""

SCRATCH = 2**22
"""Scores of a block, over all heads, at most; long sequences get shorter blocks."""

COPIED_KEY = 64
"""Scores that take the time of copying a key and its value, and of adding up their gradients."""


@dataclass(frozen=True, slots=True)
class Block:
    """Queries in a row, and what they see."""

    rows: slice  # of the queries
    keys: slice | Tensor  # of the keys: a range, or (keys,) of those to gather
    num_keys: int
    hidden: Tensor | None  # (rows, last keys): minus infinity where a query does not see a key, else 0; None: all seen


@dataclass(frozen=True, slots=True)
class _Piece:
    """Queries in a row of one sequence."""

    start: int
    stop: int
    keys: np.ndarray  # those that one of them sees, ascending
    own: int  # place among them of the first query's own
    causal: bool
    window: int | None

    def seen(self) -> np.ndarray:
        """Return which key each query sees, (queries, keys)."""
        own, places = self.own + np.arange(self.stop - self.start)[:, None], np.arange(len(self.keys))
        seen = places <= own if self.causal else np.ones((len(own), len(places)), bool)
        return seen if self.window is None else seen & (places > own - self.window)


@dataclass(frozen=True, slots=True, eq=False)
class QueryBlocks:
    """The blocks, in the plain lists and tensors that an operator of PyTorch takes."""

    bounds: tuple[int, ...]  # of each block: first query, stop, first key, stop, keys to gather or 0, hidden columns
    gathered: Tensor  # (gathered keys,) int64, block after block
    hidden: Tensor  # fp32, the hidden parts of the scores, block after block

    @property
    def num_queries(self) -> int:
        """Return T."""
        return max(self.bounds[1::6], default=0)

    @property
    def stop(self) -> int:
        """Return how many keys there must be at least."""
        return max(self.bounds[3::6], default=0)

    @classmethod
    def build(
        cls, lengths_q: Sequence[int], lengths_k: Sequence[int], keys: np.ndarray, *, num_heads: int,
        both_ways: Sequence[bool] | None = None, window: int | None = None,
    ) -> "QueryBlocks":  # fmt: skip
        """Cut S sequences into blocks.

        Args:
            lengths_q: queries of each sequence, which lie one after another.
            lengths_k: its keys; its last query's own is the last one.
            keys: where they lie, sequence after sequence, ascending in each.
            num_heads: of the queries.
            both_ways: for each sequence, whether its queries see later keys, too; None: none does.
            window: how many keys a query sees up to its own, at least 1; None: all.

        Raises:
            ValueError: for a sequence without queries or with fewer keys, keys that are negative or do not ascend, and
                lengths that do not match.
        """
        _check(lengths_q, lengths_k, keys, both_ways, window)
        bounds: list[int] = []
        gathered, hidden = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
        for block in _blocks(_pieces(lengths_q, lengths_k, keys, num_heads, both_ways, window), num_heads):
            first, last = block[0].start, block[-1].stop
            start, stop = min(int(piece.keys[0]) for piece in block), max(int(piece.keys[-1]) for piece in block) + 1
            seen = np.zeros((last - first, stop - start), bool)
            for piece in block:
                seen[piece.start - first : piece.stop - first, piece.keys - start] = piece.seen()
            used = np.flatnonzero(seen.any(0))
            num_gathered = 0
            if (stop - start - len(used)) * (last - first) > COPIED_KEY * len(used):
                num_gathered, seen = len(used), seen[:, used]
                gathered.append(start + used)
            partly = np.flatnonzero(~seen.all(0))
            columns = seen.shape[1] - int(partly[0]) if len(partly) else 0
            hidden.append(np.where(seen[:, seen.shape[1] - columns :], np.float32(0), np.float32(-np.inf)).ravel())
            bounds += [first, last, start, stop, num_gathered, columns]
        return cls(tuple(bounds), torch.from_numpy(np.concatenate(gathered)), torch.from_numpy(np.concatenate(hidden)))


def each_block(bounds: Sequence[int], gathered: Tensor, hidden: Tensor) -> Iterator[Block]:
    """Yield the blocks of a :class:`QueryBlocks`, whose fields the arguments are."""
    keys_before = hidden_before = 0
    for first, last, start, stop, num_gathered, columns in zip(*[iter(bounds)] * 6, strict=True):
        keys: slice | Tensor = slice(start, stop)
        if num_gathered:
            keys = gathered[keys_before : keys_before + num_gathered]
        size = (last - first) * columns
        part = hidden[hidden_before : hidden_before + size].view(last - first, columns) if columns else None
        yield Block(slice(first, last), keys, num_gathered or stop - start, part)
        keys_before, hidden_before = keys_before + num_gathered, hidden_before + size


def _pieces(
    lengths_q: Sequence[int], lengths_k: Sequence[int], keys: np.ndarray, num_heads: int,
    both_ways: Sequence[bool] | None, window: int | None,
) -> Iterator[_Piece]:  # fmt: skip
    """Cut every sequence's queries into pieces of about the same size."""
    row = key = 0
    for n, (num_q, num_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        causal = not (both_ways and both_ways[n])
        count = -(-num_q // max(1, min(BLOCK, SCRATCH // (num_heads * num_k))))
        size = -(-num_q // count)
        for start in range(0, num_q, size):
            end = min(start + size, num_q)
            own = num_k - num_q + start
            first = 0 if window is None else max(0, own - window + 1)
            stop = num_k - num_q + end if causal else num_k
            yield _Piece(row + start, row + end, keys[key + first : key + stop], own - first, causal, window)
        row, key = row + num_q, key + num_k


def _blocks(pieces: Iterator[_Piece], num_heads: int) -> Iterator[list[_Piece]]:
    """Put neighbours that begin with the same keys together, as many as a block holds."""
    block: list[_Piece] = []
    for piece in pieces:
        if block:
            rows = piece.stop - block[0].start
            num_keys = max(int(one.keys[-1]) for one in (block[-1], piece)) + 1 - int(piece.keys[0])
            if piece.keys[0] != block[0].keys[0] or rows > BLOCK or rows * num_keys * num_heads > SCRATCH:
                yield block
                block = []
        block.append(piece)
    if block:
        yield block


def _check(
    lengths_q: Sequence[int], lengths_k: Sequence[int], keys: np.ndarray, both_ways: Sequence[bool] | None,
    window: int | None,
) -> None:  # fmt: skip
    for num_q, num_k in zip(lengths_q, lengths_k, strict=True):
        if not 1 <= num_q <= num_k:
            raise ValueError(f"a sequence must have from 1 query to as many as keys, got {num_q} and {num_k}")
    if sum(lengths_k) != len(keys):
        raise ValueError(f"lengths_k must sum to the {len(keys)} keys, got {sum(lengths_k)}")
    if len(keys) and keys.min() < 0:
        raise ValueError(f"keys must not be negative, got {keys.min()}")
    falls = np.flatnonzero(np.diff(keys) <= 0) + 1
    if stray := set(falls.tolist()) - set(np.cumsum(lengths_k).tolist()):
        raise ValueError(f"keys of a sequence must ascend, but key {min(stray)} does not")
    if both_ways is not None and len(both_ways) != len(lengths_q):
        raise ValueError(f"both_ways must have an entry for each of {len(lengths_q)} sequences, got {len(both_ways)}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
