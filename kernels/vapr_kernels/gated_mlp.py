"""gated_mlp: a residual added, an RMSNorm, and a gated MLP with its adapters, in one function.

    total = x + residual
    n     = rms_norm(total)
    out   = down(silu(gate(n)) * up(n))

Kept for the backward pass are total, one number a row, and the outputs of gate and up; n and the input of ``down``, as
wide as both, are computed again in passes over the memory. With ``recompute`` gate and up are computed again, too: two
thirds of the MLP's products.

T = packed tokens, D = hidden, I = intermediate size.
"""

from typing import Any

import torch
from torch import Tensor

from vapr_kernels.adapted_linears import Linears, gradients, input_gradient, project
from vapr_kernels.add_rms_norm import norm_bwd, norm_fwd, normed_again
from vapr_kernels.matmul import new_rows
from vapr_kernels.swiglu import gated, gated_bwd


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, gate_up: Linears, down: Linears,
        adapted: bool, recompute: bool, *parameters: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        normed, total, rstd = norm_fwd(x, residual, weight, eps)
        both = project(normed, gate_up, adapted=adapted)
        gate, up = gate_up.outputs
        y = project(gated(both[:, gate], both[:, up]), down, adapted=adapted)
        ctx.set_materialize_grads(False)
        ctx.eps = eps
        ctx.gate_up, ctx.down, ctx.adapted = gate_up, down, adapted
        inner = y[:, down.num_outputs :].clone()  # not a view, which would keep all of y
        ctx.save_for_backward(total, rstd, weight, inner, None if recompute else both)
        return y[:, : down.num_outputs], total

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dtotal: Tensor | None) -> tuple[Any, ...]:
        total, rstd, weight, inner, both = ctx.saved_tensors
        gate_up, down, adapted = ctx.gate_up, ctx.down, ctx.adapted
        needs, needed = ctx.needs_input_grad[:3], ctx.needs_input_grad[8:]
        if dout is None:
            return (*norm_bwd(None, dtotal, total, weight, rstd, needs), *[None] * (5 + len(needed)))
        normed = normed_again(total, rstd, weight, ctx.eps)
        both = project(normed, gate_up, adapted=adapted) if both is None else both
        dy = new_rows(dout, len(dout), down.num_columns)
        dy[:, : down.num_outputs] = dout
        split = len(gate_up.parameters)
        with_dnormed = any(needs)
        dgated = input_gradient(dy, down, adapted=adapted, with_dx=with_dnormed or any(needed[:split]))
        gate, up = gate_up.outputs
        if dgated is None:  # nothing learns but the last layer
            act = gated(both[:, gate], both[:, up])
            of_down = gradients(dy, act, inner, down, needed[split:], adapted=adapted)
            return (*[None] * (8 + split), *of_down)
        # Gradients take the places of what they are gradients of, which are the widest tensors of a layer.
        gated_bwd(dgated, both[:, gate], both[:, up])
        of_down = gradients(dy, dgated, inner, down, needed[split:], adapted=adapted)
        del dgated, dy
        inner = both[:, gate_up.num_outputs :].clone()
        dnormed = input_gradient(both, gate_up, adapted=adapted, with_dx=with_dnormed)
        of_gate_up = gradients(both, normed, inner, gate_up, needed[:split], adapted=adapted)
        of_norm = norm_bwd(dnormed, dtotal, total, weight, rstd, needs)
        return (*of_norm, *[None] * 5, *of_gate_up, *of_down)


def gated_mlp(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, gate_up: Linears, down: Linears, *, adapted: bool = True,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Add a residual, norm, and run a gated MLP.

    Args:
        x, residual: shape (T, D), any float dtype.
        weight: of the norm, shape (D,). eps: added to the mean square.
        gate_up: two layers (I, D), gate first. down: one layer (D, I).
        adapted: whether adapters run.
        recompute: keep neither gate nor up; the backward pass computes them again.

    Returns:
        The MLP's output and ``x + residual``, (T, D) each, differentiable in all that was given.
    """
    parameters = (*gate_up.parameters, *down.parameters)
    return _GatedMlp.apply(x, residual, weight, eps, gate_up, down, adapted, recompute, *parameters)
