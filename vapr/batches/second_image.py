"""Make the views that image losses compare: a completion with a second image, or with the other completion's images.

A second image is a pure function of seed, row id and image, so a row has the same one in any order, pack, worker, rank
and resumed run, and its reference log-probs are found in the cache. Of several images of a row every one is changed.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from vapr.batches.tokenize import Processor
from vapr.config import Config
from vapr.data.images import as_rgb, image_name, read_image
from vapr.data.pair import PreferencePair
from vapr.errors import UserError
from vapr.families.processed_image import ProcessedImage
from vapr.loss_config import SecondImageConfig

CELLS = 16
"""A mask covers cells of a grid of so many by so many."""
NOISE_PIXELS = 336
"""The longer side of the noise, which is enlarged to the picture's: finer noise is lost when that is scaled down."""
ROWS_TRIED = 64
"""Other rows that are looked at to retrieve an image unlike the row's own."""


class View(NamedTuple):
    """A path of a pair beside chosen and rejected: a completion, and the images that it is shown."""

    role: str  # one of vapr_kernels.image_losses.OTHER_PATHS
    side: str  # ``chosen`` or ``rejected``
    images: tuple[ProcessedImage, ...]


Shown = tuple[ProcessedImage, ...]


class OtherViews:
    """The views that the losses of a config need of a pair.

    Args:
        config: its losses, and the seed.
        processor: reads images and processes them.
        pairs: all rows, one of which a retrieved image is from.
    """

    def __init__(self, config: Config, processor: Processor, pairs: Sequence[PreferencePair]) -> None:
        self._second, self._swaps, self._seed = config.second_image, config.swaps_images, config.seed
        self._processor, self._pairs = processor, pairs

    def of(self, pair: PreferencePair, chosen: Shown, rejected: Shown) -> tuple[list[View], list[str]]:
        """Return the views of a pair, and why a loss is left out for it: ``kind: reason``.

        ``chosen`` and ``rejected`` are the images that its completions are shown. Raises UserError for an image that
        cannot be processed.
        """
        views: list[View] = []
        left_out: list[str] = []
        if self._second is not None:
            second = self._second_images(pair, chosen, rejected)
            if isinstance(second, str):
                left_out.append(f"image: {second}")
            else:
                views.append(View("second", "chosen", second))
        if self._swaps:
            if reason := _why_not_swapped(pair, chosen, rejected):
                left_out.append(f"symmetric: {reason}")
            else:
                views.append(View("chosen swapped", "chosen", rejected))
                views.append(View("rejected swapped", "rejected", chosen))
        return views, left_out

    def _second_images(self, pair: PreferencePair, chosen: Shown, rejected: Shown) -> Shown | str:
        """Return a second image for each of ``chosen``, or why there is none."""
        assert self._second is not None
        if not chosen:
            return "the row has no image"
        if self._second.make == "given":
            second = rejected
            if pair.rejected_images is None:
                return "the row has no rejected_images"
        elif self._second.make == "retrieved":
            found = [self._retrieved(pair, place, chosen) for place in range(len(chosen))]
            second = tuple(image for image in found if image is not None)
            if len(second) < len(chosen):
                return f"none of {ROWS_TRIED} other rows has another image"
        else:
            second = tuple(
                self._changed(image, self._second, self._random(pair, n), several=len(chosen) > 1)
                for n, image in enumerate(pair.images)
            )
        return "the second image looks the same" if _hashes(second) == _hashes(chosen) else second

    def _changed(
        self, image: Path | bytes, config: SecondImageConfig, random: np.random.Generator, *, several: bool
    ) -> ProcessedImage:
        picture = np.asarray(as_rgb(read_image(image)))
        made = Image.fromarray(changed(picture, config, random))
        return self._processor.process(made, f"made of {image_name(image)}", several=several)

    def _random(self, pair: PreferencePair, place: int) -> np.random.Generator:
        """Return the random numbers of the image at a place of a row."""
        digest = hashlib.blake2b(repr((self._seed, pair.id, place)).encode(), digest_size=16)
        return np.random.default_rng(int.from_bytes(digest.digest(), "little"))

    def _retrieved(self, pair: PreferencePair, place: int, chosen: Shown) -> ProcessedImage | None:
        """Return the first image of another row drawn at random, unlike the row's own; None where none is found."""
        own, several = chosen[place], len(chosen) > 1
        for number in self._random(pair, place).integers(len(self._pairs), size=ROWS_TRIED).tolist():
            try:
                other = self._pairs[number]
                image = self._processor.process_image(other.images[0], several=several) if other.images else own
            except UserError:  # reported when that row is read itself
                continue
            if other.id != pair.id and image.content_hash != own.content_hash:
                return image
        return None


