"""Drawn pictures, questions about them, true answers and hard negatives. Pure and seeded: same seed, same bytes.

A picture is a 3 x 3 grid of cells with one coloured shape in some of them. Every wrong answer is the true one with
one targeted error: another colour, shape or number, left and right swapped, or yes and no flipped.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

Category = Literal["existence", "colour", "shape", "count", "side", "describe"]
CATEGORIES: tuple[Category, ...] = ("existence", "colour", "shape", "count", "side")
"""What is measured. ``describe`` is asked in the sft stage only: naming everything teaches most."""

COLOURS = {
    "red": (255, 70, 70), "green": (70, 220, 90), "blue": (80, 140, 255),
    "yellow": (255, 225, 60), "pink": (255, 130, 230), "white": (250, 250, 250),
}  # fmt: skip
SHAPES = ("square", "triangle", "cross", "ring")
NUMBERS = {1: "one", 2: "two", 3: "three"}
SIDES = ("left", "right")

CELL = 28
"""Side of a cell in pixels: one image token of Qwen2.5-VL (2 x 2 patches of 14 pixels)."""
GRID = 3
SIDE = CELL * GRID
OVERSAMPLING = 4  # drawn larger and averaged down, so that edges are smooth


@dataclass(frozen=True, slots=True)
class Thing:
    """One coloured shape. Column and row are of the grid; the rest is in pixels of the picture."""

    shape: str
    colour: str
    column: int
    row: int
    x: float  # centre
    y: float
    radius: float


@dataclass(frozen=True, slots=True)
class Scene:
    """The content of a picture."""

    things: tuple[Thing, ...]
    background: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its true answer, and the word of it that the hard negative replaces."""

    category: Category
    text: str
    answer: str
    truth: str  # a word of the answer, occurring once
    error: str  # what the hard negative says instead

    @property
    def rejected(self) -> str:
        """The true answer with its one targeted error."""
        return self.answer.replace(self.truth, self.error)

    @property
    def edit(self) -> dict[str, int | str]:
        start = self.answer.index(self.truth)
        return {"start": start, "end": start + len(self.truth), "from": self.truth, "to": self.error}


def random_scene(random: np.random.Generator, fewest: int = 2, most: int = 3) -> Scene:
    """Place ``fewest`` to ``most`` things in cells of their own, on a dark background."""
    cells = random.permutation(GRID * GRID)[: random.integers(fewest, most + 1)]
    shade = int(random.integers(45, 75))
    return Scene(tuple(_random_thing(random, *divmod(int(cell), GRID)) for cell in cells), (shade, shade, shade))


def _random_thing(random: np.random.Generator, row: int, column: int) -> Thing:
    radius = float(random.uniform(10.0, 12.5))
    slack = CELL / 2 - 0.5 - radius
    x, y = ((index + 0.5) * CELL + random.uniform(-slack, slack) for index in (column, row))
    return Thing(str(random.choice(SHAPES)), str(random.choice(list(COLOURS))), column, row, float(x), float(y), radius)


def draw(scene: Scene) -> Image.Image:
    """Draw the picture, SIDE x SIDE pixels, RGB."""
    large = Image.new("RGB", (SIDE * OVERSAMPLING, SIDE * OVERSAMPLING), scene.background)
    pen = ImageDraw.Draw(large)
    for thing in scene.things:
        x, y, radius = (OVERSAMPLING * value for value in (thing.x, thing.y, thing.radius))
        _draw_thing(pen, thing.shape, x, y, radius, COLOURS[thing.colour])
    return large.reduce(OVERSAMPLING)


def _draw_thing(
    pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, colour: tuple[int, int, int]
) -> None:
    """Draw a shape around (x, y), reaching ``radius`` pixels in each direction."""
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "square":
        pen.rectangle(box, fill=colour)
    elif shape == "triangle":
        pen.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill=colour)
    elif shape == "ring":
        pen.ellipse(box, outline=colour, width=round(0.4 * radius))
    else:
        arm = 0.3 * radius
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)


