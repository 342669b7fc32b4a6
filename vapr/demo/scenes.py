"""Drawn pictures: a grid of cells with one coloured thing in some of them. Pure and seeded: same seed, same bytes."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

# Colours that differ clearly, each of which can be the error for at least four others: what vapr edit holds to be near
# one another (red and pink) it does not trade.
COLOURS = {
    "red": (255, 70, 70), "green": (70, 220, 90), "blue": (80, 140, 255),
    "yellow": (255, 225, 60), "pink": (255, 130, 230), "white": (250, 250, 250),
}  # fmt: skip
KINDS = ("box", "ball", "kite", "ring")

CELL = 28
"""Side of a cell in pixels: one image token of Qwen2.5-VL (2 x 2 patches of 14 pixels)."""
GRID = 3
SIDE = CELL * GRID
OVERSAMPLING = 4  # drawn larger and averaged down, so that edges are smooth


@dataclass(frozen=True, slots=True)
class Thing:
    """One coloured thing. Column and row are of the grid; the rest is in pixels of the picture."""

    kind: str
    colour: str
    column: int
    row: int
    x: float  # centre
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True, slots=True)
class Scene:
    """The content of a picture."""

    things: tuple[Thing, ...]
    background: tuple[int, int, int]

    @property
    def names(self) -> set[str]:
        """What is there: "red box"."""
        return {thing.name for thing in self.things}


def random_scene(random: np.random.Generator, fewest: int, most: int) -> Scene:
    """Place ``fewest`` to ``most`` things in cells of their own, on a dark background."""
    cells = random.permutation(GRID * GRID)[: random.integers(fewest, most + 1)]
    shade = int(random.integers(45, 75))
    return Scene(tuple(_random_thing(random, *divmod(int(cell), GRID)) for cell in cells), (shade, shade, shade))


def _random_thing(random: np.random.Generator, row: int, column: int) -> Thing:
    radius = float(random.uniform(10.0, 12.5))
    slack = CELL / 2 - 0.5 - radius
    x, y = ((index + 0.5) * CELL + random.uniform(-slack, slack) for index in (column, row))
    return Thing(str(random.choice(KINDS)), str(random.choice(list(COLOURS))), column, row, float(x), float(y), radius)


def draw(scene: Scene) -> Image.Image:
    """Draw the picture, SIDE x SIDE pixels, RGB."""
    large = Image.new("RGB", (SIDE * OVERSAMPLING, SIDE * OVERSAMPLING), scene.background)
    pen = ImageDraw.Draw(large)
    for thing in scene.things:
        x, y, radius = (OVERSAMPLING * value for value in (thing.x, thing.y, thing.radius))
        _draw_thing(pen, thing.kind, x, y, radius, COLOURS[thing.colour])
    return large.reduce(OVERSAMPLING)


def _draw_thing(
    pen: ImageDraw.ImageDraw, kind: str, x: float, y: float, radius: float, colour: tuple[int, int, int]
) -> None:
    """Draw a thing around (x, y), reaching ``radius`` pixels in each direction."""
    frame = (x - radius, y - radius, x + radius, y + radius)
    if kind == "box":
        pen.rectangle(frame, fill=colour)
    elif kind == "ball":
        pen.ellipse(frame, fill=colour)
    elif kind == "ring":
        pen.ellipse(frame, outline=colour, width=round(0.4 * radius))
    else:
        half = 0.7 * radius
        pen.polygon([(x, y - radius), (x + half, y - 0.2 * radius), (x, y + radius), (x - half, y - 0.2 * radius)],
                    fill=colour)  # fmt: skip
