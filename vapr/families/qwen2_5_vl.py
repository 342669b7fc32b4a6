"""Qwen2.5-VL: Qwen2-VL with a tower whose blocks attend inside of windows, but for a few (arXiv 2502.13923)."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.vision_utils import get_vision_window_index

from vapr.families.processed_image import ProcessedImage
from vapr.families.qwen2_vl import Qwen2VL
from vapr.to_device import sent


class Qwen2_5_VL(Qwen2VL):
    """Qwen2.5-VL."""

    model_type = "qwen2_5_vl"
    architecture = "Qwen2_5_VLForConditionalGeneration"

    def tower_arguments(self, model: Any, images: Sequence[ProcessedImage], device: torch.device) -> dict[str, Any]:
        """Add windows and their bounds."""
        layout, tower = super().tower_arguments(model, images, device), model.visual
        grid = torch.tensor([image.layout for image in images])
        index, windows = get_vision_window_index(
            grid, tower.spatial_merge_size, tower.window_size, tower.patch_size
        )  # fmt: skip
        layout["window_index"], layout["cu_window_seqlens"] = sent(index, device), sent(windows, device)
        layout["max_window_seqlen"] = int(windows.diff().max())
        return layout
