"""An image as a model takes it, and what stands for it in a prompt."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

Run = tuple[int, int]
"""Placeholders side by side: the first one's place, and how many they are."""


@dataclass(frozen=True, slots=True)
class Placeholder:
    """What stands in a prompt for an image whose tokens are more than one run of placeholders.

    ``text`` holds one placeholder for each run, and marks of rows, columns or ends around them.
    """

    text: str
    runs: tuple[int, ...]  # how many placeholders each is

    @property
    def num_tokens(self) -> int:
        """Return how many placeholders there are, marks left out."""
        return sum(self.runs)


@dataclass(frozen=True, slots=True, eq=False)
class ProcessedImage:
    """One image as the model takes it."""

    pixel_values: Tensor  # (rows, ...); images of a pack are laid end to end along the first axis
    layout: tuple[int, ...] | None  # what the model is told of it beside pixels; each family says what that is
    num_tokens: int  # placeholders in the prompt, features out of the projector
    content_hash: str  # sha256 of the pixels in float32 and the layout
    seen: float = 1.0  # share of the picture's area that a centre crop left
    placeholder: Placeholder | None = None  # None: one run of placeholders, and no mark


def places(runs: Iterable[Run]) -> np.ndarray:
    """Return the places of the placeholders of runs, (tokens,) int64."""
    return np.concatenate([np.empty(0, np.int64), *(start + np.arange(length) for start, length in runs)])
