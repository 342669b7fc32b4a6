"""FLOPs of the image tower and projector over a pack's images."""

import re
from collections import defaultdict

from vapr.config import Checkpointing
from vapr.families import FAMILIES
from vapr.families.family import TowerWork
from vapr.plan.block_flops import backward_flops, block_backward, forward_flops, learns, recomputed_flops
from vapr.plan.packs import PackSizes
from vapr.plan.shapes import Linear, Shapes


def tower_flops(shapes: Shapes, pack: PackSizes, *, checkpointing: Checkpointing) -> tuple[float, bool]:
    """Count the tower and projector over a pack's images, their backward pass included where they are trained.

    Returns:
        FLOPs, and whether the features have a gradient.
    """
    work = _work(shapes, pack)
    embedded, width, lengths = work.embedding_flops, work.width, work.lengths
    num_rows = sum(lengths[0]) if lengths else 0
    blocks, projector = _parts(shapes, len(lengths))
    trained = [w.name for w in shapes.weights if w.trained and w.part == "image tower and projector"]
    tower_learns = any(not _in_projector(name) for name in trained)
    x_learns = tower_learns
    level = "full" if checkpointing == "full" else "none"  # the others are the decoder's
    flops = embedded * (2 if tower_learns else 1)
    for number, block in enumerate(blocks):
        rows = dict.fromkeys(block, num_rows)
        attention = 2.0 * width * sum(length * length for length in lengths[number])
        flops += sum(forward_flops(linear, num_rows) for linear in block.values()) + 2 * attention
        flops += recomputed_flops(block, rows, attention, level, x_learns=x_learns, norms_learn=tower_learns)
        back, x_learns = block_backward(block, rows, attention, x_learns, norms_learn=tower_learns)
        flops += back
    x_learns |= any("merger.ln_q" in name for name in trained)  # the projector's own norm
    for linear in projector:
        flops += forward_flops(linear, pack.image_tokens)
        if x_learns or learns(linear):
            flops += backward_flops(linear, pack.image_tokens, x_learns=x_learns)
            x_learns = True
    return flops, x_learns


def tower_forward_flops(shapes: Shapes, pack: PackSizes) -> float:
    """Count the forward pass alone, with adapters off."""
    work = _work(shapes, pack)
    embedded, width, lengths = work.embedding_flops, work.width, work.lengths
    blocks, projector = _parts(shapes, len(lengths))
    rows = [*((linear, sum(lengths[0])) for block in blocks for linear in block.values())]
    rows += [(linear, pack.image_tokens) for linear in projector]
    attention = sum(4.0 * width * length * length for block in lengths[: len(blocks)] for length in block)
    return embedded + attention + sum(2.0 * num_rows * x.outputs * x.inputs for x, num_rows in rows)


def _work(shapes: Shapes, pack: PackSizes) -> TowerWork:
    return FAMILIES[shapes.family].tower_work(shapes.config, pack.layouts, pack.pixel_shapes)


def _in_projector(name: str) -> bool:
    return "merger" in name or "multi_modal_projector" in name


def _parts(shapes: Shapes, num_blocks: int) -> tuple[list[dict[str, Linear]], list[Linear]]:
    """Return the linear layers of the blocks that run, by the end of their names, and the projector's in order."""
    blocks: dict[int, dict[str, Linear]] = defaultdict(dict)
    projector = []
    for name, linear in shapes.linears.items():
        if "language_model." in name:
            continue
        if _in_projector(name):
            projector.append(linear)
        elif found := re.search(r"\.(?:blocks|layers)\.(\d+)\.", name):
            blocks[int(found[1])][name.rsplit(".", 1)[-1]] = linear
    return [blocks[number] for number in sorted(blocks) if number < num_blocks], projector
