"""What transformers does for the families that cut pictures into tiles: a part of tests/oracles.py."""

import json
import re
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from vapr.batches.tokenize import TokenPath
from vapr.demo.tiny_tiled import CANVASES

CLASSES = {
    "llava_next": transformers.LlavaNextForConditionalGeneration,
    "llava_onevision": transformers.LlavaOnevisionForConditionalGeneration,
    "internvl": transformers.InternVLForConditionalGeneration,
}


def processor(folder: Path, family: str) -> transformers.ProcessorMixin:
    """transformers' own processor class. Where it insists on a video processor, which needs torchvision, its attributes
    are set one by one, as its constructor sets them; its methods stay untouched."""
    if family == "llava_next":
        return transformers.LlavaNextProcessor.from_pretrained(folder, backend="pil")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    settings = json.loads((folder / "processor_config.json").read_text())
    onevision = family == "llava_onevision"
    cls = transformers.LlavaOnevisionProcessor if onevision else transformers.InternVLProcessor
    made = cls.__new__(cls)
    made.tokenizer, made.chat_template = tokenizer, tokenizer.chat_template
    if onevision:
        made.image_processor = transformers.LlavaOnevisionImageProcessorPil.from_pretrained(folder)
        for name in ("num_image_tokens", "vision_feature_select_strategy", "vision_aspect_ratio"):
            setattr(made, name, settings[name])
        made.image_token, made.image_token_id = tokenizer.image_token, tokenizer.image_token_id
        made.video_token, made.video_token_id = tokenizer.video_token, tokenizer.video_token_id
        return made
    made.image_processor = transformers.GotOcr2ImageProcessorPil.from_pretrained(folder)
    made.image_seq_length = settings["image_seq_length"]
    made.start_image_token, made.end_image_token = tokenizer.start_image_token, tokenizer.end_image_token
    made.start_image_token_id, made.end_image_token_id = tokenizer.start_image_token_id, tokenizer.end_image_token_id
    made.image_token, made.image_token_id = tokenizer.context_image_token, tokenizer.context_image_token_id
    made.video_token = tokenizer.video_token
    made.multimodal_pattern = re.compile(
        f"(?P<image>{re.escape(made.image_token)})|(?P<video>{re.escape(made.video_token)})"
    )
    return made


def pixels(family: str, out: transformers.BatchFeature) -> np.ndarray:
    """The tiles of all images that a processor returned; LLaVA's pads images of a prompt to as many tiles."""
    values = [np.asarray(image) for image in out["pixel_values"]]
    if family == "internvl":
        return np.stack(values)
    if family == "llava_onevision":
        return np.concatenate(values)
    side = values[0].shape[-1]
    counts = [image_size_to_num_patches(tuple(size), CANVASES, side) for size in out["image_sizes"]]
    return np.concatenate([image[:count] for image, count in zip(values, counts, strict=True)])


def inputs(family: str, path: TokenPath) -> dict[str, Tensor]:
    """What the model takes for the images of a path, beside pixels."""
    if family == "internvl" or not path.images:
        return {}
    sizes = {"image_sizes": torch.tensor([image.layout for image in path.images])}
    return sizes | ({"batch_num_images": torch.tensor([len(path.images)])} if family == "llava_onevision" else {})
