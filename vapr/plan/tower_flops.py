"""FLOPs of the image tower and projector over a pack's images."""

import re
from collections import defaultdict
from typing import Any

import torch
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_window_index

from vapr.config import Checkpointing
from vapr.model.patches import num_layers_used
from vapr.plan.block_flops import backward_flops, block_backward, forward_flops, learns, recomputed_flops
from vapr.plan.packs import PackSizes
from vapr.plan.shapes import Linear, Shapes


def tower_flops(shapes: Shapes, pack: PackSizes, *, checkpointing: Checkpointing) -> tuple[float, bool]:
    """Count the tower and projector over a pack's images, their backward pass included where they are trained.

    Returns:
        FLOPs, and whether the features have a gradient.
    """
    embedded, width, lengths = _sizes(shapes, pack)
    num_rows = sum(lengths[0]) if lengths else 0
    blocks, projector = _parts(shapes)
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
    embedded, width, lengths = _sizes(shapes, pack)
    blocks, projector = _parts(shapes)
    rows = [*((linear, sum(lengths[0])) for block in blocks for linear in block.values())]
    rows += [(linear, pack.image_tokens) for linear in projector]
    attention = sum(4.0 * width * length * length for block in lengths[: len(blocks)] for length in block)
    return embedded + attention + sum(2.0 * num_rows * x.outputs * x.inputs for x, num_rows in rows)


def _in_projector(name: str) -> bool:
    return "merger" in name or "multi_modal_projector" in name


def _parts(shapes: Shapes) -> tuple[list[dict[str, Linear]], list[Linear]]:
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
    return [blocks[number] for number in sorted(blocks) if number <= _last_used(shapes)], projector


def _last_used(shapes: Shapes) -> int:
    """Return the number of the last block whose output becomes features: LLaVA takes one before the last."""
    if shapes.family != "llava":
        return int(shapes.config.vision_config.depth) - 1
    return num_layers_used(shapes.config) - 1


def _sizes(shapes: Shapes, pack: PackSizes) -> tuple[float, int, list[list[int]]]:
    """Return FLOPs of embedding the patches, the tower's width, and by block the lengths that attention runs on."""
    vision = shapes.config.vision_config
    if shapes.family == "llava":
        patches, images = (vision.image_size // vision.patch_size) ** 2, len(pack.grids)
        embedded = 2.0 * images * patches * vision.hidden_size * 3 * vision.patch_size**2
        return embedded, vision.hidden_size, [[patches + 1] * images] * vision.num_hidden_layers  # and a class token
    grid = torch.tensor([grid for grid in pack.grids if grid is not None])
    width = vision.hidden_size if shapes.family == "qwen2_5_vl" else vision.embed_dim
    values = 3 * vision.temporal_patch_size * vision.patch_size**2
    return 2.0 * int(grid.prod(1).sum()) * width * values, width, _attended(shapes.family, vision, grid)


def _attended(family: str, vision: Any, grid: torch.Tensor) -> list[list[int]]:
    """Return the lengths of the sequences of each block of Qwen's tower: whole images, or windows of them."""
    whole = get_vision_cu_seqlens(grid).diff().tolist()
    if family == "qwen2_vl":
        return [whole] * vision.depth
    _, bounds = get_vision_window_index(grid, vision.spatial_merge_size, vision.window_size, vision.patch_size)
    windows = bounds.unique_consecutive().diff().tolist()
    return [whole if number in vision.fullatt_block_indexes else windows for number in range(vision.depth)]
