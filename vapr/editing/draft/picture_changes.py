"""Pictures that no longer show what an answer is about: its region masked, blurred or cut away. Pixels only."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from vapr.editing.rules.boxes import Box

BLUR = 1 / 6
"""Radius of the blur over the longer side of a box: no letter and no face is left."""


class Changed(NamedTuple):
    """A changed picture."""

    picture: Image.Image
    share: float  # of the picture's pixels that are others or, of a crop, that are gone


def masked(picture: Image.Image, boxes: Sequence[Box]) -> Changed:
    """Paint boxes in the picture's mean colour, which stands out less than black."""
    mean = tuple(round(float(value)) for value in np.asarray(picture).mean(axis=(0, 1)))
    new = picture.copy()
    for box in boxes:
        new.paste(mean, box)
    return Changed(new, changed_share(picture, new))


def blurred(picture: Image.Image, boxes: Sequence[Box]) -> Changed:
    """Blur boxes beyond recognition. Each is blurred by itself, so that nothing of it runs into its surroundings."""
    new = picture.copy()
    for box in boxes:
        radius = BLUR * max(box.right - box.left, box.bottom - box.top)
        new.paste(picture.crop(box).filter(ImageFilter.GaussianBlur(radius)), (box.left, box.top))
    return Changed(new, changed_share(picture, new))


def cropped(picture: Image.Image, boxes: Sequence[Box]) -> Changed | None:
    """Cut out the largest part beside all boxes, enlarged to about as many pixels as the picture has.

    With the pixels the model's image tokens stay as many. None where the boxes reach from edge to edge both ways.
    """
    width, height = picture.size
    left, top = min(box.left for box in boxes), min(box.top for box in boxes)
    right, bottom = max(box.right for box in boxes), max(box.bottom for box in boxes)
    parts = [
        Box(0, 0, left, height),
        Box(right, 0, width, height),
        Box(0, 0, width, top),
        Box(0, bottom, width, height),
    ]
    best = max(parts, key=_area)
    if not _area(best):
        return None
    scale = (width * height / _area(best)) ** 0.5
    size = [max(1, round(scale * side)) for side in (best.right - best.left, best.bottom - best.top)]
    part = picture.crop(best).resize((size[0], size[1]), Image.Resampling.BICUBIC)
    return Changed(part, 1 - _area(best) / (width * height))


def _area(box: Box) -> int:
    return (box.right - box.left) * (box.bottom - box.top)


def changed_share(one: Image.Image, other: Image.Image) -> float:
    """Return the share of pixels that differ between two pictures of one size, both RGB."""
    return float((np.asarray(one) != np.asarray(other)).any(axis=-1).mean())