def ask(
    scene: Scene, category: Category, random: np.random.Generator, *, wants_yes: bool, hard: bool
) -> Question | None:
    """Ask a question of a category; return None if the picture has no unambiguous one.

    Args:
        scene: the content of the picture.
        category: kind of question.
        random: chooses the thing that is asked about, and the error.
        wants_yes: for ``existence``, whether the true answer is yes.
        hard: for ``existence`` with the answer no, ask about a colour and a shape that are both in the picture, on
            different things. Otherwise neither is.
    """
    if category == "existence":
        return _ask_existence(scene, random, wants_yes, hard)
    if category == "count":
        return _ask_count(scene, random)
    if category == "describe":
        return _ask_description(scene, random)
    by = "shape" if category == "colour" else "colour"
    names = Counter(getattr(thing, by) for thing in scene.things)
    unique = [thing for thing in scene.things if names[getattr(thing, by)] == 1]
    if category == "side":
        unique = [thing for thing in unique if thing.column != GRID // 2]
    if not unique:
        return None
    thing = unique[random.integers(len(unique))]
    if category == "side":
        truth, error = SIDES if thing.column == 0 else SIDES[::-1]
        text = f"Is the {thing.colour} object on the left or on the right?"
        return Question(category, text, f"The {thing.colour} object is on the {truth}.", truth, error)
    if category == "colour":
        error = _other(random, COLOURS, thing.colour)
        text, answer = f"What colour is the {thing.shape}?", f"The {thing.shape} is {thing.colour}."
        return Question(category, text, answer, thing.colour, error)
    error = _other(random, SHAPES, thing.shape)
    text, answer = f"What shape is the {thing.colour} object?", f"The {thing.colour} object is a {thing.shape}."
    return Question(category, text, answer, thing.shape, error)


def _ask_existence(scene: Scene, random: np.random.Generator, wants_yes: bool, hard: bool) -> Question | None:
    shown = {(thing.colour, thing.shape) for thing in scene.things}
    colours, shapes = ({pair[n] for pair in shown} for n in (0, 1))
    if wants_yes:
        choices = sorted(shown)
    elif hard:
        choices = sorted((colour, shape) for colour in colours for shape in shapes if (colour, shape) not in shown)
    else:
        choices = [
            (colour, shape) for colour in COLOURS for shape in SHAPES if not {colour, shape} & (colours | shapes)
        ]
    if not choices:
        return None
    colour, shape = choices[random.integers(len(choices))]
    truth, error = ("Yes", "No") if wants_yes else ("No", "Yes")
    return Question("existence", f"Is there a {colour} {shape}?", f"{truth}.", truth, error)


def _ask_count(scene: Scene, random: np.random.Generator) -> Question:
    truth = NUMBERS[len(scene.things)]
    error = _other(random, NUMBERS.values(), truth)
    return Question("count", "How many objects are there?", f"The number of objects is {truth}.", truth, error)


def _ask_description(scene: Scene, random: np.random.Generator) -> Question | None:
    named = [
        f"{thing.colour} {thing.shape}" for thing in sorted(scene.things, key=lambda thing: (thing.row, thing.column))
    ]
    if len(set(named)) < len(named):
        return None
    truth = named[random.integers(len(named))]
    colour, shape = truth.split()
    answer = "A " + ", a ".join(named) + "."
    return Question("describe", "What is in the picture?", answer, truth, f"{_other(random, COLOURS, colour)} {shape}")


def _other(random: np.random.Generator, words: Iterable[str], truth: str) -> str:
    others = [word for word in words if word != truth]
    return others[random.integers(len(others))]


def balanced(asked: list[tuple[int, Question]]) -> list[tuple[int, Question]]:
    """Leave out questions until every swap of two words happens equally often in both directions.

    Then no word is chosen more often than it is rejected, and an answer cannot be judged without looking.

    Args:
        asked: (number of the picture, question), in any order.
    """
    directions = Counter((q.category, q.truth, q.error) for _, q in asked)
    used: Counter[tuple[str, str, str]] = Counter()
    kept = []
    for picture, question in asked:
        swap = (question.category, question.truth, question.error)
        used[swap] += 1
        if used[swap] <= directions[question.category, question.error, question.truth]:
            kept.append((picture, question))
    return kept
