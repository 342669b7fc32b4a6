"""LLaVA with Pixtral's tower: pictures of any size, and marks at the ends of their rows (arXiv 2410.07073).

The layout of an image is its height and width in pixels. Its pixels are patches in rows, (patches, 3 * side * side):
pictures of different sizes have no other axis along which they could be laid end to end, and transformers, which stacks
them, pads each to the highest and the widest. An image's tokens are a run for each row.
"""

from collections.abc import Sequence
from math import floor
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vapr.errors import UserError
from vapr.families.family import Family, ModelFiles
from vapr.families.llava import feature_layers
from vapr.families.processed_image import Placeholder, ProcessedImage
from vapr.to_device import sent

PATCH_SIZE = 16
"""Of the processor where processor_config.json does not say: the default of transformers' class."""


class Pixtral(Family):
    """LLaVA's projector and Mistral's language model behind Pixtral's tower."""

    model_type = "llava"
    architecture = "LlavaForConditionalGeneration"
    tower = ("vision_tower",)
    projector = ("multi_modal_projector",)
    image_processor = "PixtralImageProcessor"
    attends_by_image = True

    def merged(self, config: Any) -> int:
        """Return how many patches the projector merges into one token, on a side."""
        return 1

    def refusal(self, config: Any) -> str | None:
        """Refuse windows: Mistral's attention has one unless its config says null."""
        if getattr(config.get_text_config(), "sliding_window", None):
            return "uses sliding-window attention, which packing does not support"
        return super().refusal(config)

    def check_files(self, files: ModelFiles) -> None:
        """Hold patches and marks of the processor against the model's and the tokenizer's."""
        model, config, settings = files.model, files.config, files.settings
        right = {"patch_size": config.vision_config.patch_size, "spatial_merge_size": self.merged(config)}
        usual = {"patch_size": PATCH_SIZE, "spatial_merge_size": 1}
        for name, value in right.items():
            if (found := settings.get(name, usual[name])) != value:
                raise UserError(
                    f"{model}: the processor's {name} is {found} but the model's is {value}; in processor_config.json "
                    f"set {name}: {value}"
                )
        if getattr(config, "vision_feature_select_strategy", "full") != "full":
            raise UserError(
                f"{model}: config.json leaves out a feature (vision_feature_select_strategy: "
                f"{config.vision_feature_select_strategy}), but Pixtral's tower has none that is no patch's; set full"
            )
        unknown = files.tokenizer.unk_token_id
        for name, mark in (("image_token", files.settings.get("image_token", "[IMG]")), *_marks(files).items()):
            number = files.tokenizer.convert_tokens_to_ids(mark)
            if number is None or number == unknown:
                raise UserError(f"{model}: the tokenizer has no '{mark}', the processor's {name}")
            if name == "image_token" and number != files.image_token_id:
                raise UserError(
                    f"{model}: the processor's image_token '{mark}' is token {number}, but config.json says "
                    f"image_token_index: {files.image_token_id}; tokenizer and model do not belong together"
                )

    def process(self, files: ModelFiles, image: Image.Image) -> tuple[np.ndarray, tuple[int, ...] | None]:
        """Return patches in rows, and height and width."""
        side = files.config.vision_config.patch_size
        unit = side * self.merged(files.config)
        out = files.image_processor(images=[image], patch_size=unit, return_tensors="np")
        pixels = np.asarray(out["pixel_values"])[0]
        height, width = pixels.shape[-2:]
        if height % unit or width % unit or not height * width:
            raise ValueError(f"it becomes {width} x {height} pixels, which are no squares of {unit}")
        patches = pixels.reshape(3, height // side, side, width // side, side).transpose(1, 3, 0, 2, 4)
        return patches.reshape(-1, 3 * side * side), (height, width)

    def placeholder(self, files: ModelFiles, shape: tuple[int, ...], layout: tuple[int, ...] | None) -> Placeholder:
        """Write a run for each row, with a mark after it."""
        assert layout is not None
        unit = files.config.vision_config.patch_size * self.merged(files.config)
        height, width = (side // unit for side in layout)
        marks = _marks(files)
        rows = [files.image_token] * height
        text = marks["image_break_token"].join(rows) + marks["image_end_token"]
        return Placeholder(text, (width,) * height)

    def expected_tokens(self, files: ModelFiles, width: int, height: int) -> Placeholder | int:
        """Scale a size down as the image processor does, and up to whole tokens."""
        size = files.image_processor.size
        most = (size.get("longest_edge") or size["height"], size.get("longest_edge") or size["width"])
        ratio = max(height / most[0], width / most[1])
        if ratio > 1:
            height, width = floor(height / ratio), floor(width / ratio)
        unit = files.config.vision_config.patch_size * self.merged(files.config)
        if not height * width:  # refused when it is processed
            return 0
        return self.placeholder(files, (), (-(-height // unit) * unit, -(-width // unit) * unit))

    def tower_arguments(self, model: Any, images: Sequence[ProcessedImage], device: torch.device) -> dict[str, Any]:
        """Return heights and widths, rows and columns of patches, and where images begin and end."""
        sizes = [image.layout for image in images if image.layout is not None]
        side = model.vision_tower.patch_size
        grids = [torch.cartesian_prod(torch.arange(h // side), torch.arange(w // side)) for h, w in sizes]
        lengths = tuple(len(grid) for grid in grids)
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        return {
            "sizes": sizes,
            "position_ids": sent(torch.cat(grids), device),  # (patches, 2)
            "bounds": (sent(bounds, device), lengths),
        }

    def features(self, model: Any, pixels: Tensor, **arguments: Any) -> Tensor:
        """Run tower and projector over the patches of all images as one sequence, each image attending to itself.

        Layer by layer: the tower's own forward wants whole pictures of one size, and makes a mask of all pairs of
        patches.
        """
        tower = model.vision_tower
        side = tower.patch_size
        # Patches are handed over as pictures of one patch each.
        x = tower.ln_pre(tower.patch_conv(pixels.view(-1, 3, side, side)).flatten(1)[None])
        tables = tower.patch_positional_embedding(x, arguments["position_ids"])
        wanted = feature_layers(model.config)
        states = [x]
        for layer in tower.transformer.layers[: max(wanted)]:
            states.append(layer(states[-1], None, position_embeddings=tables, bounds=arguments["bounds"]))
        return self.projected(model, torch.cat([states[number] for number in wanted], dim=-1)[0], arguments["sizes"])

    def projected(self, model: Any, features: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        """Run the projector on features of patches, (patches, width), of images of these heights and widths."""
        projected: Tensor = model.multi_modal_projector(features)
        return projected

    def inputs(self, images: Sequence[ProcessedImage], is_image: Tensor) -> dict[str, Any]:
        """Return pictures padded to the highest and the widest of them, and their sizes."""
        if not images:
            return {}
        sizes = [image.layout for image in images if image.layout is not None]
        highest, widest = (max(lengths) for lengths in zip(*sizes, strict=True))
        pictures = images[0].pixel_values.new_zeros(len(images), 3, highest, widest)
        for picture, image, (height, width) in zip(pictures, images, sizes, strict=True):
            side = int((image.pixel_values.shape[1] // 3) ** 0.5)
            patches = image.pixel_values.view(height // side, width // side, 3, side, side)
            picture[:, :height, :width] = patches.permute(2, 0, 3, 1, 4).reshape(3, height, width)
        return {"pixel_values": pictures, "image_sizes": torch.tensor(sizes)}

    def spare_image(self, config: Any) -> ProcessedImage:
        """Return an image of one token."""
        patches, side = self.merged(config), config.vision_config.patch_size
        pixels = torch.zeros(patches**2, 3 * side * side)
        return ProcessedImage(pixels, (patches * side, patches * side), 1, "spare")


def _marks(files: ModelFiles) -> dict[str, str]:
    usual = {"image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
    return {name: str(files.settings.get(name) or mark) for name, mark in usual.items()}
