"""Idefics3: a picture as tiles of one size and a small copy of the whole, between marks (arXiv 2408.12637).

The pixels of an image are its tiles, (tiles, 3, side, side); its layout is rows and columns of tiles, 0 and 0 for a
picture that is not split. An image's tokens are a run for each tile, with marks of its row and column before it.
"""

from collections.abc import Sequence
from math import ceil
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vapr.errors import UserError
from vapr.families.family import Family, ModelFiles
from vapr.families.processed_image import Placeholder, ProcessedImage
from vapr.to_device import sent

LONGEST_SIDE = 4096
"""Of a picture that transformers' image processor splits."""

IMAGE_SEQ_LEN = 169
"""Tokens of a tile where processor_config.json does not say: the default of transformers' processors."""


class Idefics3(Family):
    """Idefics3."""

    model_type = "idefics3"
    architecture = "Idefics3ForConditionalGeneration"
    tower = ("vision_model",)
    projector = ("connector",)
    language_model = "text_model"
    image_processor = "Idefics3ImageProcessor"

    def marks(self, files: ModelFiles) -> tuple[str, str]:
        """Return the mark around an image, and that of the small copy."""
        return "<fake_token_around_image>", "<global-img>"

    def check_files(self, files: ModelFiles) -> None:
        """Hold the tokens of a tile against the features that the model makes of it, and the placeholder's id."""
        model, config = files.model, files.config
        if files.tokenizer.convert_tokens_to_ids("<image>") != files.image_token_id:
            raise UserError(
                f"{model}: the tokenizer's '<image>' is not token {files.image_token_id}, which config.json calls "
                "image_token_id; tokenizer and model do not belong together"
            )
        side = _tile_side(files)
        across, left = divmod(side // config.vision_config.patch_size, config.scale_factor)
        if left:
            raise UserError(
                f"{model}: tiles of {side} pixels are {side // config.vision_config.patch_size} patches wide, which "
                f"the model's scale_factor {config.scale_factor} does not divide; correct max_image_size in "
                "preprocessor_config.json"
            )
        if _tile_tokens(files) != across**2:
            raise UserError(
                f"{model}: a tile gets {_tile_tokens(files)} tokens in the prompt but {across**2} features from the "
                f"model; in processor_config.json set image_seq_len: {across**2}, or in preprocessor_config.json "
                f"max_image_size to what the model takes, {config.vision_config.image_size}"
            )

    def process(self, files: ModelFiles, image: Image.Image) -> tuple[np.ndarray, tuple[int, ...] | None]:
        """Return tiles, and their rows and columns."""
        out = files.image_processor(images=[[image]], return_row_col_info=True, return_tensors="np")
        tiles = np.asarray(out["pixel_values"])[0]
        # Tiles of one picture have one size, so nothing is padded; batches of pictures are, but vapr makes none.
        if not np.all(out.get("pixel_attention_mask", True)) or tiles.shape[-2:] != (_tile_side(files),) * 2:
            raise ValueError(f"its tiles are {tiles.shape[-1]} x {tiles.shape[-2]} pixels, not {_tile_side(files)}")
        return tiles, (int(out["rows"][0][0]), int(out["cols"][0][0]))

    def placeholder(self, files: ModelFiles, shape: tuple[int, ...], layout: tuple[int, ...] | None) -> Placeholder:
        """Write a run for each tile between marks, rows on lines of their own, and the small copy last."""
        assert layout is not None
        rows, columns = layout
        around, whole = self.marks(files)
        image = files.image_token
        lines = [
            "".join(f"{around}<row_{row + 1}_col_{column + 1}>{image}" for column in range(columns)) + "\n"
            for row in range(rows)
        ]
        text = "".join(lines) + ("\n" if rows else "") + f"{around}{whole}{image}{around}"
        return Placeholder(text, (_tile_tokens(files),) * (rows * columns + 1))

    def expected_tokens(self, files: ModelFiles, width: int, height: int) -> Placeholder:
        """Return what stands for the tiles that a picture of this size is split into."""
        layout = _grid(files.image_processor, width, height)
        return self.placeholder(files, (), layout)

    def tower_arguments(self, model: Any, images: Sequence[ProcessedImage], device: torch.device) -> dict[str, Any]:
        """Return the positions of a tile's patches in the table of position embeddings, (patches,)."""
        embeddings = model.vision_model.embeddings
        return {"positions": sent(_positions(embeddings, int(images[0].pixel_values.shape[-1])), device)}

    def features(self, model: Any, pixels: Tensor, **arguments: Any) -> Tensor:
        """Run tower and projector over all tiles.

        Module by module, because the tower's own forward asks the device which tiles and patches are padding, and the
        host would wait for the answer: none is.
        """
        tower = model.vision_model
        x = tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        x = x + tower.embeddings.position_embedding(arguments["positions"])
        x = tower.encoder(inputs_embeds=x, attention_mask=None).last_hidden_state
        features: Tensor = model.connector(tower.post_layernorm(x))
        return features.flatten(0, 1)

    def inputs(self, images: Sequence[ProcessedImage], is_image: Tensor) -> dict[str, Any]:
        """Return all tiles as those of one sequence: the model lays them end to end, whosesoever they are."""
        if not images:
            return {}
        pixels = torch.cat([image.pixel_values for image in images])
        mask = torch.ones(1, len(pixels), *pixels.shape[-2:], dtype=torch.int64)
        return {"pixel_values": pixels[None], "pixel_attention_mask": mask}

    def spare_image(self, config: Any) -> ProcessedImage:
        """Return a grey tile."""
        vision = config.vision_config
        pixels = torch.zeros(1, 3, vision.image_size, vision.image_size)
        return ProcessedImage(
            pixels, (0, 0), (vision.image_size // vision.patch_size // config.scale_factor) ** 2, "spare"
        )


def _positions(embeddings: Any, side: int) -> Tensor:
    """Return which position embedding each patch of a whole tile gets, (patches,), on the host.

    transformers' own code finds them, because its roundings differ between versions and dtypes: it runs over a tile of
    zeros, with parts in the place of the modules that would embed something.
    """
    dtype, across = embeddings.patch_embedding.weight.dtype, side // embeddings.patch_size
    asked: list[Tensor] = []

    def note(positions: Tensor) -> Tensor:
        asked.append(positions)
        return torch.zeros(1)

    parts = SimpleNamespace(
        patch_size=embeddings.patch_size,
        num_patches_per_side=embeddings.num_patches_per_side,
        patch_embedding=lambda pixels: torch.zeros(1, 1, across, across),
        position_embedding=note,
    )
    whole = torch.ones(1, across, across, dtype=torch.bool)
    type(embeddings).forward(parts, torch.zeros(1, 3, side, side, dtype=dtype), whole)
    return asked[0][0]


def _tile_side(files: ModelFiles) -> int:
    return int(files.image_processor.max_image_size["longest_edge"])


def _tile_tokens(files: ModelFiles) -> int:
    return int(files.settings.get("image_seq_len") or IMAGE_SEQ_LEN)


def _grid(image_processor: Any, width: int, height: int) -> tuple[int, int]:
    """Return rows and columns that a picture is split into.

    ``get_number_of_image_patches`` of the image processor does not say: it takes the shorter side as it was before the
    longer one was rounded up to whole tiles, which is another number where the largest size is no multiple of a tile's.
    """
    if not image_processor.do_image_splitting:
        return 0, 0
    tile = image_processor.max_image_size["longest_edge"]
    size = image_processor.size
    if image_processor.do_resize and size.get("longest_edge"):
        width, height = _scaled(width, height, size["longest_edge"], even=True)
        if max(width, height) > LONGEST_SIDE:
            width, height = _scaled(width, height, LONGEST_SIDE, even=False)
    elif image_processor.do_resize:
        width, height = size["width"], size["height"]
    ratio = width / height
    if width >= height:
        width = ceil(width / tile) * tile
        height = ceil(int(width / ratio) / tile) * tile
    else:
        height = ceil(height / tile) * tile
        width = ceil(int(height * ratio) / tile) * tile
    return (0, 0) if max(width, height) <= tile else (height // tile, width // tile)


def _scaled(width: int, height: int, longest: int, *, even: bool) -> tuple[int, int]:
    """Scale a size to its longest side; the other is rounded down, and up to an even number where ``even``."""
    ratio = width / height
    other = int(longest / ratio) if width >= height else int(longest * ratio)
    other = max(other + other % 2 if even else other, 1)
    return (longest, other) if width >= height else (other, longest)
