"""Tiny random policies of real architecture, with real tokenizers, image processors and chat templates.

Built from configuration, without a download: the demo trains one, the tests and benchmarks use every family.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from vapr.cache import give_ordinary_permissions
from vapr.demo import tiny_qwen3_vl
from vapr.demo.byte_tokenizer import byte_level_tokenizer
from vapr.demo.tiny_gemma3 import OWN_PIECES, build_tiny_gemma3
from vapr.demo.tiny_marks import build_tiny_rows, build_tiny_tiles
from vapr.demo.tiny_tiled import TILED, TILED_SPECIAL, write_tiled

QWEN_SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
QWEN_IMAGES = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
LLAMA_SPECIAL = ["<unk>", "<s>", "</s>"]
SPACE = "\u2581"  # SentencePiece writes this mark where a word starts

QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As llava-hf/llava-1.5-7b-hf has it: a turn ends with a space, and no end of sequence is written.
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def build_tiny_policy(
    family: str, folder: Path, corpus: Iterable[str], *, seed: int = 0, vocab_size: int = 1000,
    vision: Mapping[str, int] | None = None, position_scale: float = 1.0, **sizes: Any,
) -> Path:  # fmt: skip
    """Write a random model of a family, its tokenizer, image processor and chat template into ``folder``.

    Args:
        family: one that ``vapr.families`` names, or ``ministral3`` for a Mistral3 with that language model.
        folder: created; loads with ``from_pretrained``.
        corpus: lines the tokenizer is trained on.
        seed: seed of the weights.
        vocab_size: size of the tokenizer's vocabulary, special tokens included.
        vision: of families other than Qwen2-VL and Qwen2.5-VL, entries that replace those of the vision config, such as
            ``patch_size``.
        position_scale: of ``llava`` and Qwen3-VL, factor on the tower's initial position embeddings. CLIP's are about
            1/40 of what a patch of even colour gives, so that a model of few steps does not learn where in the picture
            something is.
        sizes: entries that replace those of the text config, such as ``hidden_size``.

    Returns:
        ``folder``.
    """
    sizes = {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, **sizes,
    }  # fmt: skip
    if family in OTHERS:
        OTHERS[family](family, folder, corpus, seed=seed, vocab_size=vocab_size, **sizes)
    else:
        tokenizer = _train_tokenizer(family, corpus, vocab_size)
        text = {"vocab_size": len(tokenizer), **sizes}
        torch.manual_seed(seed)
        if family in TILED:
            write_tiled(family, folder, tokenizer, text, vision or {})
        elif family == "llava":
            _write_llava(folder, tokenizer, text, vision or {}, position_scale)
        else:
            _write_qwen(family, folder, tokenizer, text, vision or {}, position_scale)
    give_ordinary_permissions(folder / "model.safetensors")
    return folder


def _build_gemma3(
    family: str, folder: Path, corpus: Iterable[str], *, seed: int, vocab_size: int, **sizes: Any
) -> None:
    build_tiny_gemma3(folder, *train_pieces(corpus, vocab_size - OWN_PIECES), seed, sizes)


OTHERS = {
    "idefics3": build_tiny_tiles, "smolvlm": build_tiny_tiles,
    "llava_pixtral": build_tiny_rows, "mistral3": build_tiny_rows, "ministral3": build_tiny_rows,
    "gemma3": _build_gemma3,
}  # fmt: skip
"""Builders of the families that have a file of their own."""


def _write_llava(
    folder: Path, tokenizer: transformers.PreTrainedTokenizerFast, text: dict[str, Any], vision: Mapping[str, int],
    position_scale: float,
) -> None:  # fmt: skip
    model = _llava(tokenizer, text, vision)
    with torch.no_grad():
        model.model.vision_tower.embeddings.position_embedding.weight.mul_(position_scale)
    model.save_pretrained(folder)
    side = model.config.vision_config.image_size
    transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
        tokenizer=tokenizer,
        patch_size=model.config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    ).save_pretrained(folder)


def _write_qwen(
    family: str, folder: Path, tokenizer: transformers.PreTrainedTokenizerFast, text: dict[str, Any],
    vision: Mapping[str, int], position_scale: float,
) -> None:  # fmt: skip
    if family.startswith("qwen3_vl"):
        model = tiny_qwen3_vl.tiny_qwen3_vl(family, _qwen_marks(tokenizer), {**text, **_qwen_ends(tokenizer)}, vision)
        with torch.no_grad():
            model.model.visual.pos_embed.weight.mul_(position_scale)
        pictures: Any = tiny_qwen3_vl.image_processor(model.config.vision_config)
    else:
        model = _qwen(family, tokenizer, text)
        pictures = transformers.Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=112 * 112)
    model.save_pretrained(folder)
    tokenizer.chat_template = QWEN_TEMPLATE
    tokenizer.save_pretrained(folder)
    pictures.save_pretrained(folder)


def _train_tokenizer(family: str, corpus: Iterable[str], vocab_size: int) -> transformers.PreTrainedTokenizerFast:
    if family in ("llava", "llava_next"):
        return _train_llama(corpus, vocab_size)
    if family in TILED:
        return _train_qwen(corpus, vocab_size, TILED_SPECIAL[family])
    return _train_qwen(corpus, vocab_size)


def _train_qwen(
    corpus: Iterable[str], vocab_size: int, special: Mapping[str, str] = QWEN_IMAGES
) -> transformers.PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with Qwen's special tokens; those of ``special`` have names."""
    return byte_level_tokenizer(
        corpus, vocab_size, [*QWEN_SPECIAL, *(token for token in special.values() if token not in QWEN_SPECIAL)],
        eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=dict(special),
    )  # fmt: skip


