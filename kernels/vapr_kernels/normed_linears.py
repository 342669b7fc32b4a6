"""normed_linears: a residual added, an RMSNorm, and the linear layers that read it, with their adapters.

    total = x + residual
    y_i   = linear_i(rms_norm(total))

What a backward pass needs of the norm is its input and one number a row, so its output, as wide as the input, is kept
by nobody: it is computed again, in one pass over the memory.

T = packed tokens, D = hidden.
"""

from typing import Any

import torch
from torch import Tensor

from vapr_kernels.adapted_linears import Linears, gradients, input_gradient, project
from vapr_kernels.add_rms_norm import norm_bwd, norm_fwd, normed_again
from vapr_kernels.matmul import new_rows


class _NormedLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, linears: Linears, adapted: bool,
        *parameters: Tensor | None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        normed, total, rstd = norm_fwd(x, residual, weight, eps)
        y = project(normed, linears, adapted=adapted)
        ctx.set_materialize_grads(False)
        ctx.eps = eps
        ctx.linears, ctx.adapted = linears, adapted
        # Not a view: it would keep all outputs.
        ctx.save_for_backward(total, rstd, weight, y[:, linears.num_outputs :].clone())
        return (None if residual is None else total, *(y[:, columns] for columns in linears.outputs))

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor | None, *douts: Tensor | None) -> tuple[Any, ...]:
        total, rstd, weight, down = ctx.saved_tensors
        linears: Linears = ctx.linears
        needed = ctx.needs_input_grad[6:]
        dy = new_rows(total, len(total), linears.num_columns)
        for columns, dout in zip(linears.outputs, douts, strict=True):
            if dout is None:
                dy[:, columns].zero_()
            else:
                dy[:, columns] = dout
        dnormed = input_gradient(dy, linears, adapted=ctx.adapted, with_dx=any(ctx.needs_input_grad[:3]))
        normed = normed_again(total, rstd, weight, ctx.eps)
        found = gradients(dy, normed, down, linears, needed, adapted=ctx.adapted)
        of_norm = norm_bwd(dnormed, dtotal, total, weight, rstd, ctx.needs_input_grad[:3])
        return (*of_norm, None, None, None, *found)


def normed_linears(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, linears: Linears, *, adapted: bool = True
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """Norm rows (their sum with a residual) and run linear layers with adapters on them.

    Args:
        x: shape (T, D), any float dtype. residual: shape, dtype and device of ``x``, or None.
        weight: of the norm, shape (D,). eps: added to the mean square.
        linears: the layers, of the dtype of ``x``.
        adapted: whether their adapters run.

    Returns:
        ``x + residual`` (``x`` where there is none), and each layer's output, (T, O_i), a part of a wider tensor. All
        are differentiable in ``x``, ``residual``, ``weight`` and ``linears.parameters``.
    """
    total, *outs = _NormedLinears.apply(x, residual, weight, eps, linears, adapted, *linears.parameters)
    return (x if residual is None else total), tuple(outs)
