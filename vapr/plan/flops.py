"""Floating-point operations of a pack: all that a step runs, as PyTorch's counter counts them, and those that it needs.

A matrix product of (m, k) and (k, n) counts 2 m k n; attention counts its products over all (query, key) it is handed,
2 forward and 5 backward; norms, activations and other pointwise work count nothing. COUNTED teaches PyTorch's
FlopCounterMode the three operations that it does not know: vapr's head, attention on a CPU, and a product that is added
in place (an adapter's second).

T = packed tokens, L = predictions, D = hidden, V = vocabulary, O = outputs of a linear layer, R = rank.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch

from vapr.config import Checkpointing
from vapr.plan.block_flops import block_backward, forward_flops, recomputed_flops
from vapr.plan.packs import PackSizes
from vapr.plan.shapes import Linear, Shapes
from vapr.plan.tower_flops import tower_flops, tower_forward_flops


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
    weights = sum(w.numel for w in shapes.weights if w.part == "language model" and len(w.shape) == 2)
    adapters = sum(x.adapter for name, x in shapes.linears.items() if _in_decoder(name))
    passes = 2 if shapes.num_adapter else 3
    flops = 0.0
    for pack in packs:
        flops += 2.0 * pack.tokens * (weights * passes + adapters * 3)
        flops += 2.0 * passes * pack.predictions * shapes.head[0] * shapes.head[1]
        attended = sum(q * k - q * (q - 1) / 2 for q, k in zip(pack.lengths_q, pack.lengths_k, strict=True))
        flops += 3.5 * 4.0 * config.num_hidden_layers * config.hidden_size * attended
    return flops


def pack_flops(
    shapes: Shapes, pack: PackSizes, *, checkpointing: Checkpointing, reference: bool, cached_features: bool
) -> Flops:
    """Count all FLOPs of a pack in one step.

    Args:
        shapes: of the model.
        pack: its sizes.
        checkpointing: what of each layer is computed again in the backward pass.
        reference: whether the reference's log-probs are computed in the step, with adapters off.
        cached_features: whether image features come from the cache.
    """
    full = any(weight.trained for weight in shapes.weights if weight.part == "language model")
    x_learns, tower = full, 0.0
    if pack.layouts and not cached_features:
        tower, features_learn = tower_flops(shapes, pack, checkpointing=checkpointing)
        x_learns |= features_learn
        if reference and shapes.trains_tower:  # else it takes the same features
            tower += tower_forward_flops(shapes, pack)
    layers = _layers(shapes)
    forward = backward = recomputed = plain = 0.0
    for number, layer in enumerate(layers):
        last = number == len(layers) - 1
        rows, attention = _rows(pack, last=last), _attention(shapes, pack, last=last)
        ahead = sum(forward_flops(layer[name], rows[name]) for name in layer) + 2 * attention
        forward += ahead
        plain += sum(_without_adapter(name, x, rows[name]) for name, x in layer.items()) + 2 * attention
        recomputed += recomputed_flops(
            layer, rows, attention, checkpointing, x_learns=x_learns, norms_learn=full, by_hand=True
        )  # fmt: skip
        back, x_learns = block_backward(layer, rows, attention, x_learns, norms_learn=full)
        backward += back
    vocabulary, width = shapes.head
    product = 2.0 * pack.predictions * vocabulary * width
    head = product * ((3 if shapes.head_trained else 2) if x_learns or shapes.head_trained else 1)
    return Flops(tower, plain + product if reference else 0.0, forward, backward, recomputed, head)


def _in_decoder(name: str) -> bool:
    return "language_model.layers." in name


def _layers(shapes: Shapes) -> list[dict[str, Linear]]:
    """Return the linear layers of every decoder layer, by the end of their names."""
    layers: list[dict[str, Linear]] = [{} for _ in range(shapes.num_layers)]
    for name, linear in shapes.linears.items():
        if _in_decoder(name):
            number = int(name.split("language_model.layers.")[1].split(".")[0])
            layers[number][name.rsplit(".", 1)[-1]] = linear
    return layers


def _rows(pack: PackSizes, *, last: bool) -> dict[str, int]:
    """Return the rows that each linear layer runs on; the last decoder layer skips tokens that predict nothing."""
    some = pack.predicting if last else pack.tokens
    names = dict.fromkeys(("o_proj", "gate_proj", "up_proj", "down_proj"), some)
    queries = sum(pack.last_lengths_q) if last else pack.tokens
    return {**names, "q_proj": queries, "k_proj": pack.tokens, "v_proj": pack.tokens}


def _without_adapter(name: str, linear: Linear, rows: int) -> float:
    """Count a forward pass with adapters off. Their first products are part of joint ones, which run all the same.

    The output projection is joined with nothing.
    """
    inner = 0 if name == "o_proj" else linear.rank
    return 2.0 * rows * linear.inputs * (linear.outputs + inner)


def _attention(shapes: Shapes, pack: PackSizes, *, last: bool) -> float:
    """Return the FLOPs of one of attention's products in one decoder layer, over all queries and keys handed to it."""
    text = shapes.config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    queries = pack.last_lengths_q if last else pack.lengths_q
    pairs = sum(q * k for q, k in zip(queries, pack.lengths_k, strict=True))
    return 2.0 * text.num_attention_heads * head * pairs


def _head_flops(
    hidden: Any,
    head: Any,
    labels: Any,
    reference: Any,
    product: str,
    gradient: str,
    with_dx: bool,
    *rest: Any,
    **out: Any,
) -> int:
    """Count vapr::linear_logps: the logits, and their gradient in the hidden states where it is finished at once."""
    products = 1 + (with_dx and gradient in ("dx", "keep"))
    return 2 * hidden[0] * head[0] * head[1] * products


def _head_backward_flops(
    dout: Any, hidden: Any, head: Any, labels: Any, table: Any, exps: Any, product: str, with_dx: bool,
    with_dhead: bool, **out: Any,
) -> int:  # fmt: skip
    """Count its backward pass: logits again unless they were kept, and the gradients that were not finished."""
    again = exps[0] != hidden[0]
    return 2 * hidden[0] * head[0] * head[1] * (int(again) + int(with_dx) + int(with_dhead))


def _attention_flops(q: Any, k: Any, v: Any, lengths_q: Any, lengths_k: Any, *rest: Any, **out: Any) -> int:
    return 2 * 2 * q[1] * q[2] * sum(num_q * num_k for num_q, num_k in zip(lengths_q, lengths_k, strict=True))


def _attention_backward_flops(dout: Any, *forward: Any, **out: Any) -> int:
    return _attention_flops(*forward) // 2 * 5


def _sdpa_flops(q: Any, k: Any, v: Any, *rest: Any, **out: Any) -> int:
    return 2 * 2 * q[0] * q[1] * q[2] * k[2] * q[3]


def _sdpa_backward_flops(dout: Any, q: Any, k: Any, v: Any, *rest: Any, **out: Any) -> int:
    return 5 * 2 * q[0] * q[1] * q[2] * k[2] * q[3]


def _added_product_flops(out: Any, a: Any, b: Any, **rest: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


COUNTED = {
    torch.ops.aten.addmm_: _added_product_flops,
    torch.ops.vapr.linear_logps: _head_flops,
    torch.ops.vapr.linear_logps_backward: _head_backward_flops,
    torch.ops.vapr.causal_attention: _attention_flops,
    torch.ops.vapr.causal_attention_bwd: _attention_backward_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward_flops,
}
"""For FlopCounterMode's ``custom_mapping``."""
