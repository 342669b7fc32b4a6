"""LLaVA-1.5: a CLIP or SigLIP tower of one size, an MLP, and Llama or Vicuna (arXiv 2310.03744)."""

from typing import Any

import torch
from PIL import Image
from torch import nn

from vapr.errors import UserError
from vapr.families.family import Family, ModelFiles
from vapr.families.processed_image import ProcessedImage

EXTRA_FEATURES = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""Features a vision tower gives beside those of its patches."""


class Llava(Family):
    """LLaVA-1.5 and models of its kind."""

    model_type = "llava"
    architecture = "LlavaForConditionalGeneration"
    tower = ("vision_tower",)
    projector = ("multi_modal_projector",)
    image_processor = "CLIPImageProcessor"

    def check_files(self, files: ModelFiles) -> None:
        """Hold the placeholders of an image against the features that the model makes of it."""
        _check(files)

    def unused_layers(self, base: Any) -> list[nn.Module]:
        """Return CLIP's layers behind the one whose output is taken."""
        layers = [
            layer for module in base.model.vision_tower.modules() if isinstance(module, nn.ModuleList)
            for layer in module
        ]  # fmt: skip
        return layers[num_layers_used(base.config) :]

    def placeholder(self, files: ModelFiles, shape: tuple[int, ...], layout: tuple[int, ...] | None) -> int:
        """Count as LlavaProcessor does."""
        patch_size = files.settings.get("patch_size") or files.config.vision_config.patch_size
        return num_llava_tokens(files.settings, patch_size, *shape[-2:])

    def expected_tokens(self, files: ModelFiles, width: int, height: int) -> int:
        """Return what every image gets."""
        side = files.config.vision_config.image_size
        return self.placeholder(files, (side, side), None)

    def spare_image(self, config: Any) -> ProcessedImage:
        """Return a grey image of the tower's size."""
        vision = config.vision_config
        pixels = torch.zeros(1, vision.num_channels, vision.image_size, vision.image_size)
        return ProcessedImage(pixels, None, (vision.image_size // vision.patch_size) ** 2, "spare")


def num_layers_used(config: Any) -> int:
    """Return how many layers of the tower lead to its features."""
    return max(feature_layers(config))


def feature_layers(config: Any) -> list[int]:
    """Return of which layers the hidden states become features; number 0 is what goes into the first layer."""
    wanted, depth = config.vision_feature_layer, int(config.vision_config.num_hidden_layers)
    return [number % (depth + 1) for number in (wanted if isinstance(wanted, list | tuple) else [wanted])]


def num_llava_tokens(settings: dict[str, Any], patch_size: int, height: int, width: int) -> int:
    """Return how many placeholders an image gets by the rule of LlavaProcessor.

    One a patch and ``num_additional_image_tokens`` more, less one if the strategy is ``default``.
    """
    extra = settings.get("num_additional_image_tokens") or 0
    dropped = settings.get("vision_feature_select_strategy") == "default"
    return int((height // patch_size) * (width // patch_size) + extra - int(dropped))


def _check(files: ModelFiles) -> None:
    model, config, settings = files.model, files.config, files.settings
    vision = config.vision_config
    if (extra := EXTRA_FEATURES.get(vision.model_type)) is None:
        return
    side = vision.image_size
    height, width = files.image_processor(images=[Image.new("RGB", (side, side))], return_tensors="np")["pixel_values"][
        0
    ].shape[-2:]
    if (height, width) != (side, side):
        raise UserError(
            f"{model}: the image processor gives {width} x {height} pixels but the vision tower takes {side} x {side}; "
            "correct size and crop_size in preprocessor_config.json"
        )
    patch_size = settings.get("patch_size") or vision.patch_size
    strategy = config.vision_feature_select_strategy
    placeholders = num_llava_tokens(settings, patch_size, height, width)
    features = (side // vision.patch_size) ** 2 + extra - int(strategy == "default")
    if placeholders == features:
        return
    right = {
        "patch_size": vision.patch_size,
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": extra,
    }
    wrong = [
        f"{name}: {value} (it {'is ' + str(settings[name]) if settings.get(name) is not None else 'is absent'})"
        for name, value in right.items()
        if settings.get(name, {"patch_size": vision.patch_size, "num_additional_image_tokens": 0}.get(name)) != value
    ]
    raise UserError(
        f"{model}: an image gets {placeholders} tokens in the prompt but {features} features from the model "
        f"(config.json, vision_feature_select_strategy: {strategy}); in processor_config.json set {', '.join(wrong)}"
    )
