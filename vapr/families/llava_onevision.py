"""LLaVA-OneVision: SigLIP, pictures cut into tiles where they stand alone, and Qwen2 (arXiv 2408.03326).

Of several pictures in a prompt each is padded to a square and taken as a whole. Where tiles have more features than
``anyres_max_N`` tiles would, these are scaled.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vapr.families.any_resolution import AnyResolution
from vapr.families.family import ModelFiles
from vapr.families.processed_image import ProcessedImage


class LlavaOnevision(AnyResolution):
    """LLaVA-OneVision."""

    model_type = "llava_onevision"
    architecture = "LlavaOnevisionForConditionalGeneration"
    image_processor = "LlavaOnevisionImageProcessor"
    differs_among_several = True

    def most_tiles(self, config: Any) -> int:
        """Read the N of ``anyres_max_N``."""
        return int(config.vision_aspect_ratio.removeprefix("anyres_max_"))

    def refusal(self, config: Any) -> str | None:
        """Refuse other ways to lay out tiles, which transformers does not have either."""
        if not config.vision_aspect_ratio.removeprefix("anyres_max_").isdecimal():
            return f"has vision_aspect_ratio: {config.vision_aspect_ratio}; it must be anyres_max_ and a number"
        return super().refusal(config)

    def wrong_settings(self, files: ModelFiles) -> dict[str, Any]:
        """Hold the numbers that LlavaOnevisionProcessor counts with against the model's."""
        settings, config = files.settings, files.config
        patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        dropped = settings.get("vision_feature_select_strategy") == "default"
        wrong: dict[str, Any] = {}
        if settings.get("num_image_tokens") != patches + int(dropped):
            strategy = config.vision_feature_select_strategy
            wrong["num_image_tokens"] = patches + int(strategy == "default")
            wrong["vision_feature_select_strategy"] = strategy
        if settings.get("vision_aspect_ratio", "anyres_max_9") != config.vision_aspect_ratio:
            wrong["vision_aspect_ratio"] = config.vision_aspect_ratio
        return wrong

    def process_one_of_several(
        self, files: ModelFiles, image: Image.Image
    ) -> tuple[np.ndarray, tuple[int, ...] | None]:
        """Return the whole picture alone, and its size."""
        beside = Image.new("RGB", (1, 1))  # the image processor counts the pictures of a prompt
        out = files.image_processor(images=[[image, beside]], return_tensors="np")
        return out["pixel_values"][0], (image.height, image.width)

    def expected_tokens_of_one_of_several(self, files: ModelFiles, width: int, height: int) -> int:
        """Return what every such image gets."""
        return self.packing(files.config, 1, (height, width)).num_tokens

    def inputs(self, images: Sequence[ProcessedImage], is_image: Tensor) -> dict[str, Any]:
        """Tell pictures that stand alone from those among others."""
        inputs = super().inputs(images, is_image)
        if images:
            numbers: list[int] = []
            for has_tiles, group in groupby(len(image.pixel_values) > 1 for image in images):
                number = len(list(group))
                numbers += [1] * number if has_tiles else [number]
            inputs["batch_num_images"] = torch.tensor(numbers)
        return inputs
