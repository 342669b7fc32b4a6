"""gather_keys_values: rotate keys and copy them and their values to where attention reads them, in one launch.

A row of k is read, rotated and written to each of its places; the rotated keys of a packed token are never stored on
their own. The backward pass sums the gradients of a token's copies in fp32, in the order in which they appear, and
rotates the sum of the keys' back once:

    dk[t] = rotation by minus the angle of (sum over copies c of t of dk_out[c])
    dv[t] = sum over copies c of t of dv_out[c]

T = packed tokens, K = gathered rows, G = key heads, E = head dim.
"""

import torch
from torch import Tensor

from vapr_kernels import launch
from vapr_kernels.arguments import expect_float, expect_like
from vapr_kernels.gather_rows import RowIndex, sum_copies
from vapr_kernels.launch import rounded, tl, triton
from vapr_kernels.rotary import blocks, check_tables, rotary_in_halves, rotate


@launch.Kernel
def _gather_keys_values_fwd_kernel(
    k_ptr,  # (T, G, E), strides k_stride_t, k_stride_g, 1
    v_ptr,  # (T, G, E), strides v_stride_t, v_stride_g, 1
    cos_ptr,  # (T, E), rows cos_stride apart
    sin_ptr,  # (T, E), rows sin_stride apart
    rows_ptr,  # (K,) int64
    k_out_ptr,  # (K, G, E)
    v_out_ptr,  # (K, G, E)
    num_heads_in_all,  # K G
    k_stride_t,
    k_stride_g,
    v_stride_t,
    v_stride_g,
    cos_stride,
    sin_stride,
    G: tl.constexpr,
    HALF: tl.constexpr,  # E / 2
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    heads = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_E)[None, :]
    inside = (heads < num_heads_in_all)[:, None] & (cols < HALF)
    token = tl.load(rows_ptr + heads // G, mask=heads < num_heads_in_all, other=0)[:, None]
    head = (heads % G).to(tl.int64)[:, None]
    k_at = k_ptr + token * k_stride_t + head * k_stride_g + cols
    v_at = v_ptr + token * v_stride_t + head * v_stride_g + cols
    k1 = tl.load(k_at, mask=inside, other=0.0).to(tl.float32)
    k2 = tl.load(k_at + HALF, mask=inside, other=0.0).to(tl.float32)
    v1 = tl.load(v_at, mask=inside, other=0.0)
    v2 = tl.load(v_at + HALF, mask=inside, other=0.0)
    cos = tl.load(cos_ptr + token * cos_stride + cols, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * sin_stride + cols, mask=inside, other=0.0).to(tl.float32)
    k1, k2 = rotate(k1, k2, cos, sin)
    out = heads.to(tl.int64)[:, None] * (2 * HALF) + cols
    tl.store(k_out_ptr + out, rounded(k1, k_out_ptr.dtype.element_ty), mask=inside)
    tl.store(k_out_ptr + out + HALF, rounded(k2, k_out_ptr.dtype.element_ty), mask=inside)
    tl.store(v_out_ptr + out, v1, mask=inside)
    tl.store(v_out_ptr + out + HALF, v2, mask=inside)


@launch.Kernel
def _gather_keys_values_bwd_kernel(
    dk_out_ptr,  # (K, G, E), strides dk_stride_t, dk_stride_g, 1
    dv_out_ptr,  # (K, G, E), strides dv_stride_t, dv_stride_g, 1
    cos_ptr,  # (T, E), rows cos_stride apart
    sin_ptr,  # (T, E), rows sin_stride apart
    order_ptr,  # (K,) int64
    starts_ptr,  # (T + 1,) int64
    dk_ptr,  # (T, G, E)
    dv_ptr,  # (T, G, E)
    num_heads_in_all,  # T G
    dk_stride_t,
    dk_stride_g,
    dv_stride_t,
    dv_stride_g,
    cos_stride,
    sin_stride,
    G: tl.constexpr,
    HALF: tl.constexpr,  # E / 2
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    heads = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_E)[None, :]
    exists = heads < num_heads_in_all
    inside = exists[:, None] & (cols < HALF)
    token = heads // G
    head = (heads % G).to(tl.int64)[:, None]
    start = tl.load(starts_ptr + token, mask=exists, other=0)
    num_copies = tl.load(starts_ptr + token + 1, mask=exists, other=0) - start
    dk1 = tl.zeros((BLOCK_R, BLOCK_E), tl.float32)
    dk2 = tl.zeros((BLOCK_R, BLOCK_E), tl.float32)
    dv1 = tl.zeros((BLOCK_R, BLOCK_E), tl.float32)
    dv2 = tl.zeros((BLOCK_R, BLOCK_E), tl.float32)
    for nth in range(tl.max(num_copies, 0)):
        has = nth < num_copies
        copy = tl.load(order_ptr + start + nth, mask=has, other=0)[:, None]
        dk_at = dk_out_ptr + copy * dk_stride_t + head * dk_stride_g + cols
        dv_at = dv_out_ptr + copy * dv_stride_t + head * dv_stride_g + cols
        adds = has[:, None] & (cols < HALF)
        dk1 += tl.load(dk_at, mask=adds, other=0.0).to(tl.float32)
        dk2 += tl.load(dk_at + HALF, mask=adds, other=0.0).to(tl.float32)
        dv1 += tl.load(dv_at, mask=adds, other=0.0).to(tl.float32)
        dv2 += tl.load(dv_at + HALF, mask=adds, other=0.0).to(tl.float32)
    row = token.to(tl.int64)[:, None]
    cos = tl.load(cos_ptr + row * cos_stride + cols, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + row * sin_stride + cols, mask=inside, other=0.0).to(tl.float32)
    dk1, dk2 = rotate(dk1, dk2, cos, -sin)
    out = heads.to(tl.int64)[:, None] * (2 * HALF) + cols
    tl.store(dk_ptr + out, rounded(dk1, dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dk_ptr + out + HALF, rounded(dk2, dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + out, rounded(dv1, dv_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + out + HALF, rounded(dv2, dv_ptr.dtype.element_ty), mask=inside)


def gather_keys_values_fwd(k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel; return rotated keys and values, (K, G, E) each."""
    k, v, cos, sin = (launch.unit_stride(x) for x in (k, v, cos, sin))
    _, num_heads, head_dim = k.shape
    k_out, v_out = (x.new_empty((len(rows), num_heads, head_dim)) for x in (k, v))
    sizes = blocks(head_dim)
    grid = (triton.cdiv(len(rows) * num_heads, sizes["BLOCK_R"]),)
    strides = (*k.stride()[:2], *v.stride()[:2], cos.stride(0), sin.stride(0))
    _gather_keys_values_fwd_kernel[grid](
        k, v, cos, sin, rows, k_out, v_out, len(rows) * num_heads, *strides, G=num_heads, **sizes
    )
    return k_out, v_out


def gather_keys_values_bwd(
    dk_out: Tensor, dv_out: Tensor, cos: Tensor, sin: Tensor, order: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel; return dk and dv, (T, G, E) each."""
    dk_out, dv_out, cos, sin = (launch.unit_stride(x) for x in (dk_out, dv_out, cos, sin))
    _, num_heads, head_dim = dk_out.shape
    num_tokens = len(starts) - 1
    dk, dv = (x.new_empty((num_tokens, num_heads, head_dim)) for x in (dk_out, dv_out))
    sizes = blocks(head_dim)
    grid = (triton.cdiv(num_tokens * num_heads, sizes["BLOCK_R"]),)
    strides = (*dk_out.stride()[:2], *dv_out.stride()[:2], cos.stride(0), sin.stride(0))
    _gather_keys_values_bwd_kernel[grid](
        dk_out, dv_out, cos, sin, order, starts, dk, dv, num_tokens * num_heads, *strides, G=num_heads, **sizes
    )
    return dk, dv


@torch.library.custom_op("vapr::gather_keys_values", mutates_args=())
def _gather_keys_values(
    k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, order: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor]:
    if launch.runs_triton(k):
        return gather_keys_values_fwd(k, v, cos, sin, rows)
    return rotary_in_halves(k, cos, sin).index_select(0, rows), v.contiguous().index_select(0, rows)


@_gather_keys_values.register_fake
def _(
    k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, order: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor]:
    shape = (rows.shape[0], *k.shape[1:])
    return k.new_empty(shape), v.new_empty(shape)


@torch.library.custom_op("vapr::gather_keys_values_bwd", mutates_args=())
def _gather_keys_values_bwd(
    dk_out: Tensor, dv_out: Tensor, cos: Tensor, sin: Tensor, order: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor]:
    if launch.runs_triton(dk_out):
        return gather_keys_values_bwd(dk_out, dv_out, cos, sin, order, starts)
    dk = rotary_in_halves(sum_copies(dk_out, order, starts), cos, -sin)
    return dk.to(dk_out.dtype), sum_copies(dv_out, order, starts).to(dv_out.dtype)


@_gather_keys_values_bwd.register_fake
def _(dk_out: Tensor, dv_out: Tensor, cos: Tensor, sin: Tensor, order: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    shape = (starts.shape[0] - 1, *dk_out.shape[1:])
    return dk_out.new_empty(shape), dv_out.new_empty(shape)


def _setup_context(ctx, inputs, output) -> None:
    _, _, cos, sin, _, order, starts = inputs
    ctx.save_for_backward(cos, sin, order, starts)


def _backward(ctx, dk_out: Tensor, dv_out: Tensor) -> tuple[Tensor | None, ...]:
    return *_gather_keys_values_bwd(dk_out, dv_out, *ctx.saved_tensors), None, None, None, None, None


_gather_keys_values.register_autograd(_backward, setup_context=_setup_context)


def gather_keys_values(k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, index: RowIndex) -> tuple[Tensor, Tensor]:
    """Rows ``index.rows`` of the rotated keys and of the values; the backward sums copies in a fixed order, in fp32.

    Args:
        k: keys, shape (T, G, E), any float dtype, E even; only the last dimension must be contiguous to avoid a copy.
        v: values, shape, dtype and device of ``k``; strides of their own.
        cos, sin: tables as for :func:`vapr_kernels.rotary`, shape (T, E).
        index: built for T rows, on the device of ``k``.

    Returns:
        Rotated keys and values, both (K, G, E), contiguous, differentiable in ``k`` and ``v``.

    Raises:
        ValueError: naming the argument with a wrong shape, dtype or device.
    """
    expect_float("k", k, "(T, G, E)")
    expect_like("v", v, k.shape, k)
    check_tables("k", k, cos, sin)
    index.check("k", k)
    return _gather_keys_values(k, v, cos, sin, index.rows, index.order, index.starts)
