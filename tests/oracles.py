"""Independent ways to the same numbers: untouched Hugging Face processors and models, one sequence at a time."""

import importlib
import json
import sys
import types
import unittest.mock
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from torch import Tensor

from tests import tiled
from vapr.batches.image_processor import pil_class
from vapr.batches.packing import PackedBatch
from vapr.batches.tokenize import TokenPath
from vapr.families.processed_image import ProcessedImage, places
from vapr.model.policy import Policy

CLASSES = {
    "llava": transformers.LlavaForConditionalGeneration,
    "qwen2_vl": transformers.Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": transformers.Qwen3VLForConditionalGeneration,
    "qwen3_vl_moe": transformers.Qwen3VLMoeForConditionalGeneration,
    "idefics3": transformers.Idefics3ForConditionalGeneration,
    "smolvlm": transformers.SmolVLMForConditionalGeneration,
    "llava_pixtral": transformers.LlavaForConditionalGeneration,
    "mistral3": transformers.Mistral3ForConditionalGeneration,
    "ministral3": transformers.Mistral3ForConditionalGeneration,
    **tiled.CLASSES,
    "gemma3": transformers.Gemma3ForConditionalGeneration,
}

PIXTRAL = ("llava_pixtral", "mistral3", "ministral3")
"""Families with Pixtral's tower; ministral3 is a Mistral3 with that language model."""

END_OF_TURN = {
    "idefics3": "<end_of_utterance>\n", "smolvlm": "<end_of_utterance>\n",
    "llava_next": "</s>  ", "llava_onevision": "<|im_end|>", "gemma3": "<end_of_turn>\n",
    **dict.fromkeys(("llava", *PIXTRAL), "</s>"),
}  # fmt: skip
"""What follows an answer; ``<|im_end|>`` and a line break for the others. LLaVA-NeXT's template writes a space after
``</s>``, and its tokenizer marks what goes on there with another one."""


def hugging_face_processor(folder: Path, family: str) -> transformers.ProcessorMixin:
    """transformers' own processor class. Qwen's cannot be constructed without torchvision, because it insists on a
    video processor; its attributes are set one by one, its methods stay untouched."""
    if family in tiled.CLASSES:
        return tiled.processor(folder, family)
    if family == "llava":
        return transformers.LlavaProcessor.from_pretrained(folder, backend="pil")
    if family in ("idefics3", "smolvlm"):
        return _tile_processor(folder, family)
    if family in PIXTRAL:
        return _pixtral_processor(folder)
    if family == "gemma3":
        return transformers.Gemma3Processor.from_pretrained(folder, backend="pil")
    classes = {"qwen2_vl": transformers.Qwen2VLProcessor, "qwen2_5_vl": transformers.Qwen2_5_VLProcessor}
    cls = classes.get(family, transformers.Qwen3VLProcessor)
    processor = cls.__new__(cls)
    processor.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor.image_processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(folder)
    processor.chat_template = processor.tokenizer.chat_template
    processor.image_token, processor.video_token = "<|image_pad|>", "<|video_pad|>"
    processor.image_token_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    processor.video_token_id = processor.tokenizer.convert_tokens_to_ids(processor.video_token)
    return processor


