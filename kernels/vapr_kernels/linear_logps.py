"""linear_logps: log-probs of labels under an LM head, without ever holding more logits than a chunk.

With l = x . W^T, target y and t the log-odds of "anything but y":

    t          = log of the sum over v != y of exp(l_v - l_y)
    logp       = -softplus(t)
    1 - p      = sigmoid(t)
    dlogp/dx   = (1 - p) W_y - sum over v != y of p_v W_v
    dlogp/dW_v = (1 - p) x for v = y, -p_v x for the others

The target column never enters a sum, so confident tokens lose nothing: 1 - p is a small sum, not 1 - exp(logp), which
rounds to zero or to 70 % error near p = 1. The other columns are held as e_v = exp(l_v - l_y) times a power of two, and
p_v = (1 - p) / total * e_v, where total is the sum of e (see exp_logits).

dlogp/dx needs nothing from downstream but one factor per row, so the forward pass finishes it while e is there. A
trained head keeps e for its own gradient, or computes it again, a slice of the vocabulary at a time.

    gradient            matrix products, each 2LDV FLOPs
    none                1  logits
    dx                  2  logits, e W                          frozen head
    keep                3  logits, e W, e^T x                   trained head, while e fits
    recompute           4  logits; logits again, e W, e^T x     trained head

L = predictions, D = hidden, V = vocabulary.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from vapr_kernels import launch
from vapr_kernels.exp_logits import exp_buffer, exp_logits, exponentials
from vapr_kernels.exp_rows import exp_rows
from vapr_kernels.head_gradients import add_target_rows, hidden_gradient
from vapr_kernels.matmul import matmul
from vapr_kernels.row_stats import OFFSET, RowStats
from vapr_kernels.target_logits import target_logits

Mode = Literal["auto", "one-pass", "recompute", "chunked", "torch"]
Product = Literal["fused", "library", "torch"]
"""Who multiplies: our kernel, with exponentials in its epilogue; cuBLAS and a kernel over its logits; PyTorch alone."""
TABLE = ("log_odds", "scale", "target", "offset")
Gradient = Literal["none", "dx", "keep", "recompute"]
LOG2E = 1.4426950408889634


ROWS = 1024
"""Rows whose exponentials exist at a time, at most: e W of so many has a tile for nearly every processor of a GPU."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a call is computed."""

    product: Product
    gradient: Gradient
    chunk_rows: int  # rows whose logits exist at a time


