"""Floating-point operations of a pack: all that a step runs, as PyTorch's counter counts them, and those that it needs.

A matrix product of (m, k) and (k, n) counts 2 m k n; attention counts its products over all (query, key) it is handed,
2 forward and 5 backward; norms, activations and other pointwise work count nothing.

T = packed tokens, L = predictions, D = hidden, V = vocabulary, O = outputs of a linear layer, R = rank.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from vapr.config import Checkpointing
from vapr.families import FAMILIES
from vapr.plan.attended import attended
from vapr.plan.block_flops import (
    INTO_ATTENTION,
    OUT_OF_ATTENTION,
    OUT_OF_MLP,
    block_backward,
    forward_flops,
    recomputed_flops,
    role,
)
from vapr.plan.packs import PackSizes
from vapr.plan.shapes import Linear, Shapes, decoder_place
from vapr.plan.tower_flops import tower_flops, tower_forward_flops
from vapr.plan.trials import head_size, trials_of


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOPs of one pack, by part of the step."""

    tower: float = 0.0  # tower and projector, their backward pass included where they are trained
    reference: float = 0.0  # the reference's forward pass, where it is not in the cache
    forward: float = 0.0  # the language model's
    backward: float = 0.0
    recomputed: float = 0.0  # forward again, under checkpointing
    head: float = 0.0  # log-probs and their gradient

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


def useful_flops(shapes: Shapes, packs: Iterable[PackSizes]) -> float:
    """Count the FLOPs that packs need: neither what sharing saves nor what is computed twice; without the tower.

    The same figure as :func:`vapr.training.metrics.useful_flops`, of which ``mfu`` is made.
    """
    config = shapes.config.get_text_config()
    weights = sum(linear.outputs * linear.inputs for layer in _layers(shapes) for linear in layer.values())
    adapters = sum(x.adapter for name, x in shapes.linears.items() if decoder_place(name, shapes.family) is not None)
    passes = 2 if shapes.num_adapter else 3
    windows = FAMILIES[shapes.family].windows(shapes.config)
    flops = 0.0
    for pack in packs:
        flops += 2.0 * pack.tokens * (weights * passes + adapters * 3)
        flops += 2.0 * passes * pack.predictions * shapes.head[0] * shapes.head[1]
        seen = attended(pack.lengths_q, pack.lengths_k, pack.both_ways, windows)
        flops += 3.5 * 4.0 * config.num_attention_heads * head_size(config) * seen
    return flops


def pack_flops(
    shapes: Shapes, pack: PackSizes, *, checkpointing: Checkpointing, reference: bool, cached_features: bool,
    kernels: bool = False, module_by_module: bool = False,
) -> Flops:  # fmt: skip
    """Count all FLOPs of a pack in one step.

    Args:
        shapes: of the model.
        pack: its sizes.
        checkpointing: what of each layer is computed again in the backward pass.
        reference: whether the reference's log-probs are computed in the step, with adapters off.
        cached_features: whether image features come from the cache.
        kernels: whether fused kernels run, as on a GPU: attention then keeps less, and computes more again.
        module_by_module: whether layers run so, as under ZeRO 3.
    """
    full = any(weight.trained for weight in shapes.weights if weight.part == "language model")
    x_learns, tower = full, 0.0
    if pack.images and not cached_features:
        tower, features_learn = tower_flops(shapes, pack, checkpointing=checkpointing)
        x_learns |= features_learn
        if reference and shapes.trains_tower:  # else it takes the same features
            tower += tower_forward_flops(shapes, pack)
    layers, tried = _layers(shapes), trials_of(shapes.config)
    forward = backward = recomputed = plain = 0.0
    for number, layer in enumerate(layers):
        written_out = number in tried.written_out
        last = written_out and number == len(layers) - 1
        rows, attention = _rows(pack, layer, last=last), _attention(shapes, pack, last=last)
        ahead = sum(forward_flops(layer[name], rows[name]) for name in layer) + 2 * attention
        forward += ahead
        joint = frozenset() if module_by_module else tried.joint.get(number, frozenset())
        attends_again = kernels and not last and INTO_ATTENTION in joint and checkpointing != "full"
        joint |= {OUT_OF_ATTENTION} if attends_again else frozenset()
        plain += sum(_without_adapter(x, rows[name], joint=role(name) in joint) for name, x in layer.items())
        plain += 2 * attention
        whole: Checkpointing = "none" if checkpointing == "none" else "full"  # transformers' own layer has no parts
        recomputed += recomputed_flops(
            layer, rows, attention, checkpointing if written_out else whole,
            x_learns=x_learns, norms_learn=full, by_hand=OUT_OF_MLP in joint,
            attends_again=attends_again,
        )  # fmt: skip
        back, x_learns = block_backward(layer, rows, attention, x_learns, norms_learn=full)
        backward += back
    vocabulary, width = shapes.head
    product = 2.0 * pack.predictions * vocabulary * width
    head = product * ((3 if shapes.head_trained else 2) if x_learns or shapes.head_trained else 1)
    return Flops(tower, plain + product if reference else 0.0, forward, backward, recomputed, head)


def _layers(shapes: Shapes) -> list[dict[str, Linear]]:
    """Return the linear layers and experts of every decoder layer, by their names in it."""
    layers: list[dict[str, Linear]] = [{} for _ in range(shapes.num_layers)]
    for name, linear in (*shapes.linears.items(), *shapes.experts.items()):
        place = decoder_place(name, shapes.family)
        if place is not None:
            layers[place[0]][place[1]] = linear
    return layers


def _rows(pack: PackSizes, layer: Iterable[str], *, last: bool) -> dict[str, int]:
    """Return the rows that each linear layer runs on; the last decoder layer skips tokens that predict nothing."""
    if not last:
        return dict.fromkeys(layer, pack.tokens)
    queries = {"self_attn.q_proj": sum(pack.last_lengths_q)}
    keys = dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), pack.tokens)
    return {**dict.fromkeys(layer, pack.predicting), **queries, **keys}


def _without_adapter(linear: Linear, rows: int, *, joint: bool) -> float:
    """Count a forward pass with adapters off. Their first products are part of joint ones, which run all the same."""
    return 2.0 * rows * linear.inputs * (linear.outputs + (linear.rank if joint else 0))


def _attention(shapes: Shapes, pack: PackSizes, *, last: bool) -> float:
    """Return the FLOPs of one of attention's products in one decoder layer, over all queries and keys handed to it."""
    text = shapes.config.get_text_config()
    queries = pack.last_lengths_q if last else pack.lengths_q
    pairs = sum(q * k for q, k in zip(queries, pack.lengths_k, strict=True))
    return 2.0 * text.num_attention_heads * head_size(text) * pairs
