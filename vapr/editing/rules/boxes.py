"""Boxes of instruction data: where the thing is that an answer is about, in pixels of its picture."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from vapr.editing.rules.nouns import Nouns
from vapr.editing.rules.turns import Turn

CORNERS_OF = ("bbox", "box", "bbox_2d")
"""Keys that hold the four numbers of a box that is an object."""
LABEL_OF = ("label", "category", "name")
"""Keys that say what is in it."""

NO_BOXES = "no boxes"
NOT_NAMED = "no box of a thing that question or answer names"
SLACK = 1.0
"""Pixels that a box may reach beyond its picture, as rounded ones do; it is cut off there."""


class CannotPlace(Exception):
    """The region of an answer cannot be told; the message is the reason that is counted."""


class Box(NamedTuple):
    """A region in whole pixels; ``right`` and ``bottom`` are the first that lie outside."""

    left: int
    top: int
    right: int
    bottom: int


class Labelled(NamedTuple):
    """A box as a row gives it."""

    numbers: tuple[float, ...]  # four, in the order and unit that the config says
    label: str | None


def region_of(
    turn: Turn, size: tuple[int, int], nouns: Nouns, *, order: Literal["xywh", "xyxy"], relative: bool
) -> list[Box]:
    """Return the boxes of what a turn's answer is about.

    Of boxes with labels these are the ones of things that the answer names or, where it names none of them, the
    question; boxes without labels all count.

    Args:
        turn: with ``boxes``: a list of boxes, or of such lists, one for each answer of its row.
        size: width and height of its picture, upright.
        nouns: tells whether two words can name one thing.
        order: left, top, width and height, or left, top, right and bottom.
        relative: shares of width and height instead of pixels.

    Raises:
        CannotPlace: if there are none, or one is no box or lies outside of the picture.
    """
    given = [_labelled(box) for box in _of_answer(turn)]
    if not given:
        raise CannotPlace(NO_BOXES)
    boxes = [(_in_pixels(box.numbers, size, order, relative), box.label) for box in given]
    if all(label is None for _, label in boxes):
        return [box for box, _ in boxes]
    for text in (turn.answer, turn.question):
        if named := [box for box, label in boxes if label is not None and _names(text, label, nouns)]:
            return named
    raise CannotPlace(NOT_NAMED)


def _of_answer(turn: Turn) -> Sequence[Any]:
    boxes = turn.boxes
    if boxes is None:
        return ()
    if not isinstance(boxes, list):
        raise CannotPlace(f"boxes must be a list, got {type(boxes).__name__}")
    if len(boxes) == 4 and all(_is_number(number) for number in boxes):
        return [boxes]
    if boxes and all(isinstance(box, list) and all(isinstance(one, list | dict) for one in box) for box in boxes):
        if turn.number >= len(boxes):
            raise CannotPlace(f"boxes are given for {len(boxes)} answers, and this is answer {turn.number + 1}")
        return list(boxes[turn.number])
    return boxes


def _labelled(box: Any) -> Labelled:
    numbers, label = box, None
    if isinstance(box, Mapping):
        numbers = next((box[key] for key in CORNERS_OF if box.get(key) is not None), None)
        label = next((box[key] for key in LABEL_OF if isinstance(box.get(key), str)), None)
    if not isinstance(numbers, list) or len(numbers) != 4 or not all(_is_number(number) for number in numbers):
        raise CannotPlace("a box is four numbers, or an object that has them as 'bbox' beside its 'label'")
    return Labelled(tuple(map(float, numbers)), label)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _in_pixels(numbers: tuple[float, ...], size: tuple[int, int], order: str, relative: bool) -> Box:
    width, height = size
    left, top, right, bottom = numbers
    if order == "xywh":
        right, bottom = left + right, top + bottom
    if relative:
        left, top, right, bottom = left * width, top * height, right * width, bottom * height
    across = -SLACK <= left < right <= width + SLACK and left < width and right > 0
    down = -SLACK <= top < bottom <= height + SLACK and top < height and bottom > 0
    if not (across and down):
        raise CannotPlace(f"box outside of the picture: {list(numbers)} of {width} x {height} pixels")
    edges = math.floor(max(left, 0)), math.floor(max(top, 0)), math.ceil(right), math.ceil(bottom)
    return Box(*edges[:2], min(width, edges[2]), min(height, edges[3]))


def _names(text: str, label: str, nouns: Nouns) -> bool:
    """Tell whether a text names what a label says, by a synonym or a word above or below it included."""
    if re.search(rf"\b{re.escape(label.lower())}\b", text.lower()):
        return True
    if nouns.known(label) is None:
        return False
    return any(nouns.related(noun, label) is not None for *_, noun in nouns.find(text))
