"""Tiny random policies of the families that cut pictures into tiles: LLaVA-NeXT, LLaVA-OneVision and InternVL."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from vapr.cache import give_ordinary_permissions

TILED = ("llava_next", "llava_onevision", "internvl")
"""``text_model`` in ``sizes`` takes another language model than the first named."""

TILED_SPECIAL = {
    "llava_onevision": {"image_token": "<image>", "video_token": "<video>"},
    "internvl": {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
}  # fmt: skip
"""Special tokens with their names, beside Qwen's."""

# As llava-hf/llava-v1.6-mistral-7b-hf has it: images come first, and an answer follows a space.
LLAVA_NEXT_TEMPLATE = (
    "{% for message in messages %}{% set texts = message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% if message['role'] == 'system' %}<<SYS>>\n{{ message['content'][0]['text'] }}\n<</SYS>>\n\n"
    "{% elif message['role'] == 'user' %}[INST] "
    "{% for image in message['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for part in texts %}{{ part['text'] }}{% endfor %} [/INST]"
    "{% else %} {{ message['content'][0]['text'] }}</s> {% endif %}{% endfor %}"
)
# As llava-hf/llava-onevision-qwen2-0.5b-ov-hf has it: before an answer stands a space that is not there when it is
# asked for, and between two turns stands nothing.
LLAVA_ONEVISION_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + ' ' }}"
    "{% for image in message['content'] | selectattr('type', 'equalto', 'image') %}<image>{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + part['text'] }}{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As OpenGVLab/InternVL3-1B-hf has it: a line a picture, wherever it stands.
INTERNVL_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SIDE, PATCH = 56, 14
TOWER = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": SIDE, "patch_size": PATCH,
}  # fmt: skip
CANVASES = [[SIDE * down, SIDE * across] for down, across in ((1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1))]


def write_tiled(
    family: str, folder: Path, tokenizer: transformers.PreTrainedTokenizerFast, text: Mapping[str, Any],
    vision: Mapping[str, int],
) -> Path:  # fmt: skip
    """Write what :func:`vapr.demo.tiny_policy.build_tiny_policy` does of a family of :data:`TILED`; return the folder.

    ``text_model``, an entry of ``text``, is a language model that the family comes with.
    """
    write = {"llava_next": _llava_next, "llava_onevision": _llava_onevision, "internvl": _internvl}[family]
    model = write(folder, tokenizer, dict(text), {**TOWER, **vision})
    model.save_pretrained(folder)
    give_ordinary_permissions(folder / "model.safetensors")
    return folder


def _text(model: str, tokenizer: transformers.PreTrainedTokenizerFast, sizes: Mapping[str, Any]) -> Any:
    special = {
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    more: dict[str, Any] = {}
    if model == "mistral":
        more = {"sliding_window": None}
    if model in ("mistral", "qwen3"):
        more["head_dim"] = sizes["hidden_size"] // sizes["num_attention_heads"]
    return transformers.AutoConfig.for_model(model, **special, **more, **sizes)


def _llava_next(
    folder: Path, tokenizer: transformers.PreTrainedTokenizerFast, text: dict[str, Any], vision: dict[str, Any]
) -> transformers.PreTrainedModel:
    text_model, side = text.pop("text_model", "mistral"), vision["image_size"]
    transformers.LlavaNextProcessor(
        image_processor=transformers.LlavaNextImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_grid_pinpoints=CANVASES
        ),
        tokenizer=tokenizer, patch_size=vision["patch_size"], vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=LLAVA_NEXT_TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**{**vision, "num_hidden_layers": vision["num_hidden_layers"] + 1}),
        text_config=_text(text_model, tokenizer, text), image_token_index=tokenizer.get_vocab()["<image>"],
        image_grid_pinpoints=CANVASES, vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    return transformers.LlavaNextForConditionalGeneration(config)


def _llava_onevision(
    folder: Path, tokenizer: transformers.PreTrainedTokenizerFast, text: dict[str, Any], vision: dict[str, Any]
) -> transformers.PreTrainedModel:
    text_model, side, ids = text.pop("text_model", "qwen2"), vision["image_size"], tokenizer.get_vocab()
    canvases: dict[str, Any] = {"image_grid_pinpoints": CANVASES}
    aspect = "anyres_max_2"  # so that the features of four tiles are scaled
    _write_files(
        folder, tokenizer, LLAVA_ONEVISION_TEMPLATE,
        transformers.LlavaOnevisionImageProcessorPil(size={"height": side, "width": side}, **canvases),
        {
            "processor_class": "LlavaOnevisionProcessor", "num_image_tokens": (side // vision["patch_size"]) ** 2,
            "vision_feature_select_strategy": "full", "vision_aspect_ratio": aspect,
        },
    )  # fmt: skip
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(vision_use_head=False, **vision),
        text_config=_text(text_model, tokenizer, text), tie_word_embeddings=True,
        image_token_index=ids["<image>"], video_token_index=ids["<video>"], vision_aspect_ratio=aspect, **canvases,
    )  # fmt: skip
    return transformers.LlavaOnevisionForConditionalGeneration(config)


def _internvl(
    folder: Path, tokenizer: transformers.PreTrainedTokenizerFast, text: dict[str, Any], vision: dict[str, Any]
) -> transformers.PreTrainedModel:
    text_model, side = text.pop("text_model", "qwen2"), vision["image_size"]
    num_tokens = (side // vision["patch_size"]) ** 2 // 4
    _write_files(
        folder, tokenizer, INTERNVL_TEMPLATE,
        transformers.GotOcr2ImageProcessorPil(size={"height": side, "width": side}, max_patches=4),
        {"processor_class": "InternVLProcessor", "image_seq_length": num_tokens},
    )  # fmt: skip
    config = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(attention_bias=True, **vision),
        text_config=_text(text_model, tokenizer, text), tie_word_embeddings=False,
        image_token_id=tokenizer.get_vocab()["<IMG_CONTEXT>"], image_seq_length=num_tokens,
    )  # fmt: skip
    model = transformers.InternVLForConditionalGeneration(config)
    embeddings: Any = model.model.vision_tower.embeddings
    for weight in (embeddings.cls_token, embeddings.position_embeddings):  # zero, which a trained model's are not
        torch.nn.init.normal_(weight, std=0.1)
    return model


def _write_files(
    folder: Path, tokenizer: transformers.PreTrainedTokenizerFast, template: str, image_processor: Any,
    settings: Mapping[str, Any],
) -> None:  # fmt: skip
    """Write what a processor of these families would: without torchvision, transformers makes none."""
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(settings, indent=2))