def _train_llama(corpus: Iterable[str], vocab_size: int) -> transformers.PreTrainedTokenizerFast:
    """Train a tokenizer of SentencePiece's kind, in which a mark begins each word and bytes spell unknown letters."""
    trained, merges = train_pieces(corpus, vocab_size - len(LLAMA_SPECIAL) - 256 - len(("<image>", "<pad>")))
    pieces = [*LLAMA_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *trained]
    return llama_tokenizer({piece: n for n, piece in enumerate(pieces)}, merges)


def train_pieces(corpus: Iterable[str], size: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Train BPE as SentencePiece does, and return pieces and merges in order."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    # While training only: a piece is part of one word or a mark, and no piece holds a line break.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "removed"),
            pre_tokenizers.Split(SPACE, "merged_with_next"),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False)
    tokenizer.train_from_iterator((f" {line}" for line in corpus), trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    return sorted(trained["vocab"], key=trained["vocab"].__getitem__), [tuple(pair) for pair in trained["merges"]]


def llama_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]) -> transformers.PreTrainedTokenizerFast:
    """Build a tokenizer of given pieces that treats text as llava-hf's does; ``<image>`` and ``<pad>`` come last."""
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    tokenizer.add_special_tokens(["<image>", "<pad>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="<pad>", extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def _llava(
    tokenizer: transformers.PreTrainedTokenizerFast, text: dict[str, Any], vision_sizes: Mapping[str, int]
) -> transformers.PreTrainedModel:
    sizes: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
        "image_size": 56, "patch_size": 14, **vision_sizes,
    }  # fmt: skip
    vision = transformers.CLIPVisionConfig(**sizes)
    ids = tokenizer.get_vocab()
    special: dict[str, Any] = {"bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"], "pad_token_id": ids["<pad>"]}
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**special, **text),
        image_token_index=ids["<image>"],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return transformers.LlavaForConditionalGeneration(config)


def _qwen(
    family: str, tokenizer: transformers.PreTrainedTokenizerFast, text: dict[str, Any]
) -> transformers.PreTrainedModel:
    half = text["hidden_size"] // text["num_attention_heads"] // 2  # rotary pairs of a head, split over three axes
    sections = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]
    mrope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    text_config = {**text, "rope_parameters": mrope, **_qwen_ends(tokenizer)}
    special: dict[str, Any] = _qwen_marks(tokenizer)
    patches: dict[str, Any] = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    if family == "qwen2_vl":
        sizes = {"depth": 2, "embed_dim": 64, "hidden_size": text["hidden_size"], "num_heads": 4, "mlp_ratio": 2}
        vision = {**sizes, **patches}
        return transformers.Qwen2VLForConditionalGeneration(
            transformers.Qwen2VLConfig(text_config=text_config, vision_config=vision, **special)
        )
    vision = {
        "depth": 3, "hidden_size": 64, "intermediate_size": 128, "out_hidden_size": text["hidden_size"], "num_heads": 4,
        "window_size": 56, "fullatt_block_indexes": [2], "tokens_per_second": 2, **patches,
    }  # fmt: skip
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config=text_config, vision_config=vision, **special)
    )


def _qwen_ends(tokenizer: transformers.PreTrainedTokenizerFast) -> dict[str, int | None]:
    ids = tokenizer.get_vocab()
    return {"bos_token_id": None, "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}


def _qwen_marks(tokenizer: transformers.PreTrainedTokenizerFast) -> dict[str, int]:
    ids = tokenizer.get_vocab()
    marks = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    marks |= {f"vision_{end}_token_id": f"<|vision_{end}|>" for end in ("start", "end")}
    return {name: ids[mark] for name, mark in marks.items()}
