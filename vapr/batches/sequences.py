"""Forest of segments -> the sequences of queries and keys that attention is handed.

T = packed tokens, N = segments, S = sequences, K = gathered keys, Q = queries of the last layer.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vapr.batches.forest import NO_PARENT
from vapr_kernels.causal_attention import NO_FORK
from vapr_kernels.gather_rows import RowIndex

SHORT_BRANCH = 64
"""Tokens up to which a branch is cheaper among the queries of the sequence that it leaves than by itself, on a CPU."""


@dataclass(frozen=True, slots=True, eq=False)
class Branches:
    """The same sequences for attention by products, which takes short branches together with what they leave.

    A branch is the end of a completion whose pair's other one is the end of the sequence that it leaves: how a pair's
    scores are multiplied depends on no other pair.
    """

    forks: tuple[int, ...]  # of each sequence: NO_FORK, or how many keys it has in common with the last that is none
    lengths_k: tuple[int, ...]  # of a branch: its own keys
    keys: RowIndex | None  # (K,) into T; None: every token once, as they lie

    def to(self, device: torch.device | str) -> "Branches":
        return dataclasses.replace(self, keys=None if self.keys is None else self.keys.to(device))


@dataclass(frozen=True, slots=True, eq=False)
class SegmentAttention:
    """Sequences and gathered keys of one variable-length attention call over the forest.

    A sequence is a chain of segments, each the first child of the one before it, so its queries lie side by side in the
    pack. Its keys are the tokens above the chain and the chain itself; the last query sees the last key
    (bottom-right causal).

    Tokens that see one another both ways are a sequence by themselves: the chain is cut before and behind them. Such a
    block never straddles a fork, because equal images are equal to their ends.
    """

    cu_seqlens_q: Tensor  # (S + 1,) int32
    cu_seqlens_k: Tensor  # (S + 1,) int32
    lengths_q: tuple[int, ...]  # the same on the host, for backends that loop
    lengths_k: tuple[int, ...]
    keys: RowIndex  # (K,) into T
    both_ways: tuple[bool, ...] | None = None  # of each sequence, whether its queries see later keys; None: none does
    branches: Branches | None = None  # None: no sequence is a short branch

    def to(self, device: torch.device | str) -> "SegmentAttention":
        return dataclasses.replace(
            self,
            cu_seqlens_q=self.cu_seqlens_q.to(device, non_blocking=True),
            cu_seqlens_k=self.cu_seqlens_k.to(device, non_blocking=True),
            keys=self.keys.to(device),
            branches=self.branches.to(device) if self.branches and torch.device(device).type == "cpu" else None,
        )


@dataclass(frozen=True, slots=True, eq=False)
class LastQueries:
    """The queries of the last layer: of each attention sequence the end, from its first token that predicts something.

    What stands before them is attended to, and nobody asks for what it would attend to itself.
    """

    tokens: Tensor  # (Q,) into T
    cu_seqlens: Tensor  # (S + 1,) int32; bounds of each sequence's queries
    lengths: tuple[int, ...]  # the same on the host
    predicting: Tensor  # (predicting tokens,) into Q

    def to(self, device: torch.device | str) -> "LastQueries":
        moved = (x.to(device, non_blocking=True) for x in (self.tokens, self.cu_seqlens, self.predicting))
        tokens, cu_seqlens, predicting = moved
        return LastQueries(tokens, cu_seqlens, self.lengths, predicting)


def sequences_of(
    starts: np.ndarray, parents: list[int], ending: list[set[int]], blocks: np.ndarray | None
) -> SegmentAttention:
    """Chains of first children become attention sequences, cut at blocks of tokens that see one another both ways.

    Args:
        starts: packed offsets of the segments, (N + 1,).
        parents: of each segment.
        ending: numbers of the pairs whose paths end in each segment.
        blocks: a number for each token of a block, (T,), and -1 for others; None: there are no blocks.
    """
    ancestors: list[np.ndarray] = []  # of each segment, in path order, itself left out
    for parent in parents:
        above = np.empty(0, np.int64)
        if parent != NO_PARENT:
            above = np.concatenate([ancestors[parent], np.arange(starts[parent], starts[parent + 1])])
        ancestors.append(above)
    lengths_q, lengths_k, keys, both_ways = [], [], [], []
    forks, trunk = [], range(0)  # the segments of the last sequence that is no branch
    n = 0
    while n < len(parents):
        last = n
        while last + 1 < len(parents) and parents[last + 1] == last:  # the first child follows its parent
            last += 1
        same_pair = parents[n] in trunk and ending[last] == ending[trunk[-1]] and len(ending[last]) == 1
        if same_pair and starts[last + 1] - starts[n] <= SHORT_BRANCH:
            forks.append(len(ancestors[n]))
        else:
            forks.append(NO_FORK)
            trunk = range(n, last + 1)
        own = np.arange(starts[n], starts[last + 1])
        cuts = [0, len(own)] if blocks is None else [0, *(np.flatnonzero(np.diff(blocks[own])) + 1), len(own)]
        for start, end in itertools.pairwise(cuts):
            keys += [ancestors[n], own[:end]]
            lengths_q.append(int(end - start))
            lengths_k.append(int(len(ancestors[n]) + end))
            both_ways.append(blocks is not None and bool(blocks[own[start]] >= 0))
        n = last + 1
    return SegmentAttention(
        cu_seqlens_q=cumulative(lengths_q),
        cu_seqlens_k=cumulative(lengths_k),
        lengths_q=tuple(lengths_q),
        lengths_k=tuple(lengths_k),
        keys=RowIndex.build(torch.from_numpy(np.concatenate(keys)), int(starts[-1])),
        both_ways=None if blocks is None else tuple(both_ways),
        branches=None if blocks is not None else _branches(forks, lengths_k, keys[::2], keys[1::2], int(starts[-1])),
    )


def _branches(
    forks: list[int], lengths_k: list[int], above: list[np.ndarray], own: list[np.ndarray], num_tokens: int
) -> Branches | None:
    """Lay keys for branches, given what is above each sequence and its own tokens; None: there are no branches."""
    if max(forks, default=NO_FORK) == NO_FORK:
        return None
    keys = [
        tokens
        for fork, higher, mine in zip(forks, above, own, strict=True)
        for tokens in ((higher, mine) if fork == NO_FORK else (mine,))
    ]
    rows = np.concatenate(keys)
    in_place = len(rows) == num_tokens and bool((rows == np.arange(num_tokens)).all())
    return Branches(
        forks=tuple(forks),
        lengths_k=tuple(k if fork == NO_FORK else k - fork for fork, k in zip(forks, lengths_k, strict=True)),
        keys=None if in_place else RowIndex.build(torch.from_numpy(rows), num_tokens),
    )


def last_queries(predicting: np.ndarray, lengths: Sequence[int]) -> LastQueries:
    """Find the end of every attention sequence that holds its predictions; at least its last token.

    Args:
        predicting: tokens that predict something, ascending.
        lengths: of the sequences, end to end.
    """
    ends = np.cumsum(lengths)
    begins = ends - lengths
    first = np.searchsorted(predicting, begins)  # the first prediction from each beginning on
    starts = np.minimum(np.append(predicting, ends[-1])[first], ends - 1)
    tokens = np.concatenate([np.arange(start, end) for start, end in zip(starts, ends, strict=True)])
    counts = (ends - starts).tolist()
    return LastQueries(
        tokens=torch.from_numpy(tokens),
        cu_seqlens=cumulative(counts),
        lengths=tuple(counts),
        predicting=torch.from_numpy(np.searchsorted(tokens, predicting)),
    )


def cumulative(lengths: Sequence[int]) -> Tensor:
    """Return where each of sequences laid end to end begins, and where the last one ends, (S + 1,) int32."""
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(torch.int32)
