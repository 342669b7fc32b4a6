"""rms_norm and add_rms_norm: y = x / rms(x) * weight, with the addition of the residual in the same pass.

    total = x + residual                   (rounded to the dtype of x: later layers see this value)
    rstd  = 1 / sqrt(mean(total^2) + eps)
    n     = total rstd
    y     = n weight

With g = dy weight, the gradient that x and residual share is

    dx      = dtotal + rstd (g - n mean(g n))
    dweight = sum over tokens of dy n

Forward: 2 reads, 2 writes (1 and 1 without a residual). Backward: 3 reads, 1 write (2 and 1 without dtotal). The
gradient of a trained weight costs no further pass: each of a fixed number of programs sums its own rows in order, and
the partial sums are added in order.

T = packed tokens, D = hidden.
"""

import torch
from torch import Tensor

from vapr_kernels import launch
from vapr_kernels.arguments import expect_float, expect_like
from vapr_kernels.launch import rounded, tl, triton
from vapr_kernels.matmul import new_rows

MAX_WIDTH = 8192
"""Largest D: a program holds whole rows in registers, and twice as wide ones no longer fit."""

MAX_REGISTERS = 128
WARPS_PER_SM = 65536 // (32 * MAX_REGISTERS)
"""Programs that sum dweight are as many as fit at a time, so that their partial sums are few. Left alone, ptxas may
spill to make room for one more, which is never launched."""


@launch.Kernel
def _rms_norm_fwd_kernel(
    x_ptr,  # (T, D), rows x_stride apart
    residual_ptr,  # (T, D) or None
    weight_ptr,  # (D,)
    y_ptr,  # (T, D)
    total_ptr,  # (T, D), None without a residual
    rstd_ptr,  # (T,) fp32
    T,
    x_stride,
    eps,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.arange(0, BLOCK_D)
    at = rows.to(tl.int64)[:, None] * D + cols[None, :]
    inside = (rows < T)[:, None] & (cols < D)[None, :]
    x_at = rows.to(tl.int64)[:, None] * x_stride + cols[None, :]
    total = tl.load(x_ptr + x_at, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        total += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        stored = rounded(total, total_ptr.dtype.element_ty)
        tl.store(total_ptr + at, stored, mask=inside)
        total = stored.to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(total * total, 1) / D + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < T)
    y = total * rstd[:, None] * weight[None, :]
    tl.store(y_ptr + at, rounded(y, y_ptr.dtype.element_ty), mask=inside)


@launch.Kernel
def _rms_norm_bwd_kernel(
    dy_ptr,  # (T, D)
    dtotal_ptr,  # (T, D) or None
    total_ptr,  # (T, D)
    weight_ptr,  # (D,)
    rstd_ptr,  # (T,) fp32
    dx_ptr,  # (T, D)
    partial_ptr,  # (programs, D) fp32, None with a frozen weight
    T,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_D)
    dweight = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)  # rows are added up once, after the loop
    for tile in range(tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.num_programs(0)):
        rows = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        at = rows.to(tl.int64)[:, None] * D + cols[None, :]
        inside = (rows < T)[:, None] & (cols < D)[None, :]
        # All loads come before the reduction, which no load can be moved across. The weight is in the cache; kept over
        # the loop, it would take registers from other programs.
        weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        total = tl.load(total_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < T, other=0.0)[:, None]
        if dtotal_ptr is not None:
            dtotal = tl.load(dtotal_ptr + at, mask=inside, other=0.0).to(tl.float32)
        n = total * rstd
        g = dy * weight[None, :]
        dx = rstd * (g - n * (tl.sum(g * n, 1) / D)[:, None])
        if dtotal_ptr is not None:
            dx += dtotal
        tl.store(dx_ptr + at, rounded(dx, dx_ptr.dtype.element_ty), mask=inside)
        if partial_ptr is not None:
            dweight += dy * n
    if partial_ptr is not None:
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * D + cols, tl.sum(dweight, 0), mask=cols < D)


