"""Qwen3-VL, dense and with a mixture of experts: features go into the first decoder layers as well (DeepStack).

Its tower resamples learned position embeddings to each image's grid (arXiv 2511.21631); DeepStack is arXiv 2406.04334.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from vapr.families.processed_image import ProcessedImage
from vapr.families.qwen2_vl import Qwen2VL
from vapr.to_device import sent


class Qwen3VL(Qwen2VL):
    """Qwen3-VL."""

    model_type = "qwen3_vl"
    architecture = "Qwen3VLForConditionalGeneration"
    projector = ("visual.merger", "visual.deepstack_merger_list")

    def refusal(self, config: Any) -> str | None:
        """Refuse a decoder without a layer behind those that get features of their own."""
        if (layers := config.get_text_config().num_hidden_layers) <= (deep := self.num_deep(config)):
            return f"adds image features after {deep} decoder layers, and needs more than its {layers} layers for that"
        return super().refusal(config)

    def tower_arguments(self, model: Any, images: Sequence[ProcessedImage], device: torch.device) -> dict[str, Any]:
        """Add which position embeddings each patch is resampled from, and their weights."""
        arguments, tower = super().tower_arguments(model, images, device), model.visual
        embeddings, weights = get_vision_interpolation_indices_and_weights(
            torch.tensor([image.layout for image in images]), tower.num_grid_per_side, tower.interpolation_mode,
            tower.interpolation_align_corners, tower.spatial_merge_size,
        )  # fmt: skip
        arguments["interp_indices"], arguments["interp_weights"] = sent(embeddings, device), sent(weights, device)
        return arguments

    def features(self, model: Any, pixels: Tensor, **arguments: Any) -> Tensor:
        """Run the tower over all patches at once: pooled features, and beside them those of deeper layers."""
        out = model.visual(pixels, **arguments)
        return torch.cat([out.pooler_output, *out.deepstack_features], dim=1)

    def num_deep(self, config: Any) -> int:
        """Return as many as there are blocks of the tower whose outputs are used."""
        return len(config.vision_config.deepstack_visual_indexes)

    def tower_width(self, vision: Any) -> int:
        """Return the width of the tower's residual stream."""
        return int(vision.hidden_size)


class Qwen3VLMoe(Qwen3VL):
    """Qwen3-VL whose decoder has a mixture of experts in most layers.

    Which experts a token gets is a choice: of two that tie but for rounding, a packed and a padded pass may take
    different ones, and then differ by more than rounding.
    """

    model_type = "qwen3_vl_moe"
    architecture = "Qwen3VLMoeForConditionalGeneration"
    # transformers tells from a parameter's shape whether to transpose experts, and ZeRO 3 has emptied it.
    original_format = False

    def notes(self, *, adapted: Sequence[str]) -> list[str]:
        """Say what adapters leave as it is, and that routing has no loss of its own."""
        notes = ["the router's auxiliary loss is off: experts are balanced by nothing but the loss below"]
        if adapted:
            notes.append(
                f"adapters reach the linear layers {', '.join(adapted)}; experts and routers are single parameters and "
                "stay as they are (without policy.lora they are trained)"
            )
        return notes
