"""gated_mlp: a residual added, an RMSNorm, and a gated MLP with its adapters, in one function.

    total = x + residual
    n     = rms_norm(total)
    out   = down(silu(gate(n)) * up(n))

Kept for the backward pass are total, one number a row, the outputs of gate and up, and what the first matrix of down's
adapter makes; n and the input of ``down``, as wide as gate, are computed again in passes over the memory. With
``recompute`` gate and up are computed again, too: two thirds of the MLP's products. ROWS rows then go through it at a
time, so that little of what is wide exists at once, unless weights are trained or restored from fewer bits.

T = packed tokens, D = hidden, I = intermediate size.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from vapr_kernels.adapted_linears import Linears, gradients, input_gradient, project
from vapr_kernels.add_rms_norm import norm_bwd, norm_fwd, normed_again
from vapr_kernels.matmul import new_rows
from vapr_kernels.swiglu import gated, gated_bwd

ROWS = 1024
"""Rows on which gate and up are computed again at a time: enough for a GPU to multiply at its full rate."""


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, gate_up: Linears, down: Linears,
        adapted: bool, recompute: bool, unread: bool, *parameters: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        normed, total, rstd = norm_fwd(x, residual, weight, eps)
        ctx.set_materialize_grads(False)
        ctx.eps = eps
        ctx.gate_up, ctx.down, ctx.adapted = gate_up, down, adapted
        both = inner = None
        if unread:
            out = total.new_empty(()).expand_as(total)
        elif recompute:
            parts = [normed[rows] for rows in _parts(len(total), gate_up, down)]
            out = _joined([_mlp(part, gate_up, down, adapted)[0][:, : down.num_outputs] for part in parts])
        else:
            y, both = _mlp(normed, gate_up, down, adapted)
            out, inner = y[:, : down.num_outputs], y[:, down.num_outputs :].clone()  # not a view, which would keep y
        ctx.save_for_backward(total, rstd, weight, inner, both)
        return out, total

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dtotal: Tensor | None) -> tuple[Any, ...]:
        total, rstd, weight, inner, both = ctx.saved_tensors
        needs, needed = ctx.needs_input_grad[:3], ctx.needs_input_grad[9:]
        if dout is None:
            return (*norm_bwd(None, dtotal, total, weight, rstd, needs), *[None] * (6 + len(needed)))
        run = functools.partial(
            _mlp_bwd, gate_up=ctx.gate_up, down=ctx.down, adapted=ctx.adapted, needed=needed, with_dnormed=any(needs)
        )
        parts = [slice(None)] if both is not None else _parts(len(total), ctx.gate_up, ctx.down)
        dnormed: list[Tensor] = []
        found: list[Tensor | None] = [None] * len(needed)
        for rows in parts:
            normed = normed_again(total[rows], rstd[rows], weight, ctx.eps)
            of_normed, of_parameters = run(dout[rows], normed, both, inner)
            dnormed += [] if of_normed is None else [of_normed]
            found = of_parameters if len(parts) == 1 else _added(found, of_parameters)
        of_norm = norm_bwd(_joined(dnormed) if dnormed else None, dtotal, total, weight, rstd, needs)
        return (*of_norm, *[None] * 6, *found)


def _mlp(normed: Tensor, gate_up: Linears, down: Linears, adapted: bool) -> tuple[Tensor, Tensor]:
    """Return the joint outputs of ``down`` and of gate and up."""
    both = project(normed, gate_up, adapted=adapted)
    gate, up = gate_up.outputs
    return project(gated(both[:, gate], both[:, up]), down, adapted=adapted), both


def _mlp_bwd(
    dout: Tensor, normed: Tensor, both: Tensor | None, inner: Tensor | None, *,
    gate_up: Linears, down: Linears, adapted: bool, needed: tuple[bool, ...], with_dnormed: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
    """Return the gradients of ``normed`` and of the parameters; None for ``both`` and ``inner``: they were not kept."""
    both = project(normed, gate_up, adapted=adapted) if both is None else both
    dy = new_rows(dout, len(dout), down.num_columns)
    dy[:, : down.num_outputs] = dout
    split = len(gate_up.parameters)
    dgated = input_gradient(dy, down, adapted=adapted, with_dx=with_dnormed or any(needed[:split]))
    gate, up = gate_up.outputs
    if dgated is None:  # nothing learns but the last layer
        act = gated(both[:, gate], both[:, up])
    else:
        # Gradients take the places of what they are gradients of, which are the widest tensors of a layer.
        gated_bwd(dgated, both[:, gate], both[:, up])
        act = dgated
    inner = project(act, down, adapted=False, skip=1) if inner is None else inner
    of_down = gradients(dy, act, inner, down, needed[split:], adapted=adapted)
    if dgated is None:
        return None, [*[None] * split, *of_down]
    del act, dgated, dy
    inner = both[:, gate_up.num_outputs :].clone()
    dnormed = input_gradient(both, gate_up, adapted=adapted, with_dx=with_dnormed)
    return dnormed, [*gradients(both, normed, inner, gate_up, needed[:split], adapted=adapted), *of_down]


def _parts(num_rows: int, *linears: Linears) -> list[slice]:
    """Divide rows; not where weights are trained, whose gradients would be as wide as what is saved.

    Nor where they are restored from fewer bits, which each part would do again. All parts but the last have as many
    rows, so that memory grows evenly with the rest.
    """
    weights = [weight for layers in linears for weight in layers.weights]
    at_once = any(weight is None or weight.requires_grad for weight in weights)
    size = max(num_rows, 1) if at_once else ROWS
    return [slice(start, start + size) for start in range(0, max(num_rows, 1), size)]


def _added(sums: list[Tensor | None], gradients: list[Tensor | None]) -> list[Tensor | None]:
    """Add gradients of some more rows, in fp32 (fp64): autograd rounds the sum to the parameter's dtype."""
    wide = (None if x is None else x.to(torch.promote_types(x.dtype, torch.float32)) for x in gradients)
    return [b if a is None or b is None else a.add_(b) for a, b in zip(sums, wide, strict=True)]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def gated_mlp(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, gate_up: Linears, down: Linears, *, adapted: bool = True,
    recompute: bool = False, unread: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Add a residual, norm, and run a gated MLP.

    Args:
        x, residual: shape (T, D), any float dtype.
        weight: of the norm, shape (D,). eps: added to the mean square.
        gate_up: two layers (I, D), gate first. down: one layer (D, I).
        adapted: whether adapters run.
        recompute: keep neither gate nor up; the backward pass computes them again.
        unread: compute no output, because nobody reads it: the backward pass is all that is wanted.

    Returns:
        The MLP's output and ``x + residual``, (T, D) each, differentiable in all that was given.
    """
    parameters = (*gate_up.parameters, *down.parameters)
    return _GatedMlp.apply(x, residual, weight, eps, gate_up, down, adapted, recompute, unread, *parameters)
