"""normed_attention: a residual added, an RMSNorm, queries, keys and values, attention, and the output projection.

    total   = x + residual
    q, k, v = linear_i(rms_norm(total))
    out     = output(attend(q, k, v))

Kept for the backward pass are total, one number a row, and q. Keys and values are narrow where heads share them, and
attention inside of short sequences is little work: both are computed again. With ``recompute`` q is, too.

T = packed tokens, D = hidden, W = width of all query heads.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vapr_kernels.adapted_linears import Linears, gradients, input_gradient, project
from vapr_kernels.add_rms_norm import norm_bwd, norm_fwd, normed_again

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class _NormedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, qkv: Linears, output: Linears,
        attend: Attend, learned: tuple[Tensor, ...], adapted: bool, recompute: bool, *parameters: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        normed, total, rstd = norm_fwd(x, residual, weight, eps)
        y = project(normed, qkv, adapted=adapted)
        q, k, v = (y[:, columns] for columns in qkv.outputs)
        out = project(attend(q, k, v), output, adapted=adapted)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.qkv, ctx.output, ctx.attend, ctx.learned, ctx.adapted = eps, qkv, output, attend, learned, adapted
        ctx.save_for_backward(total, rstd, weight, None if recompute else q.clone())  # not a view, which would keep y
        return out[:, : output.num_outputs], None if residual is None else total

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dtotal: Tensor | None) -> tuple[Any, ...]:
        total, rstd, weight, q = ctx.saved_tensors
        qkv, output, adapted = ctx.qkv, ctx.output, ctx.adapted
        needs, needed = ctx.needs_input_grad[:3], ctx.needs_input_grad[10:]
        if dout is None:
            return (*norm_bwd(None, dtotal, total, weight, rstd, needs), *[None] * (7 + len(needed)))
        normed = normed_again(total, rstd, weight, ctx.eps)
        y = project(normed, qkv, adapted=adapted, skip=0 if q is None else 1)
        *heads, inner = y.split([*qkv.widths[0 if q is None else 1 :], sum(qkv.ranks)], dim=1)
        heads = [x.detach().requires_grad_() for x in (heads if q is None else (q, *heads))]
        with torch.enable_grad():
            attended = ctx.attend(*heads)
        dy = dout.new_empty(len(dout), output.num_columns)
        dy[:, : output.num_outputs] = dout
        dattended = input_gradient(dy, output, adapted=adapted, with_dx=True)
        of_attended = project(attended.detach(), output, adapted=False, skip=1)
        split, last = len(qkv.parameters), len(needed) - len(ctx.learned)
        of_output = gradients(dy, attended.detach(), of_attended, output, needed[split:last], adapted=adapted)
        del dy
        learned = [x for x, need in zip(ctx.learned, needed[last:], strict=True) if need]
        found = torch.autograd.grad(attended, [*heads, *learned], dattended)
        dheads, of_learned = found[:3], iter(found[3:])
        del attended, dattended
        dy = dout.new_empty(len(dout), qkv.num_columns)
        for columns, dhead in zip(qkv.outputs, dheads, strict=True):
            dy[:, columns] = dhead
        dnormed = input_gradient(dy, qkv, adapted=adapted, with_dx=any(needs))
        of_qkv = gradients(dy, normed, inner, qkv, needed[:split], adapted=adapted)
        of_norm = norm_bwd(dnormed, dtotal, total, weight, rstd, needs)
        of_attend = [next(of_learned) if need else None for need in needed[last:]]
        return (*of_norm, *[None] * 7, *of_qkv, *of_output, *of_attend)


def normed_attention(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, qkv: Linears, output: Linears, attend: Attend,
    learned: tuple[Tensor, ...] = (), *, adapted: bool = True, recompute: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Norm rows (their sum with a residual), attend, and project what attention returns.

    Args:
        x: shape (T, D), any float dtype. residual: shape, dtype and device of ``x``, or None.
        weight: of the norm, shape (D,). eps: added to the mean square.
        qkv: three layers, queries first. output: one layer (D, W).
        attend: takes queries (T, W), keys and values, and returns (T, W); called once in each direction.
        learned: what ``attend`` reads beside them and may be trained, such as norms of heads.
        adapted: whether adapters run.
        recompute: keep no queries either; the backward pass computes them again.

    Returns:
        The output, (T, D), and ``x + residual`` (``x`` where there is none), differentiable in all that was given.
    """
    parameters = (*qkv.parameters, *output.parameters, *learned)
    out, total = _NormedAttention.apply(
        x, residual, weight, eps, qkv, output, attend, learned, adapted, recompute, *parameters
    )
    return out, x if residual is None else total
