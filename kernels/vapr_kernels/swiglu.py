"""swiglu: silu(gate) * up, in one pass forward (2 reads, 1 write) and one backward (3 reads, 2 writes).

With s = sigmoid(gate):

    out   = gate s up
    dgate = dout up s (1 + gate (1 - s))
    dup   = dout gate s

Only ``gate`` and ``up`` are kept for the backward pass; s is computed again. Everything is fp32 between one load and
one rounding.

T = packed tokens, I = intermediate size.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from vapr_kernels import launch
from vapr_kernels.arguments import expect_float, expect_like
from vapr_kernels.launch import rounded, tl, triton
from vapr_kernels.matmul import new_rows

# 8 neighbouring elements per thread: one 16-byte access of bf16. Small programs, because nothing is shared between
# columns and many of them hide the latency of the memory better than a whole row in one.
BLOCK_I = 1024
NUM_WARPS = 4


@triton.jit
def _place(I, BLOCK_I: tl.constexpr):  # noqa: E741
    """Return row and columns of this program."""
    num_blocks = tl.cdiv(I, BLOCK_I)
    row = (tl.program_id(0) // num_blocks).to(tl.int64)
    return row, (tl.program_id(0) % num_blocks) * BLOCK_I + tl.arange(0, BLOCK_I)


@launch.Kernel
def _swiglu_fwd_kernel(
    gate_ptr,  # (T, I), rows gate_stride apart
    up_ptr,  # (T, I), rows up_stride apart
    out_ptr,  # (T, I)
    I,  # noqa: E741
    gate_stride,
    up_stride,
    BLOCK_I: tl.constexpr,
):
    row, cols = _place(I, BLOCK_I)
    inside = cols < I
    gate = tl.load(gate_ptr + row * gate_stride + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + cols, mask=inside, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * I + cols, rounded(out, out_ptr.dtype.element_ty), mask=inside)


@launch.Kernel
def _swiglu_bwd_kernel(
    dout_ptr,  # (T, I), rows dout_stride apart
    gate_ptr,  # (T, I), rows gate_stride apart
    up_ptr,  # (T, I), rows up_stride apart
    dgate_ptr,  # (T, I), rows dstride apart
    dup_ptr,  # (T, I), rows dstride apart
    out_ptr,  # (T, I) or None
    I,  # noqa: E741
    dout_stride,
    gate_stride,
    up_stride,
    dstride,
    BLOCK_I: tl.constexpr,
):
    row, cols = _place(I, BLOCK_I)
    inside = cols < I
    dout = tl.load(dout_ptr + row * dout_stride + cols, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + cols, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    dgate = dout * up * (s * (1 + gate * (1 - s)))
    dup = dout * (gate * s)
    tl.store(dgate_ptr + row * dstride + cols, rounded(dgate, dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + row * dstride + cols, rounded(dup, dup_ptr.dtype.element_ty), mask=inside)
    if out_ptr is not None:
        tl.store(out_ptr + row * I + cols, rounded(gate * s * up, out_ptr.dtype.element_ty), mask=inside)


def swiglu_fwd(gate: Tensor, up: Tensor) -> Tensor:
    """Launch the forward kernel; return ``silu(gate) * up``, shape (T, I)."""
    gate, up = launch.unit_stride(gate), launch.unit_stride(up)
    num_rows, width = gate.shape
    out = gate.new_empty(gate.shape)
    grid = (num_rows * triton.cdiv(width, BLOCK_I),)
    _swiglu_fwd_kernel[grid](gate, up, out, width, gate.stride(0), up.stride(0), BLOCK_I=BLOCK_I, num_warps=NUM_WARPS)
    return out


def swiglu_bwd(dout: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, out: Tensor | None = None) -> None:
    """Launch the backward kernel: write dgate and dup, (T, I) and strided alike, and the output again, (T, I)."""
    dout, gate, up = (launch.unit_stride(x) for x in (dout, gate, up))
    num_rows, width = gate.shape
    grid = (num_rows * triton.cdiv(width, BLOCK_I),)
    strides = (dout.stride(0), gate.stride(0), up.stride(0), dgate.stride(0))
    _swiglu_bwd_kernel[grid](dout, gate, up, dgate, dup, out, width, *strides, BLOCK_I=BLOCK_I, num_warps=NUM_WARPS)


def _torch_bwd(dout: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> None:
    """Do what the kernel does, on a CPU in as few passes as PyTorch's operations allow."""
    accumulate = torch.promote_types(gate.dtype, torch.float32)
    dout, gate, up = (x.to(accumulate) for x in (dout, gate, up))
    act = F.silu(gate)
    if gate.dtype == dgate.dtype:
        torch.mul(dout, act, out=dup)
        torch.ops.aten.silu_backward.grad_input(dout * up, gate, grad_input=dgate)
    else:
        dup.copy_(dout * act)
        dgate.copy_(torch.ops.aten.silu_backward(dout * up, gate))