def _tile_processor(folder: Path, family: str) -> transformers.ProcessorMixin:
    """SmolVLM's class insists on num2words and on a video processor: set what pictures need attribute by attribute."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    settings = json.loads((folder / "processor_config.json").read_text())
    if family == "idefics3":
        images = pil_class("Idefics3ImageProcessor").from_pretrained(folder)
        return transformers.Idefics3Processor(
            images, tokenizer, image_seq_len=settings["image_seq_len"], chat_template=tokenizer.chat_template
        )
    processor = transformers.SmolVLMProcessor.__new__(transformers.SmolVLMProcessor)
    processor.tokenizer, processor.chat_template = tokenizer, tokenizer.chat_template
    processor.image_processor = pil_class("SmolVLMImageProcessor").from_pretrained(folder)
    processor.video_processor = types.SimpleNamespace(num_frames=1, fps=1, model_input_names=[])
    processor.image_seq_len = settings["image_seq_len"]
    processor.image_token, processor.video_token = "<image>", "<video>"
    processor.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    processor.fake_image_token, processor.global_image_token = "<fake_token_around_image>", "<global-img>"
    return processor


def _pixtral_processor(folder: Path) -> transformers.ProcessorMixin:
    """Its module imports torchvision for the sake of one function, which the PIL processor has as well."""
    settings = json.loads((folder / "processor_config.json").read_text())
    models = "transformers.models.pixtral."
    pil = importlib.import_module(models + "image_processing_pil_pixtral")
    with unittest.mock.patch.dict(sys.modules, {models + "image_processing_pixtral": pil}):
        cls = importlib.import_module(models + "processing_pixtral").PixtralProcessor
    processor = cls.__new__(cls)
    processor.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor.chat_template = processor.tokenizer.chat_template
    processor.image_processor = transformers.PixtralImageProcessorPil.from_pretrained(folder)
    processor.patch_size, processor.spatial_merge_size = settings["patch_size"], settings["spatial_merge_size"]
    for name, mark in (("", "[IMG]"), ("break_", "[IMG_BREAK]"), ("end_", "[IMG_END]")):
        setattr(processor, f"image_{name}token", mark)
        setattr(processor, f"image_{name}token_id", processor.tokenizer.convert_tokens_to_ids(mark))
    return processor


def pixel_values(family: str, images: Sequence[ProcessedImage]) -> Tensor:
    """The pixels of a sequence's images as transformers' own model takes them."""
    pixels = [image.pixel_values for image in images]
    if family not in PIXTRAL:
        return torch.cat(pixels)[None] if family in ("idefics3", "smolvlm") else torch.cat(pixels)
    pictures = torch.zeros(len(images), 3, *(max(sides) for sides in zip(*(i.layout for i in images), strict=True)))
    for picture, image in zip(pictures, images, strict=True):
        height, width = image.layout
        patches = iter(image.pixel_values.view(-1, 3, 14, 14))
        for top in range(0, height, 14):
            for left in range(0, width, 14):
                picture[:, top : top + 14, left : left + 14] = next(patches)
    return pictures


def pixels(family: str, out: transformers.BatchFeature) -> np.ndarray:
    """The pixels of all images that a processor returned, without what pads them."""
    return tiled.pixels(family, out) if family in tiled.CLASSES else np.concatenate(list(out["pixel_values"]))


def load_model(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    slow = {"experts_implementation": "eager"} if family.endswith("_moe") else {}
    return CLASSES[family].from_pretrained(folder, dtype=dtype, attn_implementation="eager", **slow)


def with_adapters_of(
    policy: Policy, model: transformers.PreTrainedModel
) -> tuple[torch.nn.Module, dict[str, torch.nn.Parameter]]:
    """Give a model peft's adapters where the policy has its own, with the same values; return it and what is trained."""
    wanted = {name.rsplit(".lora_A", 1)[0] for name in policy.trained_parameters() if ".lora_A" in name}
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=sorted(wanted), lora_dropout=0.0)
    adapted = peft.get_peft_model(model, settings)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in policy.trained_parameters().items():
        parameters[name].data.copy_(parameter.data)
    return adapted, parameters


def completion_logps(model: torch.nn.Module, family: str, path: TokenPath) -> Tensor:
    """Log-probs of a path's completion tokens: the sequence alone through the model's own forward, (tokens,)."""
    input_ids = torch.from_numpy(path.input_ids)[None]
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "use_cache": False}
    if path.images:
        pixels = pixel_values(family, path.images)
        inputs["pixel_values"] = pixels.to(next(model.parameters()).dtype)
        if family in PIXTRAL:
            inputs["image_sizes"] = torch.tensor([image.layout for image in path.images])
    if family in tiled.CLASSES:
        inputs |= tiled.inputs(family, path)
    elif family.startswith("qwen") or family == "gemma3":
        if path.images and family != "gemma3":
            inputs["image_grid_thw"] = torch.tensor([image.layout for image in path.images])
        is_image = torch.zeros_like(input_ids)
        for runs in path.image_runs:
            is_image[0, places(runs)] = 1
        inputs["token_type_ids" if family == "gemma3" else "mm_token_type_ids"] = is_image
    logits = model(**inputs).logits[0, path.completion_start - 1 : -1]
    return logits.log_softmax(-1).gather(-1, input_ids[0, path.completion_start :, None])[:, 0]


def pair_logps(model: torch.nn.Module, family: str, batch: PackedBatch) -> Tensor:
    """Summed log-probs of every pair's chosen and rejected completion, (P, 2)."""
    rows = [[completion_logps(model, family, path).sum() for path in pair.paths[:2]] for pair in batch.pairs]
    return torch.stack([torch.stack(row) for row in rows])


def gradients(loss: Tensor, parameters: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    """Gradient by name; parameters the loss does not reach get zeros."""
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), grads, strict=True)}


def worst_relative_error(got: dict[str, Tensor], truth: dict[str, Tensor], names: Iterable[str] | None = None) -> float:
    """Largest difference in any tensor, relative to that tensor's largest entry (or to the largest of all / 1000)."""
    overall = max(float(t.abs().max()) for t in truth.values()) / 1000
    return max(
        float((got[n] - truth[n]).abs().max()) / max(float(truth[n].abs().max()), overall) for n in names or truth
    )
