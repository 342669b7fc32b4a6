"""Tiny random Qwen3-VLs, dense and with experts; their tokenizer and chat template are those of the tiny Qwen2-VLs."""

from collections.abc import Mapping
from typing import Any

import transformers

SIDES = {"shortest_edge": 64 * 64, "longest_edge": 128 * 128}
"""Smallest and largest picture, in pixels."""


def tiny_qwen3_vl(
    family: str, special: dict[str, Any], text: dict[str, Any], vision_sizes: Mapping[str, int]
) -> transformers.PreTrainedModel:
    """Build a model with random weights.

    Args:
        family: ``qwen3_vl`` or ``qwen3_vl_moe``; of the latter's three layers the second has no experts.
        special: ids of image, video and the marks around them, as the config names them.
        text: entries of the text config, token ids included.
        vision_sizes: entries that replace those of the vision config.
    """
    head = text["hidden_size"] // text["num_attention_heads"]
    pairs = head // 2  # of a head's rotary planes, every third is for height and every third for width
    rotary: dict[str, Any] = {
        "rope_type": "default", "rope_theta": 10000.0, "mrope_interleaved": True,
        "mrope_section": [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3],
    }  # fmt: skip
    text = {"rope_parameters": rotary, "head_dim": head, **text}
    vision: dict[str, Any] = {
        "depth": 3, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "patch_size": 16,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 1], "out_hidden_size": text["hidden_size"],
        "initializer_range": text.get("initializer_range", 0.02), **vision_sizes,
    }  # fmt: skip
    if family == "qwen3_vl":
        return transformers.Qwen3VLForConditionalGeneration(
            transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **special)
        )
    experts: dict[str, Any] = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "mlp_only_layers": [1],
    }
    return transformers.Qwen3VLMoeForConditionalGeneration(
        transformers.Qwen3VLMoeConfig(text_config={**experts, **text}, vision_config=vision, **special)
    )


def image_processor(vision: Any) -> Any:
    """Return the image processor that fits a vision config."""
    return transformers.Qwen2VLImageProcessorPil(
        size=SIDES, patch_size=vision.patch_size, merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size, image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
