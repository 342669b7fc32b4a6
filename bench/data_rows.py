"""What the data-path benchmark reads: a file of any number of rows about a fixed number of photographs."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from bench.workloads import PROMPT_WORDS, SHAPES, Subject
from vapr.data.pairs import write_pairs

PHOTO_SIZE = (640, 480)
MAXIMUM_PIXELS = 28 * 28 * 320
"""A photograph is scaled down to 560 x 420, which makes 300 image tokens."""
COMPLETION_WORDS = 20


class DataFolder:
    """A model's processor files, photographs, and files of rows about them.

    Args:
        folder: written to.
        num_images: distinct photographs, 640 x 480, as JPEG.

    Attributes:
        model: folder of tokenizer, image processor and config of a small Qwen2.5-VL; no weights.
        image_tokens: of each photograph.
        image_kib: mean size of their files.
    """

    def __init__(self, folder: Path, num_images: int) -> None:
        self.folder, self.model = folder, folder / "model"
        subject = Subject(SHAPES["small-qwen2.5-vl"], self.model, torch.device("cpu"))
        images = Qwen2VLImageProcessorPil.from_pretrained(self.model)
        images.size = {"shortest_edge": 56 * 56, "longest_edge": MAXIMUM_PIXELS}
        images.save_pretrained(self.model)
        self.words = subject.words
        draws = np.random.default_rng(0)
        self.photos = [write_photo(folder / f"{number:05}.jpg", draws) for number in range(num_images)]
        self.image_kib = sum(photo.stat().st_size for photo in self.photos) / num_images / 1024
        self.image_tokens = subject.new_processor().process_image(self.photos[0]).num_tokens

    def write_rows(self, num_rows: int) -> Path:
        """A jsonl file of so many rows, written row by row."""
        file = self.folder / f"rows-{num_rows}.jsonl"
        write_pairs(file, self._rows(num_rows))
        return file

    def _rows(self, num_rows: int) -> Iterator[dict[str, Any]]:
        """Rows that vapr and TRL read as they are. Every photograph once in random order, then again in another."""
        draws = random.Random(0)
        order: list[Path] = []
        for number in range(num_rows):
            if not order:
                order = draws.sample(self.photos, len(self.photos))
            chosen = draws.choices(self.words, k=COMPLETION_WORDS)
            rejected = list(chosen)
            where = draws.randrange(COMPLETION_WORDS)
            while rejected[where] == chosen[where]:
                rejected[where] = draws.choice(self.words)
            yield {
                "id": f"row-{number}",
                "images": [str(order.pop())],
                "prompt": [{"role": "user", "content": " ".join(draws.choices(self.words, k=PROMPT_WORDS))}],
                "chosen": [{"role": "assistant", "content": " ".join(chosen)}],
                "rejected": [{"role": "assistant", "content": " ".join(rejected)}],
            }


def write_photo(path: Path, draws: np.random.Generator) -> Path:
    """Colours, shapes and grain of several scales, so that a decoder has coefficients to decode at every frequency."""
    width, height = PHOTO_SIZE
    picture = draws.integers(-6, 7, (height, width, 3)).astype(np.float32)  # grain
    for cells, strength in ((8, 0.6), (40, 0.3), (160, 0.1)):
        coarse = draws.integers(0, 256, (cells * height // width, cells, 3), dtype=np.uint8)
        scaled = Image.fromarray(coarse).resize(PHOTO_SIZE, Image.Resampling.BICUBIC)
        picture += strength * np.asarray(scaled, np.float32)
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return path
