"""lora_linear: a frozen linear layer and its low-rank adapter, without a pass over outputs of their own.

    out = x W^T + bias + scale (x A^T) B^T

The adapter's second product is added in the epilogue of the library's matrix product, forward and backward. Computed
apart, it is written, scaled and added in three passes over tensors as wide as the MLP (LoRA: arXiv 2106.09685, 4.1).

T = tokens, D = input width, O = output width, R = rank.
"""

from typing import Any

import torch
from torch import Tensor

from vapr_kernels.arguments import expect_float, expect_like
from vapr_kernels.matmul import matmul


def lora_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output (T, O), and the product ``x A^T`` (T, R) for the backward pass."""
    out = matmul(x, weight.T, bias)
    down = x @ a.T
    return out.addmm_(down, b.T, alpha=scale), down


def lora_linear_bwd(
    dout: Tensor, x: Tensor, down: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, *, with_dx: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the gradients of x (T, D; None if it needs none), A (R, D) and B (O, R)."""
    ddown = (dout @ b).mul_(scale)  # (T, R)
    da = ddown.T @ x
    db = dout.T @ (down * scale)
    dx = matmul(dout, weight).addmm_(ddown, a) if with_dx else None
    return dx, da, db


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:  # fmt: skip
        out, down = lora_linear_fwd(x, weight, bias, a, b, scale)
        ctx.save_for_backward(x, down, weight, a, b)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        x, down, weight, a, b = ctx.saved_tensors
        dx, da, db = lora_linear_bwd(dout, x, down, weight, a, b, ctx.scale, with_dx=ctx.needs_input_grad[0])
        return dx, None, None, da, db, None


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Apply a linear layer with a LoRA adapter: ``x W^T + bias + scale (x A^T) B^T`` (arXiv 2106.09685).

    Args:
        x: inputs, shape (..., D).
        weight, bias: the frozen layer, shapes (O, D) and (O,) or None; they get no gradient.
        a, b: the adapter, shapes (R, D) and (O, R), of the dtype of ``x``.
        scale: factor of the adapter; alpha / R, or alpha / sqrt(R).

    Returns:
        Shape (..., O), dtype of ``x``, differentiable in ``x``, ``a`` and ``b``.

    Raises:
        ValueError: naming the argument with a wrong shape, dtype or device, or a layer that is trained itself.
    """
    rows = x.reshape(-1, x.shape[-1])
    expect_float("x", rows, "(T, D)")
    width, rank = weight.shape[0], a.shape[0]
    expect_like("weight", weight, (width, x.shape[-1]), rows)
    expect_like("a", a, (rank, x.shape[-1]), rows)
    expect_like("b", b, (width, rank), rows)
    if bias is not None:
        expect_like("bias", bias, (width,), rows)
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("weight must be frozen; only the adapter is trained here")
    return _LoraLinear.apply(rows, weight, bias, a, b, scale).view(*x.shape[:-1], width)
