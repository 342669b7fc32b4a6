"""linear_logps: log-probs of labels under an LM head, without ever holding more than a chunk of logits.

With l = x . W^T, target y and m = max over the other columns:

    S      = sum over v != y of exp(l_v - m)
    t      = log S + m - l_y              (log-odds of "anything but y")
    logp   = -softplus(t)
    1 - p  = sigmoid(t)
    dlogp/dx = (1 - p) (W_y - (E / S) @ W),   E_v = exp(l_v - m), E_y = 0
    dlogp/dW = (1 - p) (onehot_y - E / S)^T x

The target column never enters a sum, so confident tokens lose nothing: 1 - p is a small sum, not 1 - exp(logp), which
rounds to zero or to 70 % error near p = 1.

With a frozen head the gradient of x is finished in the forward pass (two matmuls instead of three), because it needs
nothing from downstream but one scalar per row. A trained head recomputes its logits in the backward pass.

L = predictions, D = hidden, V = vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_BYTES = 256 * 2**20
"""Largest buffer of logits held at a time."""


def _logits(x: Tensor, head: Tensor) -> Tensor:
    """x (R, D) @ head (V, D)^T, shape (R, V), accumulated and stored in fp32 (fp64 for fp64 inputs)."""
    if x.dtype in (torch.float32, torch.float64):
        return x @ head.T
    if x.is_cuda:
        return torch.mm(x, head.T, out_dtype=torch.float32)
    return x.float() @ head.float().T


def _split_target(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn ``logits`` (R, V) into E in place; return (E, S (R, 1), t (R,))."""
    target = logits.gather(1, labels[:, None])
    # The target is taken out by its column, not by comparing values: ties must survive.
    logits.scatter_(1, labels[:, None], -torch.inf)
    m = logits.amax(1, keepdim=True)
    E = logits.sub_(m).exp_()
    S = E.sum(1, keepdim=True)
    return E, S, (S.log() + m - target)[:, 0]


def _chunks(num_rows: int, vocabulary: int, element_size: int, chunk_rows: int | None) -> range:
    rows = chunk_rows or max(1, CHUNK_BYTES // (vocabulary * element_size))
    return range(0, num_rows, rows)


def _expected_rows(E: Tensor, S: Tensor, head: Tensor) -> Tensor:
    """(E / S) @ head: the mean head row of the other columns, (R, D), fp32 out."""
    share = E.div_(S)
    if head.dtype in (torch.float32, torch.float64):
        return share @ head
    if head.is_cuda:
        return torch.mm(share.to(head.dtype), head, out_dtype=torch.float32)
    return share @ head.float()


def linear_logps_fwd(
    hidden: Tensor, head: Tensor, labels: Tensor, *, with_dx: bool, chunk_rows: int | None
) -> tuple[Tensor, Tensor | None]:
    """Returns logps (L,) and, if asked for, dlogp/dx (L, D) in the accumulation dtype."""
    accumulate = torch.promote_types(hidden.dtype, torch.float32)
    logps = hidden.new_empty(len(hidden), dtype=accumulate)
    dx = hidden.new_empty(hidden.shape, dtype=accumulate) if with_dx else None
    chunks = _chunks(len(hidden), len(head), accumulate.itemsize, chunk_rows)
    for start in chunks:
        rows = slice(start, start + chunks.step)
        E, S, t = _split_target(_logits(hidden[rows], head), labels[rows])
        logps[rows] = F.logsigmoid(-t)  # = -softplus(t), finite for any t
        if dx is not None:
            dx[rows] = head[labels[rows]].to(accumulate) - _expected_rows(E, S, head)
            dx[rows] *= t.sigmoid()[:, None]
    return logps, dx


def linear_logps_bwd(
    dout: Tensor, hidden: Tensor, head: Tensor, labels: Tensor, *, with_dx: bool, chunk_rows: int | None
) -> tuple[Tensor | None, Tensor]:
    """Recompute form for a trained head: returns dx (L, D) or None, and dW (V, D)."""
    accumulate = torch.promote_types(hidden.dtype, torch.float32)
    dx = hidden.new_empty(hidden.shape) if with_dx else None
    dhead = head.new_zeros(head.shape, dtype=accumulate)
    chunks = _chunks(len(hidden), len(head), accumulate.itemsize, chunk_rows)
    for start in chunks:
        rows = slice(start, start + chunks.step)
        x, y = hidden[rows], labels[rows]
        E, S, t = _split_target(_logits(x, head), y)
        scale = (dout[rows] * t.sigmoid())[:, None]
        expected = _expected_rows(E, S, head)  # E now holds E / S
        if dx is not None:
            dx[rows] = (scale * (head[y].to(accumulate) - expected)).to(dx.dtype)
        dlogits = E.mul_(-scale).scatter_(1, y[:, None], scale)
        if x.is_cuda and x.dtype not in (torch.float32, torch.float64):
            dhead += torch.mm(dlogits.to(x.dtype).T, x, out_dtype=torch.float32)
        else:
            dhead.addmm_(dlogits.T, x.to(accumulate))
    return dx, dhead.to(head.dtype)


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, labels, chunk_rows):
        ctx.frozen_head = not ctx.needs_input_grad[1]
        ctx.chunk_rows = chunk_rows
        with_dx = ctx.frozen_head and ctx.needs_input_grad[0]
        logps, dx = linear_logps_fwd(hidden, head, labels, with_dx=with_dx, chunk_rows=chunk_rows)
        if ctx.frozen_head:
            ctx.dtype = hidden.dtype
            ctx.save_for_backward(dx)
        else:
            ctx.save_for_backward(hidden, head, labels)
        return logps

    @staticmethod
    def backward(ctx, dout):
        if ctx.frozen_head:
            (dx,) = ctx.saved_tensors
            return (dx * dout[:, None]).to(ctx.dtype), None, None, None
        hidden, head, labels = ctx.saved_tensors
        with_dx = ctx.needs_input_grad[0]
        dx, dhead = linear_logps_bwd(dout, hidden, head, labels, with_dx=with_dx, chunk_rows=ctx.chunk_rows)
        return dx, dhead, None, None


def linear_logps(hidden: Tensor, head: Tensor, labels: Tensor, *, chunk_rows: int | None = None) -> Tensor:
    """Log-prob of each label under ``softmax(hidden @ head.T)``; logits exist one chunk of rows at a time.

    Args:
        hidden: hidden rows that predict, shape (L, D).
        head: LM head, shape (V, D), same dtype and device as ``hidden``.
        labels: token ids to predict, int64, shape (L,), values in [0, V).
        chunk_rows: rows whose logits are held at a time; by default as many as fit in 256 MiB.

    Returns:
        Log-probs, shape (L,), fp32 (fp64 for fp64 inputs), differentiable in ``hidden`` and ``head``.

    Raises:
        ValueError: naming the argument with a wrong shape, dtype or device.
    """
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError(f"hidden (L, D) and head (V, D) do not fit: {tuple(hidden.shape)} and {tuple(head.shape)}")
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 of shape ({len(hidden)},), got {labels.dtype} {tuple(labels.shape)}")
    if hidden.dtype != head.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden and head must share one float dtype, got {hidden.dtype} and {head.dtype}")
    if not hidden.device == head.device == labels.device:
        raise ValueError(f"hidden, head and labels lie on {hidden.device}, {head.device} and {labels.device}")
    if len(head) < 2:
        raise ValueError(f"head must have at least 2 rows, got {len(head)}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    return _LinearLogps.apply(hidden, head, labels, chunk_rows)
