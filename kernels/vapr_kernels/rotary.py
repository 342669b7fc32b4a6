"""rotary: rotate the halves of each head by its token's angles; 1 read, 1 write.

With x = (x1, x2) and the angle's cos c and sin s for each of the E/2 planes:

    out = (x1 c - x2 s, x2 c + x1 s)

The backward pass is the rotation by the opposite angle. The tables repeat their first half, so only that is read.

T = packed tokens, H = heads, E = head dim.
"""

import torch
from torch import Tensor

from vapr_kernels import launch
from vapr_kernels.arguments import expect_float, expect_like
from vapr_kernels.launch import rounded, tl, triton

TILE = 1024
"""Elements of a program's tile of half heads: 8 per thread, one 16-byte access of bf16."""

NUM_WARPS = 4


@triton.jit
def rotate(x1, x2, cos, sin):
    """Rotate both halves of heads."""
    return x1 * cos - x2 * sin, x2 * cos + x1 * sin


@launch.Kernel
def _rotary_kernel(
    x_ptr,  # (T, H, E), strides x_stride_t, x_stride_h, 1
    cos_ptr,  # (T, E), rows cos_stride apart
    sin_ptr,  # (T, E), rows sin_stride apart
    out_ptr,  # (T, H, E)
    num_heads_in_all,  # T H
    x_stride_t,
    x_stride_h,
    cos_stride,
    sin_stride,
    H: tl.constexpr,
    HALF: tl.constexpr,  # E / 2
    INVERSE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # A row is one head of one token. Heads of a token are neighbours, so its table rows come from the cache.
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_E)[None, :]
    inside = (rows < num_heads_in_all)[:, None] & (cols < HALF)
    token = (rows // H).to(tl.int64)[:, None]
    head = (rows % H).to(tl.int64)[:, None]
    x_at = x_ptr + token * x_stride_t + head * x_stride_h + cols
    x1 = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(x_at + HALF, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + token * cos_stride + cols, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * sin_stride + cols, mask=inside, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    out1, out2 = rotate(x1, x2, cos, sin)
    out_at = out_ptr + rows.to(tl.int64)[:, None] * (2 * HALF) + cols
    tl.store(out_at, rounded(out1, out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_at + HALF, rounded(out2, out_ptr.dtype.element_ty), mask=inside)


def blocks(head_dim: int) -> dict[str, int]:
    """Return block sizes: whole half heads, as many as fill a tile."""
    block_e = triton.next_power_of_2(head_dim // 2)
    return {"HALF": head_dim // 2, "BLOCK_R": max(1, TILE // block_e), "BLOCK_E": block_e, "num_warps": NUM_WARPS}


def rotary_fwd(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """Launch the kernel; return ``x`` (T, H, E) rotated by the tables (T, E), or rotated back."""
    x, cos, sin = (launch.unit_stride(a) for a in (x, cos, sin))
    num_tokens, num_heads, head_dim = x.shape
    out = x.new_empty(x.shape)
    sizes = blocks(head_dim)
    grid = (triton.cdiv(num_tokens * num_heads, sizes["BLOCK_R"]),)
    strides = (*x.stride()[:2], cos.stride(0), sin.stride(0))
    _rotary_kernel[grid](x, cos, sin, out, num_tokens * num_heads, *strides, H=num_heads, INVERSE=inverse, **sizes)
    return out


def rotary_bwd(dout: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Launch the kernel; return the gradient of x, shape (T, H, E)."""
    return rotary_fwd(dout, cos, sin, inverse=True)


def rotary_in_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate by PyTorch's operations, contiguous: as the naive version, but no half is negated or moved."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = cos[:, None].to(wide.dtype), sin[:, None].to(wide.dtype)
    half = x.shape[-1] // 2
    out = wide.new_empty(wide.shape)
    torch.mul(wide, cos, out=out)
    out[..., :half].addcmul_(wide[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(wide[..., :half], sin[..., half:])
    return out.to(x.dtype)


@torch.library.custom_op("vapr::rotary", mutates_args=())
def _rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rotary_fwd(x, cos, sin) if launch.runs_triton(x) else rotary_in_halves(x, cos, sin)


@torch.library.custom_op("vapr::rotary_bwd", mutates_args=())
def _rotary_bwd(dout: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rotary_bwd(dout, cos, sin) if launch.runs_triton(dout) else rotary_in_halves(dout, cos, -sin)


@_rotary.register_fake
@_rotary_bwd.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx, dout: Tensor) -> tuple[Tensor, None, None]:
    return _rotary_bwd(dout, *ctx.saved_tensors), None, None


_rotary.register_autograd(_backward, setup_context=_setup_context)


def check_tables(name: str, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Check that ``cos`` and ``sin`` are tables, shape (T, E), for the heads ``x`` (T, H, E), the argument ``name``.

    Raises:
        ValueError: naming the argument.
    """
    num_tokens, num_heads, head_dim = x.shape
    if num_heads == 0 or head_dim == 0 or head_dim % 2:
        raise ValueError(f"{name} must have heads of an even size, got {tuple(x.shape)}")
    for table_name, table in (("cos", cos), ("sin", sin)):
        expect_like(table_name, table, (num_tokens, head_dim), x, torch.float32)
        if table.requires_grad:
            raise ValueError(f"{table_name} must not require a gradient; it is a constant")


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding: ``x * cos + rotate_half(x) * sin``, in fp32 and rounded once.

    Args:
        x: heads, shape (T, H, E), any float dtype, E even; only the last dimension must be contiguous to avoid a copy.
        cos, sin: tables of the device of ``x`` and of its dtype or fp32, shape (T, E), constants. Their second half
            must repeat the first, as transformers' rotary embeddings do; M-RoPE's sections are merged already.

    Returns:
        Shape (T, H, E), dtype of ``x``, contiguous, differentiable in ``x``.

    Raises:
        ValueError: naming the argument with a wrong shape, dtype or device.
    """
    expect_float("x", x, "(T, H, E)")
    check_tables("x", x, cos, sin)
    return _rotary(x, cos, sin)
