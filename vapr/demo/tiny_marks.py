"""Tiny random policies of the families whose images stand between marks: of Idefics3's kind, and of Pixtral's."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

from vapr.batches.image_processor import pil_class
from vapr.demo.byte_tokenizer import byte_level_tokenizer

TILE_SPECIAL = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]

# As HuggingFaceTB/SmolVLM2-2.2B-Instruct has it, without videos; Idefics3's begins with its own BOS.
TILE_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def build_tiny_tiles(
    family: str, folder: Path, corpus: Iterable[str], *, seed: int, vocab_size: int, **sizes: Any
) -> None:
    """Write a random Idefics3 or SmolVLM, whose pictures become 2 x 2 tiles of 56 pixels at most and a small copy.

    As in the real ones, SmolVLM's marks of rows and columns are tokens, and Idefics3's are spelled.
    """
    smol = family == "smolvlm"
    begin = "<|im_start|>" if smol else "<|begin_of_text|>"
    pad = "<|im_end|>" if smol else "<|end_of_text|>"
    special = [begin, pad, *TILE_SPECIAL]
    more: dict[str, Any] = {}
    if smol:
        special += ["<global-img>", *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))]
        more["extra_special_tokens"] = {
            "fake_image_token": "<fake_token_around_image>", "image_token": "<image>",
            "global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>",
        }  # fmt: skip
    tokenizer = byte_level_tokenizer(
        corpus, vocab_size, special, begins_with=None if smol else begin,
        bos_token=begin, eos_token="<end_of_utterance>", pad_token=pad, **more,
    )  # fmt: skip
    ids = tokenizer.get_vocab()
    named: dict[str, Any] = {
        "bos_token_id": ids[begin], "eos_token_id": ids["<end_of_utterance>"], "pad_token_id": ids[pad]
    }  # fmt: skip
    text = transformers.LlamaConfig(vocab_size=len(tokenizer), **named, **sizes)
    vision = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 56, "patch_size": 14,
    }  # fmt: skip
    kind = "SmolVLM" if smol else "Idefics3"
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config=vision, image_token_id=ids["<image>"], scale_factor=2, pad_token_id=ids[pad]
    )
    torch.manual_seed(seed)
    getattr(transformers, f"{kind}ForConditionalGeneration")(config).save_pretrained(folder)
    tokenizer.chat_template = begin + TILE_TEMPLATE
    tokenizer.save_pretrained(folder)
    pil_class(f"{kind}ImageProcessor")(size={"longest_edge": 112}, max_image_size={"longest_edge": 56}).save_pretrained(
        folder
    )
    write_settings(folder, f"{kind}Processor", image_seq_len=4)


# As Mistral-Small-3.1 has it. mistral-community/pixtral-12b writes a system message into the last question.
ROW_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set begin, end = {'system': ('[SYSTEM_PROMPT]', '[/SYSTEM_PROMPT]'), 'user': ('[INST]', '[/INST]'), "
    "'assistant': ('', eos_token)}[message['role']] %}{{ begin }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}[IMG]{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ end }}{% endfor %}"
)
ROW_SPECIAL = [
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>", "[IMG]", "[IMG_BREAK]", "[IMG_END]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
]  # fmt: skip


def build_tiny_rows(
    family: str, folder: Path, corpus: Iterable[str], *, seed: int, vocab_size: int, **sizes: Any
) -> None:
    """Write a random LLaVA with Pixtral's tower (``llava_pixtral``), or a Mistral3 with one of two language models.

    ``mistral3`` has Mistral's, ``ministral3`` Ministral3's, whose queries grow after 32 tokens here. Pictures become
    6 x 6 tokens of a patch each at most, or 4 x 4 of 2 x 2 patches.
    """
    tokenizer = byte_level_tokenizer(
        corpus, vocab_size, ROW_SPECIAL, begins_with="<s>",
        bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
    )  # fmt: skip
    ids = tokenizer.get_vocab()
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer), "bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"],
        "pad_token_id": ids["<pad>"], "sliding_window": None, "head_dim": 32, "tie_word_embeddings": False, **sizes,
    }  # fmt: skip
    if family == "ministral3":
        far = {"original_max_position_embeddings": 32, "llama_4_scaling_beta": 0.3}
        yarn = {"rope_type": "yarn", "factor": 128.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0}
        text["rope_parameters"] = {"rope_theta": 1e6, "mscale_all_dim": 1.0, **yarn, **far}
    vision = transformers.PixtralVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=112,
        patch_size=14, hidden_act="silu",
    )  # fmt: skip
    named: dict[str, Any] = {"vision_config": vision, "image_token_index": ids["[IMG]"], "tie_word_embeddings": False}
    model: transformers.PreTrainedModel
    torch.manual_seed(seed)
    if family == "llava_pixtral":
        merged, longest = 1, 84
        model = transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                text_config=transformers.MistralConfig(**text),
                vision_feature_layer=-1,
                vision_feature_select_strategy="full",
                **named,
            )
        )
    else:
        merged, longest = 2, 112
        kind = transformers.Ministral3Config if family == "ministral3" else transformers.MistralConfig
        model = transformers.Mistral3ForConditionalGeneration(
            transformers.Mistral3Config(text_config=kind(**text), spatial_merge_size=merged, **named)
        )
    model.save_pretrained(folder)
    tokenizer.chat_template = ROW_TEMPLATE
    tokenizer.save_pretrained(folder)
    transformers.PixtralImageProcessorPil(size={"longest_edge": longest}, patch_size=14).save_pretrained(folder)
    write_settings(folder, "PixtralProcessor", patch_size=14, spatial_merge_size=merged)


def write_settings(folder: Path, processor: str, **settings: Any) -> None:
    """Add to processor_config.json what the processor's class keeps there, which not every environment can build."""
    path = folder / "processor_config.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**kept, "processor_class": processor, **settings}, indent=2) + "\n")
