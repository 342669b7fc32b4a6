"""LLaVA's pictures of any resolution: the whole picture and its tiles, whose features are laid out as the picture is.

A picture is scaled into the best of several canvases of whole tiles. The tiles, and the picture scaled to one tile, go
through the tower. The tiles' features are put together again, what lies on the canvas' bars is cut off, and a newline
feature ends each row ("dynamic high resolution" of LLaVA-NeXT).

An image's pixels are (tiles, channels, side, side), the whole picture first; its layout is its height and width.

P = features of a tile, D = hidden size of the language model.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image
from transformers.utils import output_capturing

from vapr.errors import UserError
from vapr.families.family import ModelFiles
from vapr.families.llava import EXTRA_FEATURES, Llava
from vapr.families.processed_image import ProcessedImage
from vapr.to_device import sent
from vapr_kernels import gather_rows
from vapr_kernels.gather_rows import RowIndex

KEEPS_WHAT_IS_WANTED = hasattr(output_capturing, "select_hidden_states")
"""Whether a tower can be asked for some of its hidden states; in transformers 5.17 it keeps all or none."""


@dataclass(frozen=True, slots=True, eq=False)
class TilePacking:
    """Which features stand for an image, as rows of the features of its tiles laid end to end."""

    whole: int  # P: the first tile's features are taken as they are
    rows: Tensor | None  # (height, width) int64: those of the other tiles, laid out as the picture; None: no other tile
    scaled: tuple[int, int] | None  # height and width to which these are scaled; None: they are not

    @property
    def num_tokens(self) -> int:
        """Return how many features there are, newlines included."""
        if self.rows is None:
            return self.whole + 1
        height, width = self.scaled or self.rows.shape
        return self.whole + height * (width + 1)


@dataclass(frozen=True, slots=True, eq=False)
class Scaling:
    """One image's features that are scaled: their rows (height x width,), and sizes before and after."""

    rows: Tensor
    before: tuple[int, int]
    after: tuple[int, int]


