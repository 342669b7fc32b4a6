"""InternVL 3 and 3.5 in Hugging Face's form: InternViT, pictures cut into tiles, Qwen2 or Qwen3 (arXiv 2504.10479).

Pixels of an image are tiles, (tiles, channels, height, width), and behind several tiles the whole picture, scaled to
one. Each has as many features; those of an image stand in one run between marks.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vapr.errors import UserError
from vapr.families.family import Family, ModelFiles
from vapr.families.llava import num_layers_used
from vapr.families.processed_image import Placeholder, ProcessedImage

CUT = {"crop_to_patches": True}
"""What InternVLProcessor asks of the image processor, whatever that one's own settings say."""


class InternVL(Family):
    """InternVL."""

    model_type = "internvl"
    architecture = "InternVLForConditionalGeneration"
    tower = ("vision_tower",)
    projector = ("multi_modal_projector",)
    image_processor = "GotOcr2ImageProcessor"

    def refusal(self, config: Any) -> str | None:
        """Refuse features of several layers of the tower, which transformers refuses later."""
        if not isinstance(config.vision_feature_layer, int):
            return "reads several layers of its vision tower, which is not supported"
        return super().refusal(config)

    def check_files(self, files: ModelFiles) -> None:
        """Hold tiles, their placeholders and the marks around them against the model's."""
        model, config, tokenizer = files.model, files.config, files.tokenizer
        for name in ("start_image_token", "end_image_token", "context_image_token"):
            if not getattr(tokenizer, name, None):
                raise UserError(f"{model}: the tokenizer names no {name}; add it to tokenizer_config.json")
        if tokenizer.context_image_token_id != config.image_token_id:
            raise UserError(
                f"{model}: the tokenizer's '{tokenizer.context_image_token}' has the number "
                f"{tokenizer.context_image_token_id} but config.json has image_token_id: {config.image_token_id}"
            )
        height, width = config.vision_config.image_size
        grey = Image.new("RGB", (width, height))
        found = files.image_processor(images=[grey], return_tensors="np", **CUT)["pixel_values"].shape[-2:]
        if tuple(found) != (height, width):
            raise UserError(
                f"{model}: the image processor gives tiles of {found[1]} x {found[0]} pixels but the vision tower "
                f"takes {width} x {height}; correct size in preprocessor_config.json"
            )
        features = features_of_a_tile(config)
        if (placeholders := _placeholders_of_a_tile(files)) != features:
            raise UserError(
                f"{model}: a tile gets {placeholders} tokens in the prompt but {features} features from the model; "
                f"in processor_config.json set image_seq_length: {features}"
            )

    def unused_layers(self, base: Any) -> list[nn.Module]:
        """Return the tower's layers behind the one whose output is taken."""
        return list(base.model.vision_tower.encoder.layer)[num_layers_used(base.config) :]

    def process(self, files: ModelFiles, image: Image.Image) -> tuple[np.ndarray, tuple[int, ...] | None]:
        """Return tiles."""
        return files.image_processor(images=[image], return_tensors="np", **CUT)["pixel_values"], None

    def placeholder(
        self, files: ModelFiles, shape: tuple[int, ...], layout: tuple[int, ...] | None
    ) -> Placeholder | int:
        """Return a run for all tiles, between marks."""
        marks = files.tokenizer.start_image_token, files.tokenizer.end_image_token
        return Placeholder(files.image_token.join(marks), (shape[0] * _placeholders_of_a_tile(files),))

    def expected_tokens(self, files: ModelFiles, width: int, height: int) -> int:
        """Ask the image processor."""
        return int(files.image_processor.get_number_of_image_patches(height, width, CUT)) * _placeholders_of_a_tile(
            files
        )

    def features(self, model: Any, pixels: Tensor, **arguments: Any) -> Tensor:
        """Run tower and projector over all tiles at once."""
        features: Tensor = model.get_image_features(pixels).pooler_output
        return features.flatten(0, 1)

    def spare_image(self, config: Any) -> ProcessedImage:
        """Return a grey tile."""
        pixels = torch.zeros(1, config.vision_config.num_channels, *config.vision_config.image_size)
        return ProcessedImage(pixels, None, features_of_a_tile(config), "spare")


def features_of_a_tile(config: Any) -> int:
    """Return how many features the model makes of a tile: of patches, squares of which are joined, and a class token.

    The class token is left out if the strategy is ``default``.
    """
    patches = _patches_of_a_tile(config) + int(config.vision_feature_select_strategy != "default")
    return int(patches * config.downsample_ratio**2)


def _patches_of_a_tile(config: Any) -> int:
    (height, width), (down, across) = config.vision_config.image_size, config.vision_config.patch_size
    return int((height // down) * (width // across))


def _placeholders_of_a_tile(files: ModelFiles) -> int:
    return int(files.settings.get("image_seq_length", 256))
