"""Gemma 3: a SigLIP tower, a fixed number of tokens an image that see one another both ways (arXiv 2503.19786).

Most layers of the language model see a window only, and those have rotary frequencies of their own. transformers' class
for images and text applies no soft-cap to logits, so a config that asks for one is refused.
"""

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vapr.errors import UserError
from vapr.families.family import Family, ModelFiles
from vapr.families.processed_image import Placeholder, ProcessedImage

SOFT_CAPS = ("final_logit_softcapping", "attn_logit_softcapping")
MARKS = ("boi_token", "image_token", "eoi_token")
"""Of a tokenizer: before an image, one of its placeholders, behind it."""


class Gemma3(Family):
    """Gemma 3 with images: 4B, 12B and 27B."""

    model_type = "gemma3"
    architecture = "Gemma3ForConditionalGeneration"
    tower = ("vision_tower",)
    projector = ("multi_modal_projector",)
    image_processor = "Gemma3ImageProcessor"
    image_options = MappingProxyType({"do_convert_rgb": True})  # as Gemma3Processor says, whatever stands in the file
    both_ways = True

    def refusal(self, config: Any) -> str | None:
        """Refuse soft-caps and text that sees later text."""
        text = config.get_text_config()
        if named := [name for name in SOFT_CAPS if getattr(text, name, None)]:
            return f"sets {named[0]}, which transformers' {self.architecture} does not apply; set it to null"
        if getattr(text, "use_bidirectional_attention", None):
            return "lets all tokens see later ones (use_bidirectional_attention), which nothing can predict"
        return super().refusal(config)

    def check_files(self, files: ModelFiles) -> None:
        """Hold the placeholders of an image against the features that the model makes of it."""
        _check(files)

    def written(self, files: ModelFiles) -> str:
        """Return the mark that Gemma3Processor puts a whole image in the place of."""
        return str(files.tokenizer.boi_token)

    def placeholder(self, files: ModelFiles, shape: tuple[int, ...], layout: tuple[int, ...] | None) -> Placeholder:
        """Return a run of placeholders between marks and empty lines, which may join line breaks of the text."""
        before, image, behind = (getattr(files.tokenizer, name) for name in MARKS)
        return Placeholder(f"\n\n{before}{image}{behind}\n\n", (_seq_length(files),))

    def expected_tokens(self, files: ModelFiles, width: int, height: int) -> Placeholder:
        """Return what every image gets."""
        return self.placeholder(files, (), None)

    def inputs(self, images: Sequence[ProcessedImage], is_image: Tensor) -> dict[str, Any]:
        """Return pixels, and which tokens are placeholders: those see one another both ways."""
        return {"token_type_ids": is_image.int(), **super().inputs(images, is_image)}

    def spare_image(self, config: Any) -> ProcessedImage:
        """Return a grey image of the tower's size."""
        vision = config.vision_config
        pixels = torch.zeros(1, vision.num_channels, vision.image_size, vision.image_size)
        return ProcessedImage(pixels, None, num_features(config), "spare")


def num_features(config: Any) -> int:
    """Return how many features the projector's pooling leaves of an image."""
    patches = config.vision_config.image_size // config.vision_config.patch_size  # of a side
    return int(patches // (patches // int(config.mm_tokens_per_image**0.5))) ** 2


def _seq_length(files: ModelFiles) -> int:
    return int(files.settings.get("image_seq_length", 256))


def _check(files: ModelFiles) -> None:
    model, config, tokenizer = files.model, files.config, files.tokenizer
    if absent := [name for name in MARKS if not getattr(tokenizer, name, None)]:
        raise UserError(f"{model}: tokenizer_config.json names no {' and no '.join(absent)}; Gemma 3's does")
    if tokenizer.image_token != files.image_token:
        raise UserError(
            f"{model}: the tokenizer's image_token is {tokenizer.image_token}, but image_token_index "
            f"({files.image_token_id}) in config.json is {files.image_token}; correct one of them"
        )
    if getattr(files.image_processor, "do_pan_and_scan", None):
        raise UserError(
            f"{model}: preprocessor_config.json sets do_pan_and_scan, which transformers' Gemma3Processor does not "
            "read there: at inference no crops would be made; set it to null"
        )
    side = config.vision_config.image_size
    pixels = files.image_processor(images=[Image.new("RGB", (side, side))], return_tensors="np")["pixel_values"]
    height, width = pixels[0].shape[-2:]
    if (height, width) != (side, side):
        raise UserError(
            f"{model}: the image processor gives {width} x {height} pixels but the vision tower takes {side} x {side}; "
            "correct size in preprocessor_config.json"
        )
    placeholders, features = _seq_length(files), num_features(config)
    if placeholders != features:
        raise UserError(
            f"{model}: an image gets {placeholders} tokens in the prompt but {features} features from the model; in "
            f"processor_config.json set image_seq_length: {features}"
        )