def _why_not_swapped(pair: PreferencePair, chosen: Shown, rejected: Shown) -> str | None:
    if pair.rejected_images is None:
        return "the row has no rejected_images"
    if _hashes(chosen) == _hashes(rejected):
        return "images and rejected_images look the same"
    return "both images have the same answer" if pair.chosen == pair.rejected else None


def _hashes(images: Shown) -> list[str]:
    return [image.content_hash for image in images]


def changed(picture: np.ndarray, config: SecondImageConfig, random: np.random.Generator) -> np.ndarray:
    """Return a changed picture of the same size, (height, width, 3) uint8."""
    make: dict[str, Callable[[], np.ndarray]] = {
        "crop": lambda: cropped(picture, config.areas, random),
        "noise": lambda: noised(picture, config.steps, random),
        "mask": lambda: masked(picture, config.areas, random),
        "black": lambda: np.zeros_like(picture),
    }
    return make[config.make]()


def cropped(picture: np.ndarray, areas: tuple[float, float], random: np.random.Generator) -> np.ndarray:
    """Cut out a part of a random size, shape (between 3:4 and 4:3) and place, and enlarge it to the whole.

    It is torchvision's RandomResizedCrop as mDPO uses it (arXiv 2406.11839). A part is at least a pixel wide and high.
    """
    height, width, _ = picture.shape
    area = random.uniform(*areas) * height * width
    shape = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
    across = int(np.clip(round(float(np.sqrt(area * shape))), 1, width))
    down = int(np.clip(round(float(np.sqrt(area / shape))), 1, height))
    left, top = random.integers(width - across + 1), random.integers(height - down + 1)
    part = Image.fromarray(np.ascontiguousarray(picture[top : top + down, left : left + across]))
    return np.asarray(part.resize((width, height), Image.Resampling.BICUBIC))


def noised(picture: np.ndarray, steps: int, random: np.random.Generator) -> np.ndarray:
    """Add the noise of so many steps of a diffusion: ``sqrt(a) x + sqrt(1 - a) noise`` for x from -1 to 1.

    The schedule of 1000 steps is that of VCD (arXiv 2311.16922), of which CHiP takes 500.
    """
    height, width, _ = picture.shape
    added = 1 / (1 + np.exp(-np.linspace(-6, 6, 1000))) * (0.5e-2 - 1e-5) + 1e-5  # noise of each step
    kept = np.prod(1 - added[:steps])
    scale = max(height, width, NOISE_PIXELS) / NOISE_PIXELS
    grid = random.standard_normal((int(np.ceil(height / scale)), int(np.ceil(width / scale)), 3), np.float32)
    rows, columns = ((np.arange(side) / scale).astype(np.int64) for side in (height, width))
    noise = grid[rows[:, None], columns]
    noisy = float(np.sqrt(kept)) * (picture.astype(np.float32) / 127.5 - 1) + float(np.sqrt(1 - kept)) * noise
    return np.clip(np.rint((noisy + 1) * 127.5), 0, 255).astype(np.uint8)


def masked(picture: np.ndarray, areas: tuple[float, float], random: np.random.Generator) -> np.ndarray:
    """Paint cells of a grid black, at least one; small pictures have one cell a pixel."""
    height, width, _ = picture.shape
    down, across = min(CELLS, height), min(CELLS, width)
    number = max(1, round(random.uniform(*areas) * down * across))
    covered = np.zeros(down * across, bool)
    covered[random.permutation(down * across)[:number]] = True
    rows, columns = np.arange(height) * down // height, np.arange(width) * across // width
    cells = covered.reshape(down, across)[rows[:, None], columns]
    return np.where(cells[..., None], np.uint8(0), picture)
