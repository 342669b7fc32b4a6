"""An oracle that reads pictures from their pixels and answers questions about them: no code of the demo's is used."""

import re

import numpy as np
from PIL import Image

CELL, GRID = 28, 3
COLOURS = {
    "red": (255, 70, 70), "green": (70, 220, 90), "blue": (80, 140, 255),
    "yellow": (255, 225, 60), "pink": (255, 130, 230), "white": (250, 250, 250),
}  # fmt: skip
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4}


def read_cells(image: Image.Image) -> list[tuple[str, str, int]]:
    """(colour, kind, column) of every thing."""
    pixels = np.asarray(image)
    found = []
    for row in range(GRID):
        for column in range(GRID):
            cell = pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
            counts = {name: int((cell == rgb).all(-1).sum()) for name, rgb in COLOURS.items()}
            colour = max(counts, key=lambda name: counts[name])
            if counts[colour]:
                found.append((colour, kind_of((cell == COLOURS[colour]).all(-1)), column))
    return found


def kind_of(mask: np.ndarray) -> str:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    if not box[box.shape[0] // 2, box.shape[1] // 2]:
        return "ring"
    return "box" if box.mean() > 0.95 else "ball" if box.mean() > 0.65 else "kite"


def is_true(question: str, answer: str, things: list[tuple[str, str, int]]) -> bool:
    """Tell whether an answer in any wording is true of things read from pixels."""
    words = re.findall(r"\w+", answer.lower())
    if match := re.fullmatch(r"Is there a (\w+) (\w+)\?", question):
        there = match.groups() in {thing[:2] for thing in things}
        assert (words[0] == "no") == ("not" in words) or words in (["no"], ["yes"])
        return words[0] == ("yes" if there else "no")
    if match := re.fullmatch(r"What color is the (\w+)\?", question):
        (value,) = [colour for colour, kind, _ in things if kind == match[1]]
        return _only(words, COLOURS) == value
    if match := re.fullmatch(r"What is the (\w+) toy\?", question):
        (value,) = [kind for colour, kind, _ in things if colour == match[1]]
        return _only(words, ("box", "ball", "kite", "ring")) == value
    if question == "How many toys are there?":
        return NUMBERS[_only(words, NUMBERS)] == len(things)
    match = re.fullmatch(r"Is the (\w+) toy on the left or on the right\?", question)
    assert match
    (column,) = [column for colour, _, column in things if colour == match[1]]
    return _only(words, ("left", "right")) == {0: "left", GRID - 1: "right"}[column]


def _only(words, values):
    (value,) = [word for word in words if word in values]
    return value
