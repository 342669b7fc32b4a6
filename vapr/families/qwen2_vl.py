"""Qwen2-VL: images of any size in a tower without a fixed one, and rotary positions in three axes (arXiv 2409.12191).

The layout of an image is its grid: patches in time, height and width. Its pixels are patches, (patches, values).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

from vapr.errors import UserError
from vapr.families.family import Family, ModelFiles
from vapr.families.processed_image import ProcessedImage, Run
from vapr.to_device import sent

SIZES = {"patch_size": "patch_size", "merge_size": "spatial_merge_size", "temporal_patch_size": "temporal_patch_size"}
"""Of the image processor, and what the vision config calls them."""


class Qwen2VL(Family):
    """Qwen2-VL."""

    model_type = "qwen2_vl"
    architecture = "Qwen2VLForConditionalGeneration"
    tower = ("visual",)
    projector: tuple[str, ...] = ("visual.merger",)
    image_processor = "Qwen2VLImageProcessor"
    position_axes = 3

    def check_files(self, files: ModelFiles) -> None:
        """Hold the sizes of the image processor's patches against the tower's."""
        for name, of_tower in SIZES.items():
            got, wanted = getattr(files.image_processor, name), getattr(files.config.vision_config, of_tower)
            if got != wanted:
                raise UserError(
                    f"{files.model}: the image processor's {name} is {got} but the vision tower's {of_tower} is "
                    f"{wanted} (config.json); in preprocessor_config.json set {name}: {wanted}"
                )

    def process(self, files: ModelFiles, image: Image.Image) -> tuple[np.ndarray, tuple[int, ...] | None]:
        """Return patches and grid."""
        out = files.image_processor(images=[image], return_tensors="np")
        return out["pixel_values"], tuple(int(n) for n in out["image_grid_thw"][0])

    def placeholder(self, files: ModelFiles, shape: tuple[int, ...], layout: tuple[int, ...] | None) -> int:
        """Return one for each square of patches that the projector merges."""
        assert layout is not None
        return int(np.prod(layout)) // _merged(files) ** 2

    def expected_tokens(self, files: ModelFiles, width: int, height: int) -> int:
        """Ask the image processor."""
        return int(files.image_processor.get_number_of_image_patches(height, width)) // _merged(files) ** 2

    def positions(
        self, files: ModelFiles, num_tokens: int, images: Sequence[ProcessedImage], runs: Sequence[Sequence[Run]]
    ) -> np.ndarray:
        """Return positions in time, height and width, (3, tokens): M-RoPE (arXiv 2409.12191, section 2.1).

        Text advances all three by one a token. An image's tokens take its grid's coordinates from where the text
        stopped, and the text goes on after the largest of them.
        """
        merged = _merged(files)
        positions = np.empty((3, num_tokens), np.int64)
        token, position = 0, 0
        for image, ((start, length),) in zip(images, runs, strict=True):
            assert image.layout is not None
            positions[:, token:start] = position + np.arange(start - token)
            position += start - token
            time, height, width = image.layout
            grid = np.indices((time, height // merged, width // merged)).reshape(3, -1)
            positions[:, start : start + length] = position + grid
            position += max(height, width) // merged
            token = start + length
        positions[:, token:] = position + np.arange(num_tokens - token)
        return positions

    def features(self, model: Any, pixels: Tensor, **arguments: Any) -> Tensor:
        """Run the tower over all patches at once."""
        features: Tensor = model.visual(pixels, **arguments).pooler_output
        return features

    def tower_arguments(self, model: Any, images: Sequence[ProcessedImage], device: torch.device) -> dict[str, Any]:
        """Return the sizes of images, and positions and bounds of the tower's attention."""
        grid = torch.tensor([image.layout for image in images])  # (images, 3)
        bounds = get_vision_cu_seqlens(grid)
        layout = {
            "grid_thw": grid,
            "position_ids": get_vision_position_ids(grid, model.visual.spatial_merge_size),
            "cu_seqlens": bounds,
        }
        longest = {"max_seqlen": int(bounds.diff().max())}
        return {name: sent(value, device) for name, value in layout.items()} | longest

    def inputs(self, images: Sequence[ProcessedImage], is_image: Tensor) -> dict[str, Any]:
        """Return patches, grids, and which tokens are placeholders: transformers' positions depend on it."""
        inputs: dict[str, Any] = {"mm_token_type_ids": is_image.int(), **super().inputs(images, is_image)}
        if images:
            inputs["image_grid_thw"] = torch.tensor([image.layout for image in images])
        return inputs

    def spare_image(self, config: Any) -> ProcessedImage:
        """Return an image of one token."""
        vision = config.vision_config
        side = vision.spatial_merge_size
        values = getattr(vision, "in_channels", 3) * vision.temporal_patch_size * vision.patch_size**2
        return ProcessedImage(torch.zeros(side * side, values), (1, side, side), 1, "spare")


def _merged(files: ModelFiles) -> int:
    return int(files.image_processor.merge_size)
