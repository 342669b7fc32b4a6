"""What the training-step benchmark trains: models of given shape with random weights, and rows of given lengths.

No weights are saved or downloaded: :meth:`Subject.model` builds the same random model on every call.
"""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, PreTrainedModel, Qwen2VLImageProcessorPil

from vapr.batches.tokenize import Processor
from vapr.config import LoraConfig, PolicyConfig
from vapr.data.pair import PreferencePair
from vapr.data.pairs import write_pairs
from vapr.data.sources import read_pairs
from vapr.demo.tiny_policy import LLAVA_TEMPLATE, build_tiny_policy
from vapr.families import FAMILIES
from vapr.model.policy import Policy, load_policy

PROMPT_WORDS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model to be built from its config, and the images it is shown."""

    family: str
    text: dict[str, Any]  # overrides of the text config
    vision: dict[str, Any]  # overrides of the vision config
    image_size: tuple[int, int]  # width and height of the files
    lora_rank: int
    max_tokens: int
    tie_word_embeddings: bool = False


@dataclass(frozen=True, slots=True)
class Workload:
    """How long the completions are, and how many pairs show one image."""

    name: str
    completion_tokens: int
    pairs_per_image: int = 1
    spread: tuple[int, int] | None = None
    """Fewest and most tokens of a completion where they are not all equal; images then differ in size, too."""


WORKLOADS = {w.name: w for w in (Workload("answers", 20), Workload("captions", 150), Workload("four_per_image", 20, 4))}
SPREAD = {"answers": (5, 30), "captions": (80, 250), "four_per_image": (5, 30)}
MIXES = {
    "equal": WORKLOADS,
    "spread": {name: replace(workload, spread=SPREAD[name]) for name, workload in WORKLOADS.items()},
}
"""Workloads of rows of one length, in which nobody pads, and of realistic rows, by name."""

SPREAD_SIDES = ((1.0, 1.0), (0.75, 1.0), (1.0, 0.75), (1.25, 1.0), (1.0, 1.25))
"""Factors on width and height of an image of spread rows; on average an image has the pixels of an equal row's."""


def _qwen_text(hidden: int, inter: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": inter, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocab, "max_position_embeddings": 32768,
    }  # fmt: skip


