"""FLOPs of linear layers and of the decoder layers that they are in."""

from collections.abc import Mapping
from typing import Literal

from vapr.plan.shapes import Linear

Role = Literal["into attention", "out of attention", "into mlp", "out of mlp"]
INTO_ATTENTION: Role = "into attention"
OUT_OF_ATTENTION: Role = "out of attention"
INTO_MLP: Role = "into mlp"
OUT_OF_MLP: Role = "out of mlp"


QUERIES = "self_attn.q_proj"


def role(name: str) -> Role:
    """Return what a linear layer is for, by its name in a decoder layer. A router leads into an MLP of experts."""
    if name.startswith("self_attn."):
        return OUT_OF_ATTENTION if name.endswith("o_proj") else INTO_ATTENTION
    return OUT_OF_MLP if name.endswith("down_proj") else INTO_MLP


def is_of_experts(name: str) -> bool:
    """Tell whether a layer stands for the experts that a token is sent to, by its name in a decoder layer."""
    return ".experts." in name


def forward_flops(linear: Linear, rows: int) -> float:
    """Count a linear layer and its adapter."""
    return 2.0 * rows * (linear.outputs * linear.inputs + linear.adapter)


def backward_flops(linear: Linear, rows: int, *, x_learns: bool) -> float:
    """Count a linear layer's backward pass, where its output has a gradient and its input may have one."""
    flops = 2.0 * rows * linear.outputs * linear.inputs * (int(x_learns) + int(linear.trained))
    if linear.rank:  # through B, then the gradients of A and B, and through A
        flops += 2.0 * rows * linear.rank * (2 * linear.outputs + linear.inputs + (linear.inputs if x_learns else 0))
    return flops


def learns(linear: Linear) -> bool:
    """Tell whether a linear layer is trained, itself or by an adapter."""
    return bool(linear.rank) or linear.trained


def block_backward(
    block: Mapping[str, Linear], rows: Mapping[str, int], attention: float, x_learns: bool, *, norms_learn: bool
) -> tuple[float, bool]:
    """Count a block's backward pass: autograd skips what leads to nothing that learns.

    Args:
        block: its linear layers by their names in it.
        rows: that each of them runs on.
        attention: FLOPs of one of attention's products.
        x_learns: whether its input has a gradient.
        norms_learn: whether its norms are trained.

    Returns:
        FLOPs, and whether its output has a gradient.
    """
    flops = 0.0
    for into, out_of, between in (
        (INTO_ATTENTION, OUT_OF_ATTENTION, 5 * attention),
        (INTO_MLP, OUT_OF_MLP, 0.0),
    ):
        normed = x_learns or norms_learn
        first = [name for name in _found(block, into) if normed or learns(block[name])]
        flops += sum(backward_flops(block[name], rows[name], x_learns=normed) for name in first)
        flops += between if first else 0.0
        last = [name for name in _found(block, out_of) if first or learns(block[name])]
        flops += sum(backward_flops(block[name], rows[name], x_learns=bool(first)) for name in last)
        x_learns = x_learns or bool(last)
    return flops, x_learns


def _found(block: Mapping[str, Linear], *roles: Role) -> list[str]:
    return [name for name in block if role(name) in roles]


def recomputed_flops(
    block: Mapping[str, Linear], rows: Mapping[str, int], attention: float, level: str, *,
    x_learns: bool, norms_learn: bool, by_hand: bool = False, attends_again: bool = False,
) -> float:  # fmt: skip
    """Return what of a block's forward pass is computed again at a level of ``policy.checkpointing``.

    What leads to nothing that learns is kept by nobody, so it is not computed again. And it stops where all that the
    backward pass wants is there: before a last layer without an adapter, which wants its input but not its output.
    What experts put out is wanted, because it is scaled by scores. An MLP that is one function (``by_hand``,
    :mod:`vapr_kernels.gated_mlp`) computes its first products again, and the narrow one of the last layer's adapter.
    Attention that is one function (``attends_again``, :mod:`vapr_kernels.normed_attention`) computes keys, values and
    attention again at any level. The other arguments are those of :func:`block_backward`.
    """

    def forward(names: list[str]) -> float:
        return sum(forward_flops(block[name], rows[name]) for name in names)

    def inner(of: Role) -> float:
        return sum(2.0 * rows[name] * block[name].rank * block[name].inputs for name in _found(block, of))

    attended = x_learns or norms_learn or any(learns(block[name]) for name in _found(block, INTO_ATTENTION))
    passed_on = attended or any(learns(linear) for linear in block.values())
    into_attention = forward(_found(block, INTO_ATTENTION)) + 2 * attention
    into_mlp = forward(_found(block, INTO_MLP))
    wanted = [x for x in _found(block, OUT_OF_MLP) if block[x].rank or is_of_experts(x)]
    mlp = into_mlp + (inner(OUT_OF_MLP) if by_hand else forward(wanted))
    again = kept = 0.0  # what attention computes again of itself, and what of that the queries would be
    if attends_again and passed_on:
        queries = block[QUERIES]
        kept = 2.0 * rows[QUERIES] * queries.outputs * (queries.inputs + queries.rank)
        again = into_attention - kept + inner(OUT_OF_ATTENTION)
    if level == "attention":
        return again + kept if attends_again else into_attention if attended else 0.0
    if level == "mlp":
        return again + mlp if passed_on else 0.0
    if level == "full":
        return again + into_attention + forward(_found(block, OUT_OF_ATTENTION)) + mlp if passed_on else 0.0
    return again