def make_plan(
    hidden: Tensor, head: Tensor, mode: Mode = "auto", chunk_rows: int | None = None, *, grad: bool = True
) -> Plan:
    """Choose how a call on hidden (L, D) and head (V, D) is computed; ``grad`` tells whether autograd is on."""
    product = _product(hidden, mode)
    bytes_per_row = len(head) * _exp_dtype(hidden, product).itemsize
    budget = _budget(hidden.device)
    if not grad or not (hidden.requires_grad or head.requires_grad):
        gradient: Gradient = "none"
    elif mode == "recompute":
        gradient = "recompute"
    elif not head.requires_grad:
        gradient = "dx"
    else:
        fits = len(hidden) * bytes_per_row <= 3 * budget
        gradient = "keep" if fits or mode in ("one-pass", "chunked") else "recompute"
    if product == "fused" and gradient in ("none", "recompute"):  # which store nothing
        rows = max(len(hidden), 1)
    else:
        rows = rows_at_a_time(len(hidden), budget // bytes_per_row, fused=product == "fused")
    return Plan(product, gradient, chunk_rows or rows)


def rows_at_a_time(num_rows: int, most: int, *, fused: bool) -> int:
    """Return of how many rows to hold exponentials at a time, where there is room for those of ``most`` rows.

    As few pieces of one size as ROWS allows, too; of whole tiles if the product is the fused one.
    """
    tile = 128 if fused else 1
    most = max(min(most, ROWS) // tile, 1) * tile
    num_pieces = max(-(-num_rows // most), 1)
    return max(-(-num_rows // (num_pieces * tile)), 1) * tile


def _product(hidden: Tensor, mode: Mode) -> Product:
    # fp16 cannot hold the exponentials, and the kernels know no fp64.
    if mode == "torch" or not launch.runs_triton(hidden) or hidden.dtype not in (torch.float32, torch.bfloat16):
        return "torch"
    if mode == "chunked" or (mode == "auto" and hidden.dtype == torch.float32):
        return "library"
    return "fused"


def _exp_dtype(hidden: Tensor, product: str) -> torch.dtype:
    """Choose the dtype of the exponentials: the inputs' where a GPU multiplies by them, else fp32 (fp64)."""
    return torch.promote_types(hidden.dtype, torch.float32) if product == "torch" else hidden.dtype


def _budget(device: torch.device) -> int:
    """Bytes of exponentials held at a time: a 96th of the GPU's memory (0.25 GiB of 24), 256 MiB on a CPU.

    Three times as many are kept for the gradient of a trained head.
    """
    return torch.cuda.get_device_properties(device).total_memory // 96 if device.type == "cuda" else 256 * 2**20


def _torch_rows(x: Tensor, head: Tensor, labels: Tensor, exps: Tensor) -> RowStats:
    """The naive pass: logits go into ``exps`` (L, V) and become exponentials relative to the row's maximum."""
    accumulate = exps.dtype
    if x.is_cuda and x.dtype != accumulate:
        exps.copy_(torch.mm(x, head.T, out_dtype=accumulate))
    else:
        matmul(x.to(accumulate), head.to(accumulate).T, out=exps)
    # Every exponential hangs on this one logit, and exactness costs nothing for one column.
    target = (x.double() * head[labels].double()).sum(1)
    exps.scatter_(1, labels[:, None], -torch.inf)  # by its column, not by comparing values: ties must survive
    m = exps.amax(1)
    m.masked_fill_(m == -torch.inf, 0.0)  # no other column to speak of
    total = exps.sub_(m[:, None]).exp_().sum(1)
    log_odds = (total.log() + (m - target)).to(accumulate)
    logps = F.logsigmoid(-log_odds)  # = -softplus(t), finite for any t
    scale = (log_odds.sigmoid() / total).masked_fill(total == 0, 0.0)
    offset, target = ((m - target) * LOG2E).to(accumulate), target.to(accumulate)
    return RowStats(logps, log_odds, scale, target, offset)


def _rows(
    product: str, x: Tensor, head: Tensor, labels: Tensor, offsets: Tensor, exps: Tensor | None, *, with_exps: bool,
) -> RowStats:  # fmt: skip
    """One pass over the logits of some rows."""
    if product == "fused":
        return exp_logits(x, head, labels, offsets, exps, with_exps=with_exps)
    if product == "library":
        logits = _product32(x, head.T)
        return exp_rows(logits, labels, target_logits(x, head, labels), offsets, exps)
    assert exps is not None
    return _torch_rows(x, head, labels, exps)


def _product32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, accumulated and returned in fp32 (fp64 for fp64). A GPU multiplies in the narrower dtype of the two."""
    if a.is_cuda and (narrow := min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)).itemsize == 2:
        return torch.mm(a.to(narrow), b.to(narrow), out_dtype=torch.float32)
    accumulate = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return matmul(a.to(accumulate), b.to(accumulate))


@torch.library.custom_op("vapr::linear_logps", mutates_args=())
def _linear_logps(
    hidden: Tensor, head: Tensor, labels: Tensor, reference_logps: Tensor | None,
    product: str, gradient: str, with_dx: bool, chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return logps (L,), the rows of TABLE (4, L), dlogp/dx (L, D), and the exponentials (L, V).

    What the plan does not need has no rows.
    """
    hidden, head, labels = launch.contiguous(hidden), launch.contiguous(head), labels.contiguous()
    L, V = len(hidden), len(head)
    accumulate = torch.promote_types(hidden.dtype, torch.float32)
    new = lambda rows, columns: exp_buffer(rows, columns, _exp_dtype(hidden, product), hidden.device)
    offsets = torch.full((L,), OFFSET, device=hidden.device)
    if reference_logps is not None:
        offsets = (-reference_logps.float() * LOG2E).round().clamp(min=OFFSET)
    keep = new(L if gradient == "keep" else 0, V)
    stored = gradient in ("dx", "keep") or product == "torch"
    chunk = new(min(chunk_rows, L), V) if stored and gradient != "keep" else keep
    num_dx = L if with_dx and gradient in ("dx", "keep") else 0
    dx = torch.empty(num_dx, hidden.shape[1], dtype=accumulate, device=hidden.device)
    parts = []
    for start in range(0, max(L, 1), chunk_rows):
        rows = slice(start, min(start + chunk_rows, L))
        exps = keep[rows] if gradient == "keep" else chunk[: rows.stop - rows.start] if stored else None
        x, y = hidden[rows], labels[rows]
        part = _rows(product, x, head, y, offsets[rows], exps, with_exps=gradient != "none")
        if len(dx):
            assert exps is not None
            hidden_gradient(
                _product32(exps, head),
                head,
                y,
                part.log_odds.sigmoid(),
                part.scale,
                dx[rows],
                kernels=product != "torch",
            )
        parts.append(part)
    table = torch.zeros(len(TABLE), L, dtype=accumulate, device=hidden.device)
    for row, name in enumerate(TABLE):
        torch.cat([getattr(part, name).to(accumulate) for part in parts], out=table[row])
    return torch.cat([part.logps for part in parts]), table, dx, keep


@_linear_logps.register_fake
def _(hidden, head, labels, reference_logps, product, gradient, with_dx, chunk_rows):
    L, D = hidden.shape
    accumulate = torch.promote_types(hidden.dtype, torch.float32)
    dx = hidden.new_empty(L if with_dx and gradient in ("dx", "keep") else 0, D, dtype=accumulate)
    exps = exp_buffer(L if gradient == "keep" else 0, len(head), _exp_dtype(hidden, product), hidden.device)
    return hidden.new_empty(L, dtype=accumulate), hidden.new_empty(len(TABLE), L, dtype=accumulate), dx, exps


def _again(product: str, x: Tensor, w: Tensor, labels: Tensor, target: Tensor, offset: Tensor) -> Tensor:
    """Compute the same exponentials as before, for a slice of the head."""
    if product == "fused":
        return exponentials(x, w, labels, target.double(), offset)
    exps = _product32(x, w.T).sub_(target[:, None]).sub_(offset[:, None] / LOG2E).exp_()
    column = labels.clamp(0, len(w) - 1)[:, None]  # the target may lie in another slice
    return exps.scatter_(1, column, exps.gather(1, column).masked_fill(column == labels[:, None], 0.0))


@torch.library.custom_op("vapr::linear_logps_backward", mutates_args=())
def _linear_logps_backward(
    dout: Tensor, hidden: Tensor, head: Tensor, labels: Tensor, table: Tensor, exps: Tensor,
    product: str, with_dx: bool, with_dhead: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx (L, D) and dhead (V, D), in the dtypes of hidden and head; what is not wanted has no rows.

    From the exponentials (L, V) where they were kept, else from logits computed again.
    """
    hidden, head, labels = launch.contiguous(hidden), launch.contiguous(head), labels.contiguous()
    log_odds, scale, target, offset = table
    L, V = len(hidden), len(head)
    kept = len(exps) == L
    up = dout * log_odds.sigmoid()
    down = dout * scale
    dtype = _exp_dtype(hidden, product)
    x = (-down[:, None] * hidden.to(table.dtype)).to(dtype)
    expected = table.new_zeros(L if with_dx else 0, hidden.shape[1])
    dhead = torch.empty(V if with_dhead else 0, head.shape[1], dtype=dtype, device=head.device)
    # A slice of the vocabulary sees all rows, so that dhead is one sum and only the small dx is added up.
    width = V if kept else max(256, _budget(head.device) // (max(L, 1) * dtype.itemsize) // 256 * 256)
    for start in range(0, V, width):
        columns = slice(start, start + width)
        part = exps if kept else _again(product, hidden, head[columns], labels - start, target, offset)
        if with_dx:
            expected += _product32(part, head[columns])
        if with_dhead:
            torch.mm(part.T.to(dtype), x, out=dhead[columns])
    if with_dhead:
        add_target_rows(dhead, hidden, labels, up, kernels=product != "torch")
    dx = torch.empty(len(expected), hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
    if with_dx:
        hidden_gradient(expected, head, labels, up, down, dx, kernels=product != "torch")
    return dx, dhead.to(head.dtype)


@_linear_logps_backward.register_fake
def _(dout, hidden, head, labels, table, exps, product, with_dx, with_dhead):
    return hidden.new_empty(len(hidden) if with_dx else 0, hidden.shape[1]), head.new_empty(
        len(head) if with_dhead else 0, head.shape[1]
    )


def _setup_context(ctx, inputs, output) -> None:
    hidden, head, labels, _, product, gradient, *_ = inputs
    _, table, dx, exps = output
    ctx.product, ctx.gradient, ctx.dtype = product, gradient, hidden.dtype
    ctx.set_materialize_grads(False)
    if gradient == "dx":
        ctx.save_for_backward(dx)
    elif gradient != "none":
        ctx.save_for_backward(dx, hidden, head, labels, table, exps)


def _backward(ctx, dout, *others):
    """Only logps has a gradient; the other outputs are what the backward pass uses."""
    if any(other is not None for other in others):
        raise NotImplementedError("linear_logps has no second derivative")
    if dout is None or ctx.gradient == "none":
        return (None,) * 8
    finished, *rest = ctx.saved_tensors  # dlogp/dx, unless it is to be computed again
    with_dx, with_dhead = ctx.needs_input_grad[:2]
    dx = dhead = None
    if ctx.gradient == "recompute" or with_dhead:
        with_dx_again = with_dx and ctx.gradient == "recompute"
        dx, dhead = _linear_logps_backward(dout, *rest, ctx.product, with_dx_again, with_dhead)
    if with_dx and ctx.gradient != "recompute":
        dx = (finished * dout[:, None]).to(ctx.dtype)
    return dx if with_dx else None, dhead if with_dhead else None, *(None,) * 6


_linear_logps.register_autograd(_backward, setup_context=_setup_context)


def linear_logps(
    hidden: Tensor, head: Tensor, labels: Tensor, *, reference_logps: Tensor | None = None, mode: Mode = "auto",
    chunk_rows: int | None = None,
) -> Tensor:  # fmt: skip
    """Compute the log-prob of each label under ``softmax(hidden @ head.T)``.

    Args:
        hidden: hidden rows that predict, shape (L, D); fp32, bf16, fp16 or fp64.
        head: LM head, shape (V, D), same dtype and device as ``hidden``.
        labels: token ids to predict, int64, shape (L,), values in [0, V).
        reference_logps: log-probs of the same labels under the reference, shape (L,), if known. They tell where to
            expect the logits, so that unlikely labels need no second look; they change results by rounding only.
        mode: how it is computed; see the module's table.

            * ``auto``: on a GPU ``one-pass`` in bf16, ``recompute`` if the exponentials of a trained head do not
              fit, ``chunked`` in fp32; on a CPU ``torch``.
            * ``one-pass``: one fused pass over the logits; dlogp/dx in the forward pass, exponentials kept for a
              trained head.
            * ``recompute``: stores nothing of size V; the backward pass computes the logits again.
            * ``chunked``: as ``one-pass``, with the library's matrix product and a chunk of logits in fp32.
            * ``torch``: PyTorch's operations only.

            On a CPU every mode uses PyTorch's operations.
        chunk_rows: rows whose logits exist at a time; by default at most 1,024, and what memory allows.

    Returns:
        Log-probs, shape (L,), fp32 (fp64 for fp64 inputs), differentiable in ``hidden`` and ``head``.

    Raises:
        ValueError: naming the argument with a wrong shape, dtype, device or value.
    """
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError(f"hidden (L, D) and head (V, D) do not fit: {tuple(hidden.shape)} and {tuple(head.shape)}")
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 of shape ({len(hidden)},), got {labels.dtype} {tuple(labels.shape)}")
    if hidden.dtype != head.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden and head must share one float dtype, got {hidden.dtype} and {head.dtype}")
    if not hidden.device == head.device == labels.device:
        raise ValueError(f"hidden, head and labels lie on {hidden.device}, {head.device} and {labels.device}")
    if reference_logps is not None and (
        reference_logps.shape != labels.shape or reference_logps.device != hidden.device
    ):
        raise ValueError(
            f"reference_logps must have shape ({len(hidden)},) on {hidden.device}, "
            f"got {tuple(reference_logps.shape)} on {reference_logps.device}"
        )
    if len(head) < 2:
        raise ValueError(f"head must have at least 2 rows, got {len(head)}")
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    plan = make_plan(hidden, head, mode, chunk_rows, grad=torch.is_grad_enabled())
    reference_logps = None if reference_logps is None else reference_logps.detach()
    if plan.gradient == "none":
        hidden, head = hidden.detach(), head.detach()
    logps, *_ = _linear_logps(
        hidden, head, labels, reference_logps, plan.product, plan.gradient, hidden.requires_grad, plan.chunk_rows
    )
    return logps