class AnyResolution(Llava):
    """What LLaVA-NeXT and LLaVA-OneVision have in common."""

    def refusal(self, config: Any) -> str | None:
        """Refuse towers other than CLIP and SigLIP, too."""
        if reason := super().refusal(config):
            return reason
        if (kind := config.vision_config.model_type) not in EXTRA_FEATURES:
            return f"has a vision tower of type {kind}, which is not supported; {' and '.join(EXTRA_FEATURES)} are"
        if EXTRA_FEATURES[kind] - (config.vision_feature_select_strategy == "default") != 0:
            return (
                f"has vision_feature_select_strategy: {config.vision_feature_select_strategy}, with which a tile of a "
                f"{kind} has not one feature a patch"
            )
        return None

    def part_of(self, name: str) -> str:
        """Count the newline feature as a part of the projector, among whose outputs it stands."""
        return "projector" if name == "model.image_newline" else super().part_of(name)

    def check_files(self, files: ModelFiles) -> None:
        """Hold tiles, canvases and the number of placeholders against the model's."""
        model, config = files.model, files.config
        side = config.vision_config.image_size
        canvases = [tuple(canvas) for canvas in files.image_processor.image_grid_pinpoints]
        if canvases != [tuple(canvas) for canvas in config.image_grid_pinpoints]:
            raise UserError(
                f"{model}: image_grid_pinpoints of preprocessor_config.json and of config.json differ, and so would "
                "placeholders and features; make them equal"
            )
        if odd := [canvas for canvas in canvases if canvas[0] % side or canvas[1] % side]:
            height, width = odd[0]
            raise UserError(
                f"{model}: image_grid_pinpoints holds {height} x {width}, which {side} x {side} pixels, a tile of the "
                "vision tower, do not divide; correct it in config.json and preprocessor_config.json"
            )
        height, width = _pixels(files, [Image.new("RGB", (side, side))])[0].shape[-2:]
        if (height, width) != (side, side):
            raise UserError(
                f"{model}: the image processor gives tiles of {width} x {height} pixels but the vision tower takes "
                f"{side} x {side}; correct size and crop_size in preprocessor_config.json"
            )
        if wrong := self.wrong_settings(files):
            named = ", ".join(f"{name}: {value}" for name, value in wrong.items())
            raise UserError(
                f"{model}: an image would get another number of placeholders in the prompt than features from the "
                f"model; in processor_config.json set {named}"
            )

    def wrong_settings(self, files: ModelFiles) -> dict[str, Any]:
        """Return the entries of processor_config.json that must change, as they must be."""
        raise NotImplementedError

    def most_tiles(self, config: Any) -> int | None:
        """Return how many tiles' features a picture has at most, beside the whole picture's; None: no such number."""
        return None

    def process(self, files: ModelFiles, image: Image.Image) -> tuple[np.ndarray, tuple[int, ...] | None]:
        """Return the whole picture and its tiles, and its size."""
        return _pixels(files, [image])[0], (image.height, image.width)

    def placeholder(self, files: ModelFiles, shape: tuple[int, ...], layout: tuple[int, ...] | None) -> int:
        """Return one for each feature, newlines included."""
        return self.packing(files.config, shape[0], layout).num_tokens

    def expected_tokens(self, files: ModelFiles, width: int, height: int) -> int:
        """Count without making tiles, of which there are at least one beside the whole picture."""
        return self.packing(files.config, 2, (height, width)).num_tokens

    def packing(self, config: Any, num_tiles: int, layout: tuple[int, ...] | None) -> TilePacking:
        """Lay out the features of an image of this size; with one tile it is the whole picture alone."""
        assert layout is not None
        side = config.vision_config.image_size // config.vision_config.patch_size
        whole = side * side
        if num_tiles == 1:
            return TilePacking(whole, None, None)
        canvas = select_best_resolution(layout, config.image_grid_pinpoints)
        down, across = (length // config.vision_config.image_size for length in canvas)
        rows = whole + torch.arange(down * across * whole).view(down, across, side, side)
        rows = rows.transpose(1, 2).reshape(1, down * side, across * side)
        rows = unpad_image(rows, layout)[0]
        height, width = rows.shape
        if (most := self.most_tiles(config)) is not None:
            ratio = math.sqrt(height * width / (most * whole))
            if ratio > 1.1:
                return TilePacking(whole, rows, (int(height // ratio), int(width // ratio)))
        return TilePacking(whole, rows, None)

    def tower_arguments(self, model: Any, images: Sequence[ProcessedImage], device: torch.device) -> dict[str, Any]:
        """Return which row each feature is: of the tiles' features, the newline, then those that are scaled."""
        packings = [self.packing(model.config, len(image.pixel_values), image.layout) for image in images]
        num_tiles = [len(image.pixel_values) for image in images]
        whole = packings[0].whole
        newline = sum(num_tiles) * whole
        num_rows, first = newline + 1, 0
        parts: list[Tensor] = []
        scalings = []
        for packing, tiles in zip(packings, num_tiles, strict=True):
            parts.append(first + torch.arange(whole))
            # Without tiles there is a row of nothing, which a newline ends.
            rows = torch.empty(1, 0, dtype=torch.int64) if packing.rows is None else first + packing.rows
            if packing.scaled is not None:
                scalings.append(Scaling(sent(rows.flatten(), device), (rows.shape[0], rows.shape[1]), packing.scaled))
                height, width = packing.scaled
                rows = num_rows + torch.arange(height * width).view(height, width)
                num_rows += height * width
            parts.append(F.pad(rows, (0, 1), value=newline).flatten())
            first += tiles * whole
        index = RowIndex.build(torch.cat(parts), num_rows)
        rows, order, starts = (sent(x, device) for x in (index.rows, index.order, index.starts))
        return {"index": RowIndex(rows, num_rows, order, starts), "scalings": scalings}

    def features(self, model: Any, pixels: Tensor, **arguments: Any) -> Tensor:
        """Run tower and projector over all tiles at once, and put their features together."""
        features = _tile_features(model, pixels).flatten(0, 1)
        rows = [features, model.image_newline[None].to(features.dtype)]
        for scaling in arguments["scalings"]:
            picture = features.index_select(0, scaling.rows).view(1, *scaling.before, -1).permute(0, 3, 1, 2)
            rows.append(F.interpolate(picture, scaling.after, mode="bilinear")[0].flatten(1).T)
        return gather_rows(torch.cat(rows), arguments["index"])

    def inputs(self, images: Sequence[ProcessedImage], is_image: Tensor) -> dict[str, Any]:
        """Return tiles, and the sizes of the pictures."""
        inputs = super().inputs(images, is_image)
        if images:
            inputs["image_sizes"] = torch.tensor([image.layout for image in images])
        return inputs

    def spare_image(self, config: Any) -> ProcessedImage:
        """Return a grey picture without tiles."""
        vision = config.vision_config
        side = vision.image_size
        pixels = torch.zeros(1, vision.num_channels, side, side)
        return ProcessedImage(pixels, (side, side), (side // vision.patch_size) ** 2 + 1, "spare")


def _pixels(files: ModelFiles, images: Sequence[Any]) -> np.ndarray:
    pixels: np.ndarray = files.image_processor(images=images, return_tensors="np")["pixel_values"]
    return pixels


def _tile_features(model: Any, pixels: Tensor) -> Tensor:
    """Return what the projector makes of tiles, (tiles, P, D)."""
    config = model.config
    wanted = config.vision_feature_layer
    layers = [wanted] if isinstance(wanted, int) else list(wanted)
    kept: Any = layers if KEEPS_WHAT_IS_WANTED else True
    hidden = model.vision_tower(pixels, output_hidden_states=kept, return_dict=True).hidden_states
    features = torch.cat([hidden[layer] for layer in layers], dim=-1)
    if config.vision_feature_select_strategy == "default":
        features = features[:, 1:]
    projected: Tensor = model.multi_modal_projector(features)
    return projected
