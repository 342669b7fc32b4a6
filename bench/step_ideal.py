"""What each part of a training step would take if it were nothing but its arithmetic, or nothing but its memory.

FLOPs are those that vapr/plan counts, but attention's only over keys that a query attends to; bytes are those of passes
that read each input and write each output once. Parts with neither (copies inside layers, Python, waiting) should be
none: their ideal is 0.

T = packed tokens, D = hidden size, I = intermediate size, H = query heads, G = key heads, E = head size, K = gathered
keys, L = predictions, V = vocabulary, O = outputs of a linear layer, R = rank.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from bench.step_parts import (
    ADAPTERS,
    ATTENTION,
    COPIES,
    GATED,
    HEAD,
    NORMS,
    OPTIMIZER,
    PARTS,
    PRODUCTS,
    ROTARY,
    TOWER,
    Sizes,
)  # fmt: skip
from vapr.plan import flops as step_flops
from vapr.plan.block_flops import INTO_ATTENTION, INTO_MLP, backward_flops, forward_flops, role
from vapr.plan.packs import PackSizes
from vapr.plan.shapes import Linear, Shapes
from vapr.plan.tower_flops import tower_flops


@dataclass(slots=True)
class Work:
    """What a part has to do, forward (or once a step) and backward."""

    flops: list[float] = dataclasses.field(default_factory=lambda: [0.0, 0.0])
    bytes: list[float] = dataclasses.field(default_factory=lambda: [0.0, 0.0])

    def seconds(self, tflops: float, gb_per_second: float) -> tuple[float, float]:
        """Return the shortest time, forward and backward, at a measured rate of products and of copies."""
        forward, backward = (
            max(flops / (1e12 * tflops), moved / (1e9 * gb_per_second))
            for flops, moved in zip(self.flops, self.bytes, strict=True)
        )
        return forward, backward


def ideal_work(shapes: Shapes, packs: Iterable[PackSizes], itemsize: int) -> dict[str, Work]:
    """Return the work of every part of a step with a cached reference; ``itemsize`` is of the policy's dtype."""
    work = {part: Work() for part in PARTS}
    for pack in packs:
        _add_decoder(work, shapes, pack, itemsize)
        vocabulary, width = shapes.head
        logits = 2.0 * pack.predictions * vocabulary * width
        _add(work[HEAD].flops, logits, logits * (2 if shapes.head_trained else 1))
        work[TOWER].flops[0] += tower_flops(shapes, pack, checkpointing="none")[0] if pack.images else 0.0
        _add(work[COPIES].bytes, 2.0 * itemsize * pack.tokens * width, 0.0)  # embeddings
    # The norm of a gradient reads it; AdamW reads it, weight and two moments in fp32, and writes the last three.
    work[OPTIMIZER].bytes[0] = 8.0 * 4 * shapes.num_trained
    return work


def sizes_of(shapes: Shapes, packs: Iterable[PackSizes]) -> Sizes:
    """Return what tells operators of a step's decoder apart."""
    text = shapes.config.get_text_config()
    layers = step_flops._layers(shapes)
    counts = (count for pack in packs for count in (pack.tokens, pack.predicting, pack.predictions))
    groups = [
        sum(linear.rank for name, linear in layer.items() if role(name) == into)
        for into in (INTO_ATTENTION, INTO_MLP)
        for layer in layers
    ]
    return Sizes(
        tokens=frozenset(counts),
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        head=_head_size(shapes),
        weights=frozenset((min(x.outputs, x.inputs), max(x.outputs, x.inputs)) for x in _linears(layers)),
        adapters=max([0, *groups, *(x.rank for x in _linears(layers))]),
    )


def _add_decoder(work: dict[str, Work], shapes: Shapes, pack: PackSizes, itemsize: int) -> None:
    text = shapes.config.get_text_config()
    layers = step_flops._layers(shapes)
    full = not shapes.num_adapter
    heads = text.num_attention_heads * _head_size(shapes)
    keys = sum(pack.lengths_k) * text.num_key_value_heads * _head_size(shapes)
    for number, layer in enumerate(layers):
        last = number == len(layers) - 1
        rows, lengths_q = step_flops._rows(pack, layer, last=last), pack.last_lengths_q if last else pack.lengths_q
        attended = sum(q * k - q * (q - 1) / 2 for q, k in zip(lengths_q, pack.lengths_k, strict=True))
        product, queries = 2.0 * heads * attended, sum(lengths_q) * heads
        for name, linear in layer.items():
            # Nothing before the first layer learns, unless all of it is trained.
            x_learns = full or number > 0 or role(name) != INTO_ATTENTION
            _add_linear(work, linear, rows[name], x_learns=x_learns)
        _add(work[ATTENTION].flops, 2 * product, 5 * product)
        # Each norm adds the residual stream: two tensors in, two out; so does its backward pass.
        normed = itemsize * 4.0 * text.hidden_size
        behind = pack.tokens if full or number > 0 else 0
        _add(
            work[NORMS].bytes, normed * (pack.tokens + rows["mlp.gate_proj"]), normed * (behind + rows["mlp.gate_proj"])
        )
        gated = itemsize * 1.0 * text.intermediate_size * rows["mlp.gate_proj"]
        _add(work[GATED].bytes, 3 * gated, 5 * gated)
        moved = itemsize * (2.0 * queries + 4.0 * keys)
        _add(work[ROTARY].bytes, moved, moved)
    normed = itemsize * 4.0 * text.hidden_size * pack.predicting  # the last one
    _add(work[NORMS].bytes, normed, normed)


def _add_linear(work: dict[str, Work], linear: Linear, rows: int, *, x_learns: bool) -> None:
    plain = dataclasses.replace(linear, rank=0)
    forward, backward = forward_flops(plain, rows), backward_flops(plain, rows, x_learns=x_learns)
    _add(work[PRODUCTS].flops, forward, backward)
    _add(
        work[ADAPTERS].flops,
        forward_flops(linear, rows) - forward,
        backward_flops(linear, rows, x_learns=x_learns) - backward,
    )


def _add(both: list[float], forward: float, backward: float) -> None:
    both[0] += forward
    both[1] += backward


def _head_size(shapes: Shapes) -> int:
    text = shapes.config.get_text_config()
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _linears(layers: list[dict[str, Linear]]) -> list[Linear]:
    return [linear for layer in layers for linear in layer.values()]
