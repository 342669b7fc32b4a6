"""A tiny Gemma 3: windows narrower than a prompt, norms that are not 1, and line breaks that are one token."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
IMAGE_MARKS = ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
LINE_BREAKS = ["\n" * count for count in range(1, 9)]
"""Tokens of their own, as in Gemma's tokenizer."""

OWN_PIECES = len((*SPECIAL, *IMAGE_MARKS, *LINE_BREAKS)) + 256  # beside those that are trained; bytes among them

SPACE = "\u2581"

# As google/gemma-3-4b-it has it: a system message goes before the first turn's text, and texts lose outer white space.
GEMMA_TEMPLATE = (
    "{{ bos_token }}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- if messages[0]['content'] is string -%}{%- set first = messages[0]['content'] + '\n\n' -%}"
    "{%- else -%}{%- set first = messages[0]['content'][0]['text'] + '\n\n' -%}{%- endif -%}"
    "{%- set turns = messages[1:] -%}"
    "{%- else -%}{%- set first = '' -%}{%- set turns = messages -%}{%- endif -%}"
    "{%- for message in turns -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif -%}"
    "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}"
    "{%- if message['content'] is string -%}{{ message['content'] | trim }}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '<start_of_image>' }}"
    "{%- elif part['type'] == 'text' -%}{{ part['text'] | trim }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)


def build_tiny_gemma3(
    folder: Path, pieces: Iterable[str], merges: Iterable[tuple[str, str]], seed: int, sizes: dict[str, Any]
) -> None:
    """Write a random Gemma 3, its tokenizer, image processor and chat template into ``folder``.

    Args:
        folder: created.
        pieces: words and parts of words, in the order in which ``merges`` make them.
        merges: pairs of pieces that make another.
        seed: seed of the weights.
        sizes: of the text config.
    """
    tokenizer = _tokenizer(pieces, merges)
    torch.manual_seed(seed)
    model = _model(tokenizer, sizes)
    model.save_pretrained(folder)
    side = model.config.vision_config.image_size
    left_open: dict[str, Any] = {"do_convert_rgb": None, "do_pan_and_scan": None}  # as in Gemma's file
    transformers.Gemma3Processor(
        image_processor=transformers.Gemma3ImageProcessorPil(size={"height": side, "width": side}, **left_open),
        tokenizer=tokenizer,
        image_seq_length=model.config.mm_tokens_per_image,
        chat_template=GEMMA_TEMPLATE,
    ).save_pretrained(folder)


def _tokenizer(pieces: Iterable[str], merges: Iterable[tuple[str, str]]) -> transformers.PreTrainedTokenizerFast:
    """Build a tokenizer that treats text as Gemma's does: no mark before the first word, line breaks in one token."""
    known = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *LINE_BREAKS, *pieces]
    vocab = {piece: n for n, piece in enumerate(dict.fromkeys(known))}
    tokenizer = Tokenizer(models.BPE(vocab, list(merges), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    tokenizer.add_special_tokens([*SPECIAL, *IMAGE_MARKS])
    tokenizer.add_tokens([AddedToken(breaks, normalized=False) for breaks in LINE_BREAKS])
    marks = dict(zip(("boi_token", "eoi_token", "image_token"), IMAGE_MARKS, strict=True))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        pad_token="<pad>", mask_token="<mask>", extra_special_tokens=marks,
    )  # fmt: skip


def _model(tokenizer: transformers.PreTrainedTokenizerFast, sizes: dict[str, Any]) -> transformers.PreTrainedModel:
    ids = tokenizer.get_vocab()
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer), "head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 20,
        "layer_types": [("sliding_attention", "full_attention")[n % 3 == 1] for n in range(sizes["num_hidden_layers"])],
        "pad_token_id": ids["<pad>"], "bos_token_id": ids["<bos>"], "eos_token_id": ids["<eos>"], **sizes,
    }  # fmt: skip
    vision = transformers.SiglipVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=84, patch_size=14,
        vision_use_head=False,
    )  # fmt: skip
    ends: dict[str, Any] = {"eos_token_id": [ids["<eos>"], ids["<end_of_turn>"]]}
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**text), vision_config=vision.to_dict(), mm_tokens_per_image=9,
        boi_token_index=ids["<start_of_image>"], eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"], **ends,
    )  # fmt: skip
    model = transformers.Gemma3ForConditionalGeneration(config)
    with torch.no_grad():  # transformers begins with zeros, which would hide that 1 is added, and the images
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("mm_input_projection_weight"):
                parameter.add_(torch.randn(parameter.shape), alpha=0.15)
    return model
