"""The six models of the paper as they are published, without weights: sizes and pixels are theirs, the tokenizer is not.

Sizes are those of each model's ``config.json`` on the hub. The pieces of the real tokenizers cannot be had here, so a
small one is trained, and the ids of special tokens are its own.
"""

import json
from pathlib import Path
from typing import Any

import transformers

from vapr.demo.tiny_policy import build_tiny_policy

VOCABULARY = [
    "a", "photo", "of", "the", "dog", "on", "red", "mat", "what", "is", "doing", "it", "sleeps",
    "blue", "how", "many", "colour", "where", "yes", "no",
]  # fmt: skip


def _text(hidden: int, inter: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": inter, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocab, **more,
    }  # fmt: skip


VICUNA = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
QWEN2 = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
QWEN2_5 = {**QWEN2, "max_position_embeddings": 128000}
CLIP_336 = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
}  # fmt: skip
QWEN_PATCHES = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 16, "depth": 32}
QWEN2_TOWER = {**QWEN_PATCHES, "embed_dim": 1280, "mlp_ratio": 4}
QWEN2_5_TOWER = {
    **QWEN_PATCHES, "hidden_size": 1280, "intermediate_size": 3420, "window_size": 112, "tokens_per_second": 2,
    "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip

# Family, text, vision, tied embeddings, and how many parameters the hub counts.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any], bool, int]] = {
    "llava-hf/llava-1.5-7b-hf": (
        "llava", _text(4096, 11008, 32, 32, 32, 32064, **VICUNA), CLIP_336, False, 7_063_427_072,
    ),
    "llava-hf/llava-1.5-13b-hf": (
        "llava", _text(5120, 13824, 40, 40, 40, 32064, **VICUNA), CLIP_336, False, 13_351_494_656,
    ),
    "Qwen/Qwen2-VL-2B-Instruct": (
        "qwen2_vl", _text(1536, 8960, 28, 12, 2, 151936, **QWEN2), {**QWEN2_TOWER, "hidden_size": 1536}, True, 2_208_985_600,
    ),
    "Qwen/Qwen2-VL-7B-Instruct": (
        "qwen2_vl", _text(3584, 18944, 28, 28, 4, 152064, **QWEN2), {**QWEN2_TOWER, "hidden_size": 3584}, False, 8_291_375_616,
    ),
    "Qwen/Qwen2.5-VL-3B-Instruct": (
        "qwen2_5_vl", _text(2048, 11008, 36, 16, 2, 151936, **QWEN2_5), {**QWEN2_5_TOWER, "out_hidden_size": 2048}, True, 3_754_622_976,
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": (
        "qwen2_5_vl", _text(3584, 18944, 28, 28, 4, 152064, **QWEN2_5), {**QWEN2_5_TOWER, "out_hidden_size": 3584}, False, 8_292_166_656,
    ),
}  # fmt: skip


def write_model(name: str, folder: Path) -> Path:
    """Write configuration, tokenizer and image processor of a model, and no weights; returns ``folder``."""
    family, text, vision, tied, _ = MODELS[name]
    build_tiny_policy(family, folder, VOCABULARY)
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())  # with the ids of this tokenizer's special tokens
    ids = {key: value for key, value in config["text_config"].items() if key.endswith("_token_id")}
    rope = {"rope_type": "default", "rope_theta": text["rope_theta"]}
    if family != "llava":
        rope["mrope_section"] = [16, 24, 24]
    kept = {"model_type": config["text_config"]["model_type"], **ids}
    config["text_config"] = {**kept, **text, "rope_parameters": rope, "tie_word_embeddings": tied}
    config["vision_config"] = {"model_type": config["vision_config"]["model_type"], **vision}
    config["tie_word_embeddings"] = tied
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    _write_pixels(family, folder)
    return folder


def _write_pixels(family: str, folder: Path) -> None:
    """Write how a picture becomes pixels: a square of 336 for LLaVA; Qwen's as many as it has, up to 12.8 million."""
    if family == "llava":
        file = folder / "processor_config.json"
        settings = json.loads(file.read_text())
        settings["image_processor"] |= {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
        file.write_text(json.dumps(settings))
    else:
        transformers.Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 16384).save_pretrained(folder)
