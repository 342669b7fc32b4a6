"""What vapr asks of a model family. Its defaults are those of a family like LLaVA: one run of placeholders an image.

A family is a class with the name of its transformers class and of its modules, and with methods that say where it
differs from :class:`Family`. docs/families.md shows how one is added.

D = hidden size of the language model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from vapr.families.processed_image import Placeholder, ProcessedImage, Run

WINDOW_IN_EVERY_LAYER = ("mistral", "ministral3")
"""Language models whose ``sliding_window``, if there is one, is every layer's; others say so layer by layer."""


@dataclass(frozen=True)
class ModelFiles:
    """What a model's files say of how it takes images."""

    model: str  # folder or hub id, for messages
    config: Any  # config.json
    settings: dict[str, Any]  # processor_config.json
    image_processor: Any
    tokenizer: Any

    @cached_property
    def image_token_id(self) -> int:
        """Return the id of the placeholder whose embedding a feature replaces."""
        return int(self.config.image_token_id)

    @cached_property
    def image_token(self) -> str:
        """Return that placeholder."""
        return str(self.tokenizer.convert_ids_to_tokens(self.image_token_id))


class Family:
    """A model family: its modules, its placeholders, and what its tower takes."""

    model_type: str
    """As config.json names it."""

    architecture: str
    """The class of transformers that generates text."""

    tower: tuple[str, ...]
    """Modules of the vision tower, by their names under ``model``; those of the projector may lie inside."""

    projector: tuple[str, ...]
    """Modules between tower and language model."""

    language_model: str = "language_model"
    """The decoder."""

    image_processor: str
    """The class that a model without ``image_processor_type`` is told to name."""

    image_options: Mapping[str, Any] = MappingProxyType({})
    """What the family's processor class tells its image processor, whatever the model's files say."""

    position_axes: int = 1
    """Rows of rotary positions: 1, or 3 for time, height and width."""

    attends_by_image: bool = False
    """Whether :meth:`features` tells the tower's attention where images begin and end, by the keyword ``bounds``."""

    both_ways: bool = False
    """Whether the tokens of an image, run by run, see one another both ways. No two runs may lie side by side."""

    original_format: bool = True
    """Whether transformers, when it saves a model, undoes what it changed of its weights when it loaded them."""

    @property
    def model_class(self) -> Any:
        """Return the class of transformers."""
        return getattr(transformers, self.architecture)

    differs_among_several: bool = False
    """Whether an image is taken otherwise where a prompt shows several."""

    # Files.

    def refusal(self, config: Any) -> str | None:
        """Return why a model of this family cannot be trained, to follow its name; None: it can."""
        text = config.get_text_config()
        kinds = getattr(text, "layer_types", None) or []
        if other := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
            return f"has layers whose attention packing does not support ({', '.join(other)})"
        if getattr(text, "sliding_window", None) and not kinds and text.model_type not in WINDOW_IN_EVERY_LAYER:
            return "has a sliding_window in config.json but no layer_types that say which layers it is for"
        return None

    def windows(self, config: Any) -> list[int | None]:
        """Return how many tokens up to its own a token sees in each layer of the language model; None: all."""
        text = config.get_text_config()
        if text.model_type in WINDOW_IN_EVERY_LAYER:
            return [text.sliding_window] * text.num_hidden_layers
        kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
        return [text.sliding_window if kind == "sliding_attention" else None for kind in kinds]

    def check_files(self, files: ModelFiles) -> None:
        """Hold the processor's files against the model. Raises UserError if they do not fit."""

    # Modules.

    def modules(self, base: Any, names: tuple[str, ...]) -> list[nn.Module]:
        """Return modules of a model by their names."""
        return [base.model.get_submodule(name) for name in names]

    def decoder(self, base: Any) -> Any:
        """Return the language model without its head."""
        return base.model.get_submodule(self.language_model)

    def part_of(self, name: str) -> str:
        """Return the part that a parameter belongs to: language_model, projector or vision_tower."""
        if name.startswith(tuple(f"model.{module}." for module in self.projector)):
            return "projector"
        if name.startswith(tuple(f"model.{module}." for module in self.tower)):
            return "vision_tower"
        return "language_model"

    def unused_layers(self, base: Any) -> list[nn.Module]:
        """Return layers of the tower whose outputs nobody reads."""
        return []

    def notes(self, *, adapted: Sequence[str]) -> list[str]:
        """Return lines on what a run trains that its user may not expect.

        Args:
            adapted: names of the linear layers that have adapters, without their places; empty: there are none.
        """
        return []

    # Images in a prompt.

    def written(self, files: ModelFiles) -> str:
        """Return what the chat template writes for an image."""
        return files.image_token

    def process(self, files: ModelFiles, image: Image.Image) -> tuple[np.ndarray, tuple[int, ...] | None]:
        """Return an image's pixels (rows, ...) and its layout. Raises ValueError if the image processor refuses it."""
        return files.image_processor(images=[image], return_tensors="np")["pixel_values"], None

    def process_one_of_several(
        self, files: ModelFiles, image: Image.Image
    ) -> tuple[np.ndarray, tuple[int, ...] | None]:
        """Return what :meth:`process` does, for an image among others; asked only where that differs."""
        return self.process(files, image)

    def placeholder(
        self, files: ModelFiles, shape: tuple[int, ...], layout: tuple[int, ...] | None
    ) -> Placeholder | int:
        """Return what stands for an image with pixels of ``shape`` in a prompt; a number: so many placeholders."""
        raise NotImplementedError

    def expected_tokens(self, files: ModelFiles, width: int, height: int) -> Placeholder | int:
        """Return what :meth:`placeholder` will return for an image of this size, without processing it."""
        raise NotImplementedError

    def expected_tokens_of_one_of_several(self, files: ModelFiles, width: int, height: int) -> Placeholder | int:
        """Return what :meth:`expected_tokens` does, for an image among others; asked only where that differs."""
        return self.expected_tokens(files, width, height)

    def positions(
        self, files: ModelFiles, num_tokens: int, images: Sequence[ProcessedImage], runs: Sequence[Sequence[Run]]
    ) -> np.ndarray:
        """Return the rotary positions of a sequence, (3, tokens) int64; with one axis all three are equal.

        Args:
            files: of the model.
            num_tokens: of the sequence.
            images: in it.
            runs: of placeholders, for each image.
        """
        return np.tile(np.arange(num_tokens), (3, 1))

    # The tower.

    def tower_arguments(self, model: Any, images: Sequence[ProcessedImage], device: torch.device) -> dict[str, Any]:
        """Return what :meth:`features` takes beside pixels: what layouts say, computed on the host, tensors sent.

        What a tower computes of sizes on the device itself, the host waits for.
        """
        return {}

    def features(self, model: Any, pixels: Tensor, **arguments: Any) -> Tensor:
        """Run tower and projector.

        Args:
            model: the ``model`` of the class of transformers.
            pixels: of the images, laid end to end, on the model's device.
            arguments: what :meth:`tower_arguments` returned.

        Returns:
            Features laid end to end, one a placeholder: (tokens, D), or several times D if some go into deeper layers
            (:meth:`num_deep`).
        """
        return torch.cat(list(model.get_image_features(pixels).pooler_output))

    def num_deep(self, config: Any) -> int:
        """Return how many layers of the language model get features of their own, the first ones in order."""
        return 0

    def inputs(self, images: Sequence[ProcessedImage], is_image: Tensor) -> dict[str, Any]:
        """Return what transformers' own model takes for images, beside ids and mask.

        Args:
            images: of all sequences, in order; may be empty.
            is_image: which tokens are placeholders, (B, T) bool.
        """
        return {"pixel_values": torch.cat([image.pixel_values for image in images])} if images else {}

    def spare_image(self, config: Any) -> ProcessedImage:
        """Return the smallest grey image that the tower takes."""
        raise NotImplementedError
