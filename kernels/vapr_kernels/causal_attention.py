"""causal_attention: attention inside each of several sequences by matrix products of a CPU's library; nothing is kept.

Queries go in blocks, whose scores stay in the cache, and are multiplied with the keys in sight of a block, where they
lie (:mod:`vapr_kernels.query_blocks`):

    P = softmax(scale Q K^T),  O = P V
    dP = dO V^T,  dS = P (dP - rowsum(P dP)),  dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO

The backward pass computes P again from q and k, so neither O nor a log-sum-exp is kept. A group of query heads that
share a key head is one matrix of more rows: keys and values are never repeated.

T = queries, K = keys, t and k = those of a block, H = query heads, G = key heads, R = H / G, E = head dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vapr_kernels.arguments import expect_float, expect_like
from vapr_kernels.query_blocks import Block, QueryBlocks, each_block


def _heads_first(x: Tensor, num_groups: int) -> Tensor:
    """``x`` (t, H, E) as (G, t R, E): a view where there is one group, or one head in each."""
    return x.unflatten(1, (num_groups, -1)).transpose(0, 1).flatten(1, 2)


def _tokens_first(x: Tensor, group: int) -> Tensor:
    """View ``x`` (G, t R, E) as (t, G, R, E)."""
    return x.unflatten(1, (-1, group)).transpose(0, 1)


def _scratch(blocks: Sequence[Block], like: Tensor) -> Tensor:
    """Return memory for the scores of one block at a time."""
    sizes = ((block.rows.stop - block.rows.start) * block.num_keys for block in blocks)
    return like.new_empty(max(sizes, default=0) * like.shape[1])


def _probabilities(q: Tensor, k: Tensor, block: Block, scale: float, scratch: Tensor) -> Tensor:
    """Return P (G, t R, k), in ``scratch``, of queries (G, t R, E) and keys (G, k, E)."""
    shape = (*q.shape[:2], k.shape[1])
    p = scratch[: q[..., 0].numel() * k.shape[1]].view(shape)
    torch.baddbmm(p, q, k.mT, beta=0, alpha=scale, out=p)
    if block.hidden is not None:
        num_rows, columns = block.hidden.shape
        p.unflatten(1, (num_rows, -1))[..., -columns:] += block.hidden[:, None]
    return torch.softmax(p, -1, out=p)


def causal_attention_fwd(q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Block], scale: float) -> Tensor:
    """Return the output, (T, H, E)."""
    num_groups, group = k.shape[1], q.shape[1] // k.shape[1]
    out, scratch = q.new_empty(q.shape), _scratch(blocks, q)
    for block in blocks:
        k_b, v_b = (x[block.keys].transpose(0, 1) for x in (k, v))
        p = _probabilities(_heads_first(q[block.rows], num_groups), k_b, block, scale, scratch)
        # The library takes the heads of a product at once where its result is contiguous, and else one by one.
        out[block.rows].unflatten(1, (num_groups, group)).copy_(_tokens_first(torch.bmm(p, v_b), group))
    return out


def causal_attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Block], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv in the shapes of q, k and v, contiguous."""
    num_groups, group = k.shape[1], q.shape[1] // k.shape[1]
    dq, dk, dv = q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    first, second = _scratch(blocks, q), _scratch(blocks, q)
    for block in blocks:
        q_b, dout_b = (_heads_first(x[block.rows], num_groups) for x in (q, dout))
        k_b, v_b = (x[block.keys].transpose(0, 1) for x in (k, v))
        p = _probabilities(q_b, k_b, block, scale, first)
        _add_product(dv, block.keys, p.mT, dout_b, 1.0)
        ds = second[: p.numel()].view(p.shape)
        torch.bmm(dout_b, v_b.mT, out=ds)
        torch.ops.aten._softmax_backward_data.out(ds, p, -1, p.dtype, grad_input=ds)
        dq_b = dq[block.rows].unflatten(1, (num_groups, group))
        torch.mul(_tokens_first(torch.bmm(ds, k_b), group), scale, out=dq_b)
        _add_product(dk, block.keys, ds.mT, q_b, scale)
    return dq, dk, dv


def _add_product(total: Tensor, keys: slice | Tensor, a: Tensor, b: Tensor, factor: float) -> None:
    """Add the products of ``a`` (G, k, t R) and ``b`` (G, t R, E) times a factor to rows of ``total`` (K, G, E)."""
    if isinstance(keys, slice):
        rows = total[keys].transpose(0, 1)
        torch.baddbmm(rows, a, b, alpha=factor, out=rows)
    else:
        total.index_add_(0, keys, torch.bmm(a, b).transpose(0, 1), alpha=factor)


@torch.library.custom_op("vapr::causal_attention", mutates_args=())
def _causal_attention(
    q: Tensor, k: Tensor, v: Tensor, gathered: Tensor, hidden: Tensor, bounds: Sequence[int], scale: float
) -> Tensor:
    return causal_attention_fwd(q, k, v, list(each_block(bounds, gathered, hidden)), scale)


@_causal_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, gathered: Tensor, hidden: Tensor, bounds: Sequence[int], scale: float) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("vapr::causal_attention_bwd", mutates_args=())
def _causal_attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, gathered: Tensor, hidden: Tensor, bounds: Sequence[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return causal_attention_bwd(dout, q, k, v, list(each_block(bounds, gathered, hidden)), scale)


@_causal_attention_bwd.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, gathered: Tensor, hidden: Tensor, bounds: Sequence[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.blocks = inputs[3:]


def _backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
    return *_causal_attention_bwd(dout, *ctx.saved_tensors, *ctx.blocks), None, None, None, None


_causal_attention.register_autograd(_backward, setup_context=_setup_context)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, blocks: QueryBlocks, *, scale: float) -> Tensor:
    """Attend in blocks.

    Args:
        q: queries, shape (T, H, E), float32 or float64, on a CPU: products of half precision would round the scores.
        k, v: keys and values, shape (K, G, E), of the dtype and device of ``q``, with H a multiple of G.
        blocks: which keys each query sees.
        scale: factor of the scores.

    Returns:
        Shape (T, H, E), contiguous, differentiable in q, k and v; of them it keeps q, k and v only.

    Raises:
        ValueError: naming the argument with a wrong shape, dtype or device, or blocks of other tokens.
    """
    expect_float("q", q, "(T, H, E)")
    expect_float("k", k, "(K, G, E)")
    if q.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"q must be torch.float32 or torch.float64, got {q.dtype}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] or q.shape[1] == 0:
        raise ValueError(f"q must have a multiple of the heads of k, got {q.shape[1]} and {k.shape[1]}")
    expect_like("k", k, (len(k), k.shape[1], q.shape[2]), q)
    expect_like("v", v, tuple(k.shape), q)
    if blocks.num_queries != len(q) or blocks.stop > len(k):
        raise ValueError(
            f"blocks must be of the {len(q)} queries and {len(k)} keys, got {blocks.num_queries} and {blocks.stop}"
        )
    return _causal_attention(q, k, v, blocks.gathered, blocks.hidden, blocks.bounds, scale)
