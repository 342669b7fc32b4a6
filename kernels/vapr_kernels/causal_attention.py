"""causal_attention: attention inside each of several sequences by matrix products of a CPU's library.

Queries go in blocks. A block is multiplied with the keys up to its last query only, so most of the upper triangle is
never computed, and its scores stay in the cache:

    P = softmax(scale Q K^T),  O = P V
    dP = dO V^T,  dS = P (dP - rowsum(P dP)),  dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO

P is computed again from q and k; neither it nor O nor a log-sum-exp is kept. A group of query heads that share a key
head is one matrix of more rows: keys and values are never repeated.

A sequence that looks both ways has no triangle. With a window a block is multiplied with the keys from its first
query's earliest on. A branch of a sequence shares its blocks, and what the one has of its own is hidden from the other.

T = packed tokens, K = gathered keys, H = query heads, G = key heads, R = H / G, E = head dim.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vapr_kernels.arguments import expect_float, expect_like

BLOCK = 128
"""Queries of a block: fewer waste less of the triangle, more make better products."""

SCRATCH = 2**22
"""Scores of a block, over all heads, at most; long sequences get shorter blocks."""

NO_FORK = -1
"""Of a sequence that is no branch."""


@dataclass(slots=True)
class _Unit:
    """A sequence and its branches, whose queries lie in a row, as their keys do. Lists have a value for each query."""

    first_row: int
    first_key: int
    num_keys: int
    own: list[int]  # the key at its own place
    last: list[int]  # the last key that it may see
    hidden: list[tuple[int, int]]  # the keys that another branch has of its own; the first is where this one forks off


def _units(
    lengths_q: Sequence[int], lengths_k: Sequence[int], forks: Sequence[int] | None, both_ways: Sequence[bool] | None
) -> list[_Unit]:
    units: list[_Unit] = []
    row = key = 0
    for n, (num_q, num_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        fork = NO_FORK if forks is None else forks[n]
        if fork == NO_FORK:
            units.append(_Unit(row, key, 0, [], [], []))
        unit = units[-1]
        hidden = (0, 0) if fork == NO_FORK else (fork, unit.num_keys)
        unit.num_keys += num_k
        own = range(unit.num_keys - num_q, unit.num_keys)
        unit.own += own
        unit.last += [unit.num_keys - 1] * num_q if both_ways and both_ways[n] else own
        unit.hidden += [hidden] * num_q
        row, key = row + num_q, key + num_k
    return units


@dataclass(frozen=True, eq=False)
class _Block:
    unit: _Unit
    queries: slice  # of the unit
    in_sight: slice  # keys of the unit: from the first one that a query of the block sees to the last one
    window: int | None
    group: int

    @property
    def num_queries(self) -> int:
        return self.queries.stop - self.queries.start

    @cached_property
    def rows(self) -> slice:
        """Of all queries as (G, T R, E)."""
        first = self.unit.first_row
        return slice((first + self.queries.start) * self.group, (first + self.queries.stop) * self.group)

    @cached_property
    def keys(self) -> slice:
        """Of all (G, K, E)."""
        return slice(self.unit.first_key + self.in_sight.start, self.unit.first_key + self.in_sight.stop)

    @property
    def is_first(self) -> bool:
        """Whether it is the first to visit its keys, among which are those of all later visits."""
        return self.window is None and self.queries.stop == len(self.unit.own)

    def num_scores(self, num_groups: int) -> int:
        """Return how many scores it has over all heads."""
        return self.num_queries * self.group * (self.in_sight.stop - self.in_sight.start) * num_groups

    @cached_property
    def hidden(self) -> Tensor | None:
        """Minus infinity where a query does not see a key and else 0, (queries, 1, last keys); None: all are seen."""
        own, last = (torch.tensor(x[self.queries])[:, None] for x in (self.unit.own, self.unit.last))
        fork, begin = torch.tensor(self.unit.hidden[self.queries]).T[:, :, None]
        keys = torch.arange(self.in_sight.start, self.in_sight.stop)
        seen = (keys <= last) & ((keys < fork) | (keys >= begin))
        if self.window is not None:  # it counts keys of a query's own path
            seen &= own - keys - torch.where(keys < fork, begin - fork, 0) < self.window
        partly = (~seen.all(0)).nonzero()
        if not len(partly):
            return None
        return torch.zeros(1).where(seen[:, None, int(partly[0]) :], -torch.inf)


@functools.lru_cache(maxsize=4)  # every layer of a batch asks for the same ones, and the last one for its own
def _blocks(
    lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], forks: tuple[int, ...] | None,
    both_ways: tuple[bool, ...] | None, window: int | None, num_heads: int, group: int,
) -> tuple[_Block, ...]:  # fmt: skip
    """Cut every unit's queries into blocks of about the same size, the last block of a unit first."""
    blocks = []
    for unit in _units(lengths_q, lengths_k, forks, both_ways):
        num_rows = len(unit.own)
        count = -(-num_rows // max(1, min(BLOCK, SCRATCH // (num_heads * unit.num_keys))))
        size = -(-num_rows // count)
        for start in reversed(range(0, num_rows, size)):
            queries = slice(start, min(start + size, num_rows))
            in_sight = slice(_first_in_sight(unit, queries, window), max(unit.last[queries]) + 1)
            blocks.append(_Block(unit, queries, in_sight, window, group))
    return tuple(blocks)


def _first_in_sight(unit: _Unit, queries: slice, window: int | None) -> int:
    if window is None:
        return 0
    first = unit.num_keys
    for own, (fork, begin) in zip(unit.own[queries], unit.hidden[queries], strict=True):
        key = max(0, own - (begin - fork) - window + 1)  # as the path counts
        first = min(first, key if key < fork else key + begin - fork)
    return first


def _group_rows(x: Tensor, num_groups: int) -> Tensor:
    """``x`` (T, H, E) as (G, T R, E): a view where there is one group, or one head in each."""
    return x.unflatten(1, (num_groups, -1)).transpose(0, 1).flatten(1, 2)


def _token_rows(x: Tensor, group: int) -> Tensor:
    """Undo :func:`_group_rows`: ``x`` (G, T R, E) as (T, H, E), contiguous."""
    return x.unflatten(1, (-1, group)).transpose(0, 1).flatten(1, 2).contiguous()


def _scratch(blocks: Sequence[_Block], like: Tensor) -> Iterator[Tensor]:
    """Yield memory for each block's scores (G, rows, keys), all in the same place."""
    num_groups = like.shape[0]
    memory = like.new_empty(max((block.num_scores(num_groups) for block in blocks), default=0))
    for block in blocks:
        shape = (num_groups, block.num_queries * block.group, block.keys.stop - block.keys.start)
        yield memory[: block.num_scores(num_groups)].view(shape)


def _write_probabilities(q: Tensor, k: Tensor, block: _Block, scale: float, p: Tensor) -> None:
    """Write P (G, rows, keys) of a block's queries (G, rows, E) and keys (G, keys, E)."""
    torch.baddbmm(p, q, k.mT, beta=0, alpha=scale, out=p)
    if block.hidden is not None:
        p.unflatten(1, (block.num_queries, -1))[..., -block.hidden.shape[-1] :] += block.hidden
    torch.softmax(p, -1, out=p)


def causal_attention_fwd(q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[_Block], scale: float) -> Tensor:
    """Return the output, (T, H, E)."""
    num_groups, group = k.shape[1], q.shape[1] // k.shape[1]
    q, k, v = _group_rows(q, num_groups), k.transpose(0, 1), v.transpose(0, 1)
    out = torch.empty_like(q)
    for block, p in zip(blocks, _scratch(blocks, q), strict=True):
        _write_probabilities(q[:, block.rows], k[:, block.keys], block, scale, p)
        torch.bmm(p, v[:, block.keys], out=out[:, block.rows])
    return _token_rows(out, group)


def causal_attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[_Block], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq (T, H, E), dk and dv (K, G, E)."""
    num_groups, group = k.shape[1], q.shape[1] // k.shape[1]
    dout, q = (_group_rows(x, num_groups) for x in (dout, q))
    k, v = k.transpose(0, 1), v.transpose(0, 1)
    dq = torch.empty_like(q)
    written = all(block.is_first for block in blocks[:1])  # every key by the first visit to it
    dk, dv = (torch.empty_like(x) if written else torch.zeros_like(x) for x in (k, v))
    for block, p, ds in zip(blocks, _scratch(blocks, q), _scratch(blocks, q), strict=True):
        q_b, dout_b, dq_b = q[:, block.rows], dout[:, block.rows], dq[:, block.rows]
        k_b, v_b, dk_b, dv_b = k[:, block.keys], v[:, block.keys], dk[:, block.keys], dv[:, block.keys]
        _write_probabilities(q_b, k_b, block, scale, p)
        beta = 0 if block.is_first else 1  # the first visit to these keys writes, the others add
        torch.baddbmm(dv_b, p.mT, dout_b, beta=beta, out=dv_b)
        torch.bmm(dout_b, v_b.mT, out=ds)
        torch.ops.aten._softmax_backward_data.out(ds, p, -1, p.dtype, grad_input=ds)
        torch.baddbmm(dq_b, ds, k_b, beta=0, alpha=scale, out=dq_b)
        torch.baddbmm(dk_b, ds.mT, q_b, beta=beta, alpha=scale, out=dk_b)
    return _token_rows(dq, group), dk.transpose(0, 1).contiguous(), dv.transpose(0, 1).contiguous()


def _blocks_of(
    q: Tensor, k: Tensor, lengths_q: Sequence[int], lengths_k: Sequence[int], both_ways: Sequence[bool] | None,
    window: int | None, forks: Sequence[int] | None,
) -> tuple[_Block, ...]:  # fmt: skip
    lengths = (tuple(map(int, x)) for x in (lengths_q, lengths_k))  # symbols have no hash
    see = (None if x is None else tuple(map(int, x)) for x in (forks, both_ways))
    num_heads, num_groups = int(q.shape[1]), int(k.shape[1])
    return _blocks(*lengths, *see, window, num_heads, num_heads // num_groups)


@torch.library.custom_op("vapr::causal_attention", mutates_args=())
def _causal_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths_q: Sequence[int], lengths_k: Sequence[int], scale: float,
    both_ways: Sequence[bool] | None = None, window: int | None = None, forks: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    blocks = _blocks_of(q, k, lengths_q, lengths_k, both_ways, window, forks)
    return causal_attention_fwd(q, k, v, blocks, scale)


@_causal_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, lengths_q: Sequence[int], lengths_k: Sequence[int], scale: float,
    both_ways: Sequence[bool] | None = None, window: int | None = None, forks: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    return q.new_empty(q.shape)


@torch.library.custom_op("vapr::causal_attention_bwd", mutates_args=())
def _causal_attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths_q: Sequence[int], lengths_k: Sequence[int], scale: float,
    both_ways: Sequence[bool] | None = None, window: int | None = None, forks: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    blocks = _blocks_of(q, k, lengths_q, lengths_k, both_ways, window, forks)
    return causal_attention_bwd(dout, q, k, v, blocks, scale)


@_causal_attention_bwd.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths_q: Sequence[int], lengths_k: Sequence[int], scale: float,
    both_ways: Sequence[bool] | None = None, window: int | None = None, forks: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
    return *_causal_attention_bwd(dout, *ctx.saved_tensors, *ctx.options), *(None,) * 6


_causal_attention.register_autograd(_backward, setup_context=_setup_context)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths_q: Sequence[int], lengths_k: Sequence[int], *, scale: float,
    both_ways: Sequence[bool] | None = None, window: int | None = None, forks: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention inside each of S sequences laid end to end, the last query at the last key.

    Args:
        q: queries, shape (T, H, E), float32 or float64, on a CPU: products of half precision would round the scores.
        k, v: keys and values, shape (K, G, E), of the dtype and device of ``q``, with H a multiple of G.
        lengths_q, lengths_k: queries and keys of each sequence, T and K together; no more queries than keys.
        scale: factor of the scores.
        both_ways: for each sequence, whether its queries see later keys, too; None: none does.
        window: how many keys a query sees up to its own, at least 1; None: all.
        forks: for each sequence NO_FORK, or how many keys a branch has in common with the last sequence before it that
            is none: its queries see the first so many of that one's keys, and then its own, which are all that it has.
            None: there are no branches.

    Returns:
        Shape (T, H, E), contiguous, differentiable in q, k and v.

    Raises:
        ValueError: naming the argument with a wrong shape, dtype or device, or a sequence with too many queries.
    """
    expect_float("q", q, "(T, H, E)")
    expect_float("k", k, "(K, G, E)")
    if q.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"q must be torch.float32 or torch.float64, got {q.dtype}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] or q.shape[1] == 0:
        raise ValueError(f"q must have a multiple of the heads of k, got {q.shape[1]} and {k.shape[1]}")
    expect_like("k", k, (sum(lengths_k), k.shape[1], q.shape[2]), q)
    expect_like("v", v, tuple(k.shape), q)
    if sum(lengths_q) != len(q):
        raise ValueError(f"lengths_q must sum to the {len(q)} queries, got {sum(lengths_q)}")
    for num_q, num_k in zip(lengths_q, lengths_k, strict=True):
        if not 1 <= num_q <= num_k:
            raise ValueError(f"a sequence must have from 1 query to as many as keys, got {num_q} and {num_k}")
    if both_ways is not None and len(both_ways) != len(lengths_q):
        raise ValueError(f"both_ways must have an entry for each of {len(lengths_q)} sequences, got {len(both_ways)}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if forks is not None:
        _check_forks(forks, lengths_k, both_ways)
    if window is not None and window >= sum(lengths_k):  # of the longest path, at most
        window = None  # hides nothing
    return _causal_attention(q, k, v, lengths_q, lengths_k, scale, both_ways, window, forks)


def _check_forks(forks: Sequence[int], lengths_k: Sequence[int], both_ways: Sequence[bool] | None) -> None:
    if len(forks) != len(lengths_k):
        raise ValueError(f"forks must have an entry for each of {len(lengths_k)} sequences, got {len(forks)}")
    trunk = -1
    for n, (fork, num_k) in enumerate(zip(forks, lengths_k, strict=True)):
        if fork == NO_FORK:
            trunk = num_k
        elif not 0 <= fork <= trunk:
            raise ValueError(f"forks must be {NO_FORK} or keys of a sequence before, got {fork} for sequence {n}")
        elif both_ways is not None and any(both_ways):
            raise ValueError("forks must be None where a sequence looks both ways")
