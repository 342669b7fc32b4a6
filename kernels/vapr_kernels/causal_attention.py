"""causal_attention: attention inside each of several sequences by matrix products of a CPU's library; nothing is kept.

Queries go in blocks. A block is multiplied with the keys up to its last query only, so most of the upper triangle is
never computed, and its scores stay in the cache:

    P = softmax(scale Q K^T),  O = P V
    dP = dO V^T,  dS = P (dP - rowsum(P dP)),  dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO

The backward pass computes P again from q and k, so neither O nor a log-sum-exp is kept. A group of query heads that
share a key head is one matrix of more rows: keys and values are never repeated.

A sequence that looks both ways has no triangle. With a window a block is multiplied with the keys from its first
query's earliest on.

T = packed tokens, K = gathered keys, H = query heads, G = key heads, R = H / G, E = head dim.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vapr_kernels.arguments import expect_float, expect_like

BLOCK = 128
"""Queries of a block: fewer waste less of the triangle, more make better products."""

SCRATCH = 2**22
"""Scores of a block, over all heads, at most; long sequences get shorter blocks."""


@dataclass(frozen=True, slots=True)
class _Block:
    rows: slice  # of all queries as (G, T R, E)
    keys: slice  # up to its last query's, of all (G, K, E)
    num_queries: int
    causal: bool  # whether the last num_queries keys are its own queries' and are seen from their own query on
    hidden: int  # keys that are too far before its first query, one more for each next; so many fewer if below 0
    first: bool  # of all visits to its keys, among which are those of all later visits


def _blocks(
    lengths_q: Sequence[int], lengths_k: Sequence[int], num_heads: int, group: int, both_ways: Sequence[bool] | None,
    window: int | None,
) -> Iterator[_Block]:  # fmt: skip
    """Cut every sequence's queries into blocks of about the same size, the last block of a sequence first."""
    row = key = 0
    for n, (num_q, num_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        causal = not (both_ways and both_ways[n])
        count = -(-num_q // max(1, min(BLOCK, SCRATCH // (num_heads * num_k))))
        size = -(-num_q // count)
        for start in reversed(range(0, num_q, size)):
            end = min(start + size, num_q)
            rows = slice((row + start) * group, (row + end) * group)
            until = num_k - num_q + end if causal else num_k
            too_far = num_k - num_q + start - window + 1 if window is not None else -num_k
            keys = slice(key + max(too_far, 0), key + until)
            yield _Block(rows, keys, end - start, causal, min(too_far, 0), window is None and end == num_q)
        row, key = row + num_q, key + num_k


@functools.cache
def _above_diagonal(dtype: torch.dtype) -> Tensor:
    """Minus infinity above the diagonal and zero elsewhere, (BLOCK, 1, BLOCK)."""
    return torch.full((BLOCK, BLOCK), -torch.inf, dtype=dtype).triu_(1)[:, None]


def _group_rows(x: Tensor, num_groups: int) -> Tensor:
    """``x`` (T, H, E) as (G, T R, E): a view where there is one group, or one head in each."""
    return x.unflatten(1, (num_groups, -1)).transpose(0, 1).flatten(1, 2)


def _token_rows(x: Tensor, group: int) -> Tensor:
    """Undo :func:`_group_rows`: ``x`` (G, T R, E) as (T, H, E), contiguous."""
    return x.unflatten(1, (-1, group)).transpose(0, 1).flatten(1, 2).contiguous()


class _Scratch:
    """Memory for one block's scores at a time."""

    def __init__(self, blocks: list[_Block], like: Tensor) -> None:
        sizes = (((b.rows.stop - b.rows.start) * (b.keys.stop - b.keys.start)) for b in blocks)
        self.memory = like.new_empty(max(sizes, default=0) * like.shape[0])

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        shape = (q.shape[0], q.shape[1], k.shape[1])
        return self.memory[: shape[0] * shape[1] * shape[2]].view(shape)


def _probabilities(q: Tensor, k: Tensor, block: _Block, scale: float, scratch: _Scratch) -> Tensor:
    """Return P (G, rows, keys) of a block's queries (G, rows, E) and keys (G, keys, E)."""
    p, count = scratch.scores(q, k), block.num_queries
    torch.baddbmm(p, q, k.mT, beta=0, alpha=scale, out=p)
    by_query = p.unflatten(1, (count, -1))  # (G, queries, R, keys)
    if block.causal and count > 1:
        by_query[..., -count:] += _above_diagonal(p.dtype)[:count, :, :count]
    if (columns := block.hidden + count - 1) > 0:
        too_far = torch.full((count, columns), -torch.inf, dtype=p.dtype).tril_(block.hidden - 1)
        by_query[..., :columns] += too_far[:, None]
    return torch.softmax(p, -1, out=p)


def causal_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, lengths_q: Sequence[int], lengths_k: Sequence[int], scale: float,
    both_ways: Sequence[bool] | None = None, window: int | None = None,
) -> Tensor:  # fmt: skip
    """Return the output, (T, H, E)."""
    group = q.shape[1] // k.shape[1]
    blocks = list(_blocks(lengths_q, lengths_k, q.shape[1], group, both_ways, window))
    q, k, v = _group_rows(q, k.shape[1]), k.transpose(0, 1), v.transpose(0, 1)
    out, scratch = torch.empty_like(q), _Scratch(blocks, q)
    for block in blocks:
        p = _probabilities(q[:, block.rows], k[:, block.keys], block, scale, scratch)
        torch.bmm(p, v[:, block.keys], out=out[:, block.rows])
    return _token_rows(out, group)


def causal_attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths_q: Sequence[int], lengths_k: Sequence[int], scale: float,
    both_ways: Sequence[bool] | None = None, window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dq (T, H, E), dk and dv (K, G, E)."""
    group = q.shape[1] // k.shape[1]
    blocks = list(_blocks(lengths_q, lengths_k, q.shape[1], group, both_ways, window))
    dout, q = (_group_rows(x, k.shape[1]) for x in (dout, q))
    k, v = k.transpose(0, 1), v.transpose(0, 1)
    dq = torch.empty_like(q)
    dk, dv = (torch.empty_like(x) if window is None else torch.zeros_like(x) for x in (k, v))
    first, second = _Scratch(blocks, q), _Scratch(blocks, q)
    for block in blocks:
        rows, keys = block.rows, block.keys
        p = _probabilities(q[:, rows], k[:, keys], block, scale, first)
        beta = 0 if block.first else 1  # the first visit to these keys writes, the others add
        torch.baddbmm(dv[:, keys], p.mT, dout[:, rows], beta=beta, out=dv[:, keys])
        ds = second.scores(q[:, rows], k[:, keys])
        torch.bmm(dout[:, rows], v[:, keys].mT, out=ds)
        torch.ops.aten._softmax_backward_data.out(ds, p, -1, p.dtype, grad_input=ds)
        torch.baddbmm(dq[:, rows], ds, k[:, keys], beta=0, alpha=scale, out=dq[:, rows])
        torch.baddbmm(dk[:, keys], ds.mT, q[:, rows], beta=beta, alpha=scale, out=dk[:, keys])
    return _token_rows(dq, group), dk.transpose(0, 1).contiguous(), dv.transpose(0, 1).contiguous()


@torch.library.custom_op("vapr::causal_attention", mutates_args=())
def _causal_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths_q: Sequence[int], lengths_k: Sequence[int], scale: float,
    both_ways: Sequence[bool] | None = None, window: int | None = None,
) -> Tensor:  # fmt: skip
    return causal_attention_fwd(q, k, v, lengths_q, lengths_k, scale, both_ways, window)


@_causal_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, lengths_q: Sequence[int], lengths_k: Sequence[int], scale: float,
    both_ways: Sequence[bool] | None = None, window: int | None = None,
) -> Tensor:  # fmt: skip
    return q.new_empty(q.shape)


@torch.library.custom_op("vapr::causal_attention_bwd", mutates_args=())
def _causal_attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths_q: Sequence[int], lengths_k: Sequence[int], scale: float,
    both_ways: Sequence[bool] | None = None, window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return causal_attention_bwd(dout, q, k, v, lengths_q, lengths_k, scale, both_ways, window)


@_causal_attention_bwd.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths_q: Sequence[int], lengths_k: Sequence[int], scale: float,
    both_ways: Sequence[bool] | None = None, window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
    return *_causal_attention_bwd(dout, *ctx.saved_tensors, *ctx.options), *(None,) * 5


_causal_attention.register_autograd(_backward, setup_context=_setup_context)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths_q: Sequence[int], lengths_k: Sequence[int], *, scale: float,
    both_ways: Sequence[bool] | None = None, window: int | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention inside each of S sequences laid end to end, the last query at the last key.

    Args:
        q: queries, shape (T, H, E), float32 or float64, on a CPU: products of half precision would round the scores.
        k, v: keys and values, shape (K, G, E), of the dtype and device of ``q``, with H a multiple of G.
        lengths_q, lengths_k: queries and keys of each sequence, T and K together; no more queries than keys.
        scale: factor of the scores.
        both_ways: for each sequence, whether its queries see later keys, too; None: none does.
        window: how many keys a query sees up to its own, at least 1; None: all.

    Returns:
        Shape (T, H, E), contiguous, differentiable in q, k and v; of them it keeps q, k and v only.

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
    if window is not None and window >= max(lengths_k, default=0):
        window = None  # hides nothing
    return _causal_attention(q, k, v, lengths_q, lengths_k, scale, both_ways, window)
