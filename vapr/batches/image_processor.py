"""The model's image processor: how it is loaded, and how much of a picture it lets through.

Loaded by itself, because transformers cannot build Qwen's processor class where torchvision does not import.
"""

from typing import Any

import transformers

# From its module: where torchvision does not import, transformers 5.17 puts an object that refuses in its place.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from vapr.errors import UserError, one_line
from vapr.families import FAMILIES


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
        options = FAMILIES[family].image_options
        return AutoImageProcessor.from_pretrained(model, backend=backend, trust_remote_code=False, **options)
    except ValueError as error:
        reason = one_line(error).split(". Should have")[0]
        raise UserError(
            f"{model}: transformers {transformers.__version__} does not load its image processor ({reason}); in "
            f"preprocessor_config.json set image_processor_type to {FAMILIES[family].image_processor}, or try another "
            "version of transformers"
        ) from None


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