def _blocks(width: int) -> dict[str, int]:
    """Return block sizes: whole rows, and several of them where they are short; 16 elements per thread."""
    block_d = triton.next_power_of_2(width)
    block_t = max(1, 2048 // block_d)
    return {"D": width, "BLOCK_T": block_t, "BLOCK_D": block_d, "num_warps": block_t * block_d // 512}


def rms_norm_fwd(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernel; return y (T, D), total (T, D; ``x`` itself without a residual) and rstd (T,) fp32."""
    x = launch.contiguous(x) if residual is None else launch.unit_stride(x)
    weight = launch.contiguous(weight)
    num_rows, width = x.shape
    y, rstd = x.new_empty(x.shape), x.new_empty(num_rows, dtype=torch.float32)
    total = None
    if residual is not None:
        residual, total = launch.contiguous(residual), x.new_empty(x.shape)
    blocks = _blocks(width)
    grid = (triton.cdiv(num_rows, blocks["BLOCK_T"]),)
    _rms_norm_fwd_kernel[grid](x, residual, weight, y, total, rstd, num_rows, x.stride(0), eps, **blocks)
    return y, x if total is None else total, rstd


def rms_norm_bwd(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor, *, with_dweight: bool
) -> tuple[Tensor, Tensor | None]:
    """Launch the backward kernel; return the gradient (T, D) that x and residual share, and dweight (D,) or None."""
    dy, total, weight = (launch.contiguous(x) for x in (dy, total, weight))
    dtotal = None if dtotal is None else launch.contiguous(dtotal)
    num_rows, width = total.shape
    blocks = _blocks(width)
    num_programs = triton.cdiv(num_rows, blocks["BLOCK_T"])
    dx, partial = total.new_empty(total.shape), None
    if with_dweight:
        blocks["maxnreg"] = MAX_REGISTERS
        num_programs = min(num_programs, WARPS_PER_SM // blocks["num_warps"] * launch.num_sms(total.device))
        partial = total.new_empty((num_programs, width), dtype=torch.float32)
    _rms_norm_bwd_kernel[(num_programs,)](dy, dtotal, total, weight, rstd, dx, partial, num_rows, **blocks)
    return dx, None if partial is None else partial.sum(0).to(weight.dtype)


# On a CPU, in as few passes as PyTorch's operations allow.


def _torch_fwd(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norms = torch.linalg.vector_norm(wide, dim=-1)
    rstd = norms.square_().div_(x.shape[1]).add_(eps).rsqrt_()
    return _torch_normed(x, rstd, weight), rstd


def _torch_normed(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    normed = torch.mul(x.to(rstd.dtype), rstd[:, None], out=new_rows(rstd, *x.shape))
    return normed.mul_(weight).to(x.dtype)


def _torch_bwd(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor, *, with_dweight: bool
) -> tuple[Tensor, Tensor | None]:
    dy, wide = dy.to(rstd.dtype), total.to(rstd.dtype)
    dweight = (dy * wide).mul_(rstd[:, None]).sum(0).to(weight.dtype) if with_dweight else None
    g = dy * weight
    shared = torch.linalg.vecdot(g, wide).mul_(rstd**3).div_(total.shape[1])
    dx = g.mul_(rstd[:, None]).addcmul_(wide, shared[:, None], value=-1)
    if dtotal is not None:
        dx += dtotal
    return dx.to(total.dtype), dweight


@torch.library.custom_op("vapr::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if not launch.runs_triton(x):
        return _torch_fwd(x, weight, eps)
    y, _, rstd = rms_norm_fwd(x, None, weight, eps)
    return y, rstd


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return new_rows(x, *x.shape), x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("vapr::add_rms_norm", mutates_args=())
def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    if launch.runs_triton(x):
        return rms_norm_fwd(x, residual, weight, eps)
    total = x + residual
    y, rstd = _torch_fwd(total, weight, eps)
    return y, total, rstd


@_add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rstd = x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
    return new_rows(x, *x.shape), x.new_empty(x.shape), rstd


@torch.library.custom_op("vapr::rms_norm_bwd", mutates_args=())
def _rms_norm_bwd(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor, with_dweight: bool
) -> tuple[Tensor, Tensor]:
    bwd = rms_norm_bwd if launch.runs_triton(total) else _torch_bwd
    dx, dweight = bwd(dy, dtotal, total, weight, rstd, with_dweight=with_dweight)
    return dx, weight.new_empty(0) if dweight is None else dweight


@_rms_norm_bwd.register_fake
def _(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor, with_dweight: bool
) -> tuple[Tensor, Tensor]:
    return total.new_empty(total.shape), weight.new_empty(weight.shape if with_dweight else 0)


@torch.library.custom_op("vapr::rms_normed", mutates_args=())
def _normed(total: Tensor, rstd: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (
        rms_norm_fwd(total, None, weight, eps)[0] if launch.runs_triton(total) else _torch_normed(total, rstd, weight)
    )


@_normed.register_fake
def _(total: Tensor, rstd: Tensor, weight: Tensor, eps: float) -> Tensor:
    return new_rows(total, *total.shape)


# For functions that are differentiated by hand.


def norm_fwd(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normalised rows (T, D), the sum with the residual (``x`` without one), and its rstd (T,)."""
    if residual is not None:
        return _add_rms_norm(x, residual, weight, eps)
    y, rstd = _rms_norm(x, weight, eps)
    return y, x, rstd


def normed_again(total: Tensor, rstd: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the normalised rows (T, D) once more, the same to the bit."""
    return _normed(total, rstd, weight, eps)


def norm_bwd(
    dy: Tensor | None, dtotal: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of x and residual, which are one tensor (T, D), and of the weight, (D,).

    Each is None where ``needs`` says so; ``dy`` is None where the norm's output has no gradient.
    """
    needs_x, needs_residual, needs_weight = needs
    dx, dweight = dtotal, None
    if dy is not None:
        dx, dweight = _rms_norm_bwd(dy, dtotal, total, weight, rstd, needs_weight)
    return dx if needs_x else None, dx if needs_residual else None, dweight if needs_weight else None


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx, dy: Tensor, drstd: Tensor) -> tuple[Tensor, Tensor | None, None]:
    with_dweight = ctx.needs_input_grad[1]
    dx, dweight = _rms_norm_bwd(dy, None, *ctx.saved_tensors, with_dweight)
    return dx, dweight if with_dweight else None, None


def _setup_context_add(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # reading zeros for an unused output would cost a pass
    _, total, rstd = output
    ctx.save_for_backward(total, inputs[2], rstd)


def _backward_add(ctx, dy: Tensor | None, dtotal: Tensor | None, drstd: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return dtotal, dtotal, None, None
    with_dweight = ctx.needs_input_grad[2]
    dx, dweight = _rms_norm_bwd(dy, dtotal, *ctx.saved_tensors, with_dweight)
    return dx, dx, dweight if with_dweight else None, None


_rms_norm.register_autograd(_backward, setup_context=_setup_context)
_add_rms_norm.register_autograd(_backward_add, setup_context=_setup_context_add)


def _check(x: Tensor, weight: Tensor) -> None:
    expect_float("x", x, "(T, D)")
    expect_like("weight", weight, x.shape[1:], x, torch.float32)
    if not 1 <= x.shape[1] <= MAX_WIDTH:
        raise ValueError(f"x must have between 1 and {MAX_WIDTH} columns, got {x.shape[1]}")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x`` divided by its root mean square over the last dimension, times ``weight``; in fp32 and rounded once.

    Args:
        x: shape (T, D), any float dtype, D up to 8192.
        weight: shape (D,), on the device of ``x``, in its dtype or fp32.
        eps: added to the mean square.

    Returns:
        Shape (T, D), dtype of ``x``, differentiable in ``x`` and ``weight``.

    Raises:
        ValueError: naming the argument with a wrong shape, dtype or device.
    """
    _check(x, weight)
    return _rms_norm(x, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``total = x + residual`` and ``rms_norm(total, weight, eps)``, in one pass over the memory.

    Args:
        x: shape (T, D), any float dtype, D up to 8192.
        residual: shape, dtype and device of ``x``.
        weight: shape (D,), on the device of ``x``, in its dtype or fp32.
        eps: added to the mean square.

    Returns:
        The normalised rows and ``total``, both of the shape and dtype of ``x``, differentiable in all three tensors.

    Raises:
        ValueError: naming the argument with a wrong shape, dtype or device.
    """
    _check(x, weight)
    expect_like("residual", residual, x.shape, x)
    y, total, _ = _add_rms_norm(x, residual, weight, eps)
    return y, total