# A tower costs per image token about what it costs beside the 7B models: 0.4 of a language-model token for Qwen,
# 0.05 for CLIP.
SMALL_QWEN = Shape(
    family="qwen2_5_vl",
    text=_qwen_text(320, 864, 4, 5, 1, 4096),
    vision={
        "depth": 2,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_heads": 3,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    },
    image_size=(448, 448),  # 256 image tokens
    lora_rank=16,
    max_tokens=4096,
)
SMALL_LLAVA = Shape(
    family="llava",
    text=_qwen_text(320, 864, 4, 5, 5, 4096),
    vision={
        "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 224
    },
    image_size=(448, 448),  # 256 image tokens
    lora_rank=16,
    max_tokens=4096,
)  # fmt: skip
QWEN_VISION = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip
# The last layer is not computed for tokens whose output nobody needs, of which a model of few layers has more than its
# share: these have more layers, as narrow as makes about the small ones' work.
DEEP_QWEN = replace(SMALL_QWEN, text=_qwen_text(160, 432, 16, 5, 1, 4096))
DEEP_LLAVA = replace(SMALL_LLAVA, text=_qwen_text(160, 432, 16, 5, 5, 4096))
# The published configs of the models these are named after.
SHAPES = {
    "small-qwen2.5-vl": SMALL_QWEN,
    "small-llava": SMALL_LLAVA,
    "deep-qwen2.5-vl": DEEP_QWEN,
    "deep-llava": DEEP_LLAVA,
    "qwen2.5-vl-3b": Shape(
        family="qwen2_5_vl", text=_qwen_text(2048, 11008, 36, 16, 2, 151936), vision=QWEN_VISION,
        image_size=(640, 480), lora_rank=128, max_tokens=8192, tie_word_embeddings=True,
    ),
    "qwen2.5-vl-7b": Shape(
        family="qwen2_5_vl", text=_qwen_text(3584, 18944, 28, 28, 4, 152064), vision=QWEN_VISION,
        image_size=(640, 480), lora_rank=128, max_tokens=8192,
    ),
    "llava-1.5-7b": Shape(
        family="llava", text=_qwen_text(4096, 11008, 32, 32, 32, 32064),
        vision={
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            "image_size": 336, "projection_dim": 768,
        },
        image_size=(640, 480), lora_rank=128, max_tokens=8192,
    ),
}  # fmt: skip


SHAPES |= {
    f"tiny-{family}": Shape(family=family, text={}, vision={}, image_size=(112, 112), lora_rank=4, max_tokens=4096)
    for family in FAMILIES
}
"""And the tiny policy of every family, as :func:`vapr.demo.tiny_policy.build_tiny_policy` makes it."""


class Subject:
    """One shape, its folder (tokenizer, image processor, config; no weights) and how it is trained.

    Args:
        shape: what to build.
        folder: written to.
        device: where the models are built.
        lora: adapters of the shape's rank, or else full fine-tuning of the language model.
    """

    def __init__(self, shape: Shape, folder: Path, device: torch.device, *, lora: bool = True) -> None:
        self.shape, self.folder, self.device, self.lora = shape, folder, device, lora
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.words = _words()
        random = np.random.default_rng(0)
        corpus = [" ".join(random.permutation(self.words)) for _ in range(8)]
        build_tiny_policy(shape.family, folder, corpus, vocab_size=4096)
        (folder / "model.safetensors").unlink()
        if shape.text:
            _reshape(folder, shape)
        if shape.family == "llava":
            _read_alike(folder)
        self.processor = self.new_processor()

    @cached_property
    def config(self) -> Any:
        return AutoConfig.from_pretrained(self.folder)

    def new_processor(self) -> Processor:
        """A processor that has not seen an image yet: vapr's remembers the most recent ones."""
        return Processor(str(self.folder), self.config)

    def model(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The random model on the device, the same weights each time."""
        model_class = FAMILIES[self.shape.family].model_class
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(self.folder)  # vapr and TRL both change the config they are given
        with torch.device(self.device):
            return model_class._from_config(config, dtype=dtype or self.dtype, attn_implementation="sdpa")

    def policy_config(self, dtype: torch.dtype | None = None) -> PolicyConfig:
        lora = LoraConfig(rank=self.shape.lora_rank, alpha=2 * self.shape.lora_rank) if self.lora else None
        name = str(dtype or self.dtype).removeprefix("torch.")
        return PolicyConfig(model=str(self.folder), dtype=name, lora=lora)

    def policy(self, dtype: torch.dtype | None = None, kernels: Literal["auto", "off"] = "auto") -> Policy:
        """vapr's policy around :meth:`model`, through ``load_policy`` itself: only reading the weights is replaced."""
        loaded = self.model(dtype), {"missing_keys": [], "mismatched_keys": []}
        with mock.patch.object(FAMILIES[self.shape.family].model_class, "from_pretrained", return_value=loaded):
            torch.manual_seed(0)
            return load_policy(self.policy_config(dtype), self.device, kernels=kernels)

    def pairs(self, workload: Workload, num_pairs: int, *, seed: int = 0) -> list[PreferencePair]:
        """Read the pairs of :meth:`write_rows`."""
        return list(read_pairs(self.write_rows(workload, num_pairs, seed=seed)))

    def write_rows(self, workload: Workload, num_pairs: int, *, seed: int = 0) -> Path:
        """Write pairs whose completions have the workload's numbers of tokens, end of turn included; the same by seed.

        Chosen and rejected of a pair are always of one length.
        """
        random = np.random.default_rng(seed)
        around = workload.completion_tokens - self._num_words(workload.completion_tokens)
        name = f"{workload.name}-{'spread' if workload.spread else 'equal'}-{seed}"
        rows = []
        for number in range(num_pairs):
            size, num_tokens = self.shape.image_size, workload.completion_tokens
            if workload.spread:
                sides = SPREAD_SIDES[int(random.integers(len(SPREAD_SIDES)))]
                size = (round(size[0] * sides[0]), round(size[1] * sides[1]))
                num_tokens = int(random.integers(workload.spread[0], workload.spread[1] + 1))
            if number % workload.pairs_per_image == 0:
                image = _photo(self.folder / f"{name}-{number}.jpg", size, random)
            rows.append(_row(f"{workload.name}-{number}", image, self.words, num_tokens - around, random))
        file = self.folder / f"{name}.jsonl"
        write_pairs(file, rows)
        return file

    def _num_words(self, num_tokens: int) -> int:
        """Words of a completion of so many tokens. Every word is one token; the template adds some."""
        image = _photo(self.folder / "probe.jpg", self.shape.image_size, np.random.default_rng(0))
        file = self.folder / "probe.jsonl"
        write_pairs(file, [_row("probe", image, self.words, num_tokens, np.random.default_rng(0))])
        path = self.processor.tokenize_pair(read_pairs(file)[0]).paths[0]
        return num_tokens - (len(path.input_ids) - path.completion_start - num_tokens)


def _words() -> list[str]:
    """Pronounceable words of two and three syllables; so few that the tokenizer gives each a token of its own."""
    syllables = [a + b for a in "bcdfghjklmnprstvwz" for b in "aeiou"]
    random = np.random.default_rng(1)
    return sorted({"".join(random.choice(syllables, size)) for size in (2, 2, 2, 3) for _ in range(700)})


def _reshape(folder: Path, shape: Shape) -> None:
    """Write the shape's sizes into the folder's config and image processor."""
    config = AutoConfig.from_pretrained(folder)
    values = config.to_dict()
    for part, sizes in (("text_config", shape.text), ("vision_config", shape.vision)):
        values[part] = {**values[part], **sizes}
    values["text_config"].pop("layer_types", None)  # one a layer: rebuilt from the new number of layers
    values["text_config"].pop("head_dim", None)
    values["text_config"]["tie_word_embeddings"] = values["tie_word_embeddings"] = shape.tie_word_embeddings
    half = values["text_config"]["hidden_size"] // values["text_config"]["num_attention_heads"] // 2
    if shape.family != "llava":
        values["vision_config"]["out_hidden_size"] = shape.text["hidden_size"]
        section = [half - 2 * (half * 3 // 8)] + [half * 3 // 8] * 2
        values["text_config"]["rope_parameters"]["mrope_section"] = section
    type(config).from_dict(values).save_pretrained(folder)
    if shape.family == "llava":
        side = shape.vision["image_size"]
        file = folder / "processor_config.json"
        settings = json.loads(file.read_text())
        settings["image_processor"]["size"] = {"shortest_edge": side}
        settings["image_processor"]["crop_size"] = {"height": side, "width": side}
        file.write_text(json.dumps(settings))
    else:
        images = Qwen2VLImageProcessorPil.from_pretrained(folder)
        images.size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}
        images.save_pretrained(folder)


def _read_alike(folder: Path) -> None:
    """Change LLaVA's tokenizer and template so that TRL and vapr read a row as the same tokens.

    TRL 1.16 leaves the BOS out of rows with images and tokenises completions by themselves, and LLaVA's template writes
    no end of turn; so here is no BOS, no mark before the first word of a text, and the template ends an answer.
    """
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["post_processor"] = None
    marks = [step for step in tokenizer["normalizer"]["normalizers"] if step["type"] == "Replace"]
    tokenizer["normalizer"] = marks[0]
    file.write_text(json.dumps(tokenizer))
    answer = "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}"
    assert answer in LLAVA_TEMPLATE
    ended = answer.replace("' '", "'</s>'")
    (folder / "chat_template.jinja").write_text(LLAVA_TEMPLATE.replace(answer, ended))


def _photo(path: Path, size: tuple[int, int], random: np.random.Generator) -> Path:
    """A JPEG of smooth colours: decoding it costs what a photograph costs."""
    coarse = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
    return path


def _row(name: str, image: Path, words: list[str], num_words: int, random: np.random.Generator) -> dict[str, Any]:
    """Chosen and rejected differ in one word, anywhere but at the start: an edited negative."""

    def pick(count: int) -> list[str]:
        return [words[number] for number in random.integers(0, len(words), count)]

    # One first word for all: without a space before it, words differ in their number of tokens.
    question = [{"type": "image"}, {"type": "text", "text": " ".join([words[0], *pick(PROMPT_WORDS)])}]
    chosen = [words[0], *pick(num_words - 1)]
    rejected = list(chosen)
    where = int(random.integers(1, num_words))
    rejected[where] = next(word for word in pick(8) if word != chosen[where])
    return {
        "id": name,
        "images": [str(image)],
        "prompt": [{"role": "user", "content": question}],
        "chosen": " ".join(chosen),
        "rejected": " ".join(rejected),
    }