@torch.library.custom_op("vapr::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    if launch.runs_triton(gate):
        return swiglu_fwd(gate, up)
    wide = gate.to(torch.promote_types(gate.dtype, torch.float32))
    return torch.ops.aten.silu.out(wide, out=new_rows(wide, *gate.shape)).mul_(up).to(gate.dtype)


@_swiglu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return new_rows(gate, *gate.shape)


@torch.library.custom_op("vapr::swiglu_bwd", mutates_args=())
def _swiglu_bwd(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    _bwd(gate)(dout, gate, up, dgate, dup)
    return dgate, dup


@_swiglu_bwd.register_fake
def _(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


@torch.library.custom_op("vapr::swiglu_bwd_in_place", mutates_args=("dout", "gate", "up"))
def _swiglu_bwd_in_place(dout: Tensor, gate: Tensor, up: Tensor) -> None:
    if launch.runs_triton(gate):
        swiglu_bwd(dout, gate, up, gate, up, dout)
        return
    accumulate = torch.promote_types(gate.dtype, torch.float32)
    wide_gate, wide_up, wide_dout = (x.to(accumulate) for x in (gate, up, dout))
    act = F.silu(wide_gate)
    dact = wide_dout * wide_up
    if gate.dtype == accumulate:
        torch.ops.aten.silu_backward.grad_input(dact, gate, grad_input=gate)
        dup = torch.mul(dout, act, out=dact)
        torch.mul(act, up, out=dout)
    else:
        gate.copy_(torch.ops.aten.silu_backward(dact, wide_gate))
        dup = torch.mul(wide_dout, act, out=dact)
        dout.copy_(act.mul_(wide_up))
    up.copy_(dup)


@_swiglu_bwd_in_place.register_fake
def _(dout: Tensor, gate: Tensor, up: Tensor) -> None:
    return None


def _bwd(gate: Tensor) -> Callable[..., None]:
    return swiglu_bwd if launch.runs_triton(gate) else _torch_bwd


# For functions that are differentiated by hand.


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """Return ``silu(gate) * up``, (T, I)."""
    return _swiglu(gate, up)


def gated_bwd(dout: Tensor, gate: Tensor, up: Tensor) -> None:
    """Write the gradients of gate and up in their places, and the output again in that of ``dout``, (T, I) each.

    Autograd sees the writes, so that a second backward pass over the same graph is an error.
    """
    _swiglu_bwd_in_place(dout, gate, up)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dout: Tensor) -> tuple[Tensor, Tensor]:
    return _swiglu_bwd(dout, *ctx.saved_tensors)


_swiglu.register_autograd(_backward, setup_context=_setup_context)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The gated activation ``silu(gate) * up``, in fp32 and rounded once.

    Args:
        gate: shape (T, I), any float dtype; rows may lie apart, as in one half of a fused projection.
        up: shape, dtype and device of ``gate``.

    Returns:
        Shape (T, I), dtype of ``gate``, contiguous, differentiable in both.

    Raises:
        ValueError: naming the argument with a wrong shape, dtype or device.
    """
    expect_float("gate", gate, "(T, I)")
    expect_like("up", up, gate.shape, gate)
    return _swiglu(gate, up)
