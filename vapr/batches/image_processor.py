"""The model's image processor: how it is loaded, and how much of a picture it lets through.

Loaded by itself, because transformers cannot build Qwen's processor class where torchvision does not import.
"""

import importlib
from typing import Any

import transformers
from transformers.image_processing_base import ImageProcessingMixin

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
        named, _ = ImageProcessingMixin.get_image_processor_dict(model)
        if backend == "pil" and named.get("image_processor_type") in PIL_CLASSES:
            return pil_class(named["image_processor_type"]).from_pretrained(model)
        reason = one_line(error).split(". Should have")[0]
        raise UserError(
            f"{model}: transformers {transformers.__version__} does not load its image processor ({reason}); in "
            f"preprocessor_config.json set image_processor_type to {FAMILIES[family].image_processor}, or try another "
            "version of transformers"
        ) from None


PIL_CLASSES = {"Idefics3ImageProcessor": "idefics3", "SmolVLMImageProcessor": "smolvlm"}
"""Folders of the PIL classes that transformers 5.17 puts away where torchvision does not import.

It does so because the name of torchvision's class stands in their docstrings. They need nothing of it.
"""


def pil_class(name: str) -> Any:
    """Return the PIL class beside one of ``PIL_CLASSES``, from its module."""
    folder = PIL_CLASSES[name]
    module = importlib.import_module(f"transformers.models.{folder}.image_processing_pil_{folder}")
    return getattr(module, f"{name}Pil")


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
