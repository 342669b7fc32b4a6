"""The model's image processor: how it is loaded, whether it fits the model, and how much of a picture it lets through.

Loaded by itself, because transformers cannot build Qwen's processor class where torchvision does not import.
"""

from typing import Any

import transformers
from PIL import Image

# From its module: where torchvision does not import, transformers 5.17 puts an object that refuses in its place.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from vapr.errors import UserError, one_line

CLASSES = {"llava": "CLIPImageProcessor"}
QWEN_CLASS = "Qwen2VLImageProcessor"
EXTRA_FEATURES = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""Features a vision tower gives beside those of its patches."""


def resolve_backend(wanted: str) -> str:
    """``pil`` or ``torchvision``; ``auto`` is torchvision where it imports.

    Raises:
        UserError: if torchvision is wanted and does not import.
    """
    if wanted == "pil":
        return wanted
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        if wanted == "torchvision":
            raise UserError(f"data.image_backend: torchvision does not import ({one_line(error)})") from None
        return "pil"
    return "torchvision"


def load_image_processor(model: str, family: str, backend: str) -> Any:
    """Open the image processor that ``AutoImageProcessor`` makes of a model's files.

    Raises:
        UserError: if it knows no class for them.
        OSError: if there are none.
    """
    try:
        return AutoImageProcessor.from_pretrained(model, backend=backend, trust_remote_code=False)
    except ValueError as error:
        reason = one_line(error).split(". Should have")[0]
        raise UserError(
            f"{model}: transformers {transformers.__version__} does not load its image processor ({reason}); in "
            f"preprocessor_config.json set image_processor_type to {CLASSES.get(family, QWEN_CLASS)}, or try another "
            "version of transformers"
        ) from None


def num_llava_tokens(settings: dict[str, Any], patch_size: int, height: int, width: int) -> int:
    """Placeholders of an image by the rule of LlavaProcessor.

    One a patch and ``num_additional_image_tokens`` more, less one if the strategy is ``default``.
    """
    extra = settings.get("num_additional_image_tokens") or 0
    dropped = settings.get("vision_feature_select_strategy") == "default"
    return (height // patch_size) * (width // patch_size) + extra - int(dropped)


def check_llava(model: str, config: Any, settings: dict[str, Any], image_processor: Any) -> None:
    """Hold the placeholders of an image against the features that the model makes of it.

    Args:
        model: folder or hub id, for the message.
        config: the model's transformers config.
        settings: what processor_config.json holds.
        image_processor: the model's.

    Raises:
        UserError: if they differ, naming the setting.
    """
    vision = config.vision_config
    if (extra := EXTRA_FEATURES.get(vision.model_type)) is None:
        return
    side = vision.image_size
    height, width = image_processor(images=[Image.new("RGB", (side, side))], return_tensors="np")["pixel_values"][
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


def seen_box(image_processor: Any, width: int, height: int) -> tuple[int, int, int, int]:
    """The part of a picture that the image processor's centre crop leaves: left, top, right, bottom in pixels."""
    crop = getattr(image_processor, "crop_size", None)
    if not getattr(image_processor, "do_center_crop", False) or getattr(image_processor, "do_pad", False) or not crop:
        return 0, 0, width, height
    size = image_processor.size
    scale = size["shortest_edge"] / min(width, height) if size.get("shortest_edge") else None
    across = crop["width"] / (scale or size["width"] / width)
    down = crop["height"] / (scale or size["height"] / height)
    left, top = (max(round((whole - part) / 2), 0) for whole, part in ((width, across), (height, down)))
    return left, top, width - left, height - top
