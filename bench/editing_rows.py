"""Instruction data for the editing benchmarks: varied questions with true answers about a fixed number of images."""

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

NOUNS = (
    "dog", "cat", "horse", "bicycle", "bus", "car", "truck", "boat", "chair", "table", "lamp", "cup", "bottle", "plate",
    "hat", "jacket", "umbrella", "backpack", "kite", "surfboard", "banana", "apple", "sandwich", "cake", "flower",
    "bench", "sign", "clock", "phone", "book", "vase", "pillow", "guitar", "ball", "bird", "sheep", "balloon", "towel",
    "basket", "suitcase",
)  # fmt: skip
PLACES = (
    "near the window", "beside the wall", "in the yard", "on the grass", "by the door", "along the street",
    "at the corner", "behind the fence",
)  # fmt: skip
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "purple")
NUMBERS = ("two", "three", "four", "five", "six", "seven")
PEOPLE = ("man", "woman", "boy", "girl", "player", "waiter", "tourist", "farmer")
SHORT = "\nAnswer the question using a single word or phrase."


def plural(noun: str) -> str:
    """The plural of one of :data:`NOUNS`."""
    if noun == "sheep":
        return noun
    return f"{noun}{'es' if noun.endswith(('s', 'ch')) else 's'}"


def colour(noun: str, place: str, draws: random.Random) -> tuple[str, str]:
    value = draws.choice(COLOURS)
    if draws.random() < 0.5:
        return f"What color is the {noun} {place}?{SHORT}", value.capitalize()
    return f"What color is the {noun} {place}?", f"The {noun} {place} is {value}."


def count(noun: str, place: str, draws: random.Random) -> tuple[str, str]:
    value = draws.choice(NUMBERS)
    if draws.random() < 0.5:
        return f"How many {plural(noun)} are {place}?{SHORT}", str(2 + NUMBERS.index(value))
    return f"How many {plural(noun)} are {place}?", f"There are {value} {plural(noun)} {place}."


def existence(noun: str, place: str, draws: random.Random) -> tuple[str, str]:
    if draws.random() < 0.5:
        return f"Is there a {noun} {place}?{SHORT}", draws.choice(("Yes", "No"))
    answer = draws.choice((f"Yes, there is a {noun} {place}.", f"No, there is no {noun} {place}."))
    return f"Is there a {noun} {place}?", answer


def side(noun: str, place: str, draws: random.Random) -> tuple[str, str]:
    return f"Where is the {noun} that stands {place}?", f"The {noun} is on the {draws.choice(('left', 'right'))} side."


def held(noun: str, place: str, draws: random.Random) -> tuple[str, str]:
    """No closed set: rules leave it alone, and a language model is asked."""
    person, thing = draws.choice(PEOPLE), draws.choice(NOUNS)
    return f"What is the {person} with the {noun} {place} carrying?", f"The {person} is carrying a {thing}."


def scene(noun: str, place: str, draws: random.Random) -> tuple[str, str]:
    first, second = draws.sample(COLOURS, 2)
    number, where = draws.choice(NUMBERS), draws.choice(("left", "right"))
    answer = (
        f"A {first} {noun} stands {place}. On the {where} side of it, {number} people wait, and one of them holds a "
        f"{second} umbrella. The rest of the picture is empty, apart from a few leaves on the ground."
    )
    return f"Describe the picture, starting with the {noun} {place}.", answer


KINDS = (colour, count, existence, side, held, scene)


def row(image: str, number: int, kind: Any, noun: str, place: str) -> dict[str, Any]:
    """A LLaVA row. The same question about the same image always has the same answer."""
    question, answer = kind(noun, place, random.Random(f"{image}|{kind.__name__}|{noun}|{place}"))
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": f"row-{number}", "image": image, "conversations": turns}


def rows(num_rows: int, images: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of all kinds, no two alike; at most one for each image, kind, noun and place."""
    combinations = list(itertools.product(KINDS, NOUNS, PLACES))
    random.Random(0).shuffle(combinations)
    assert num_rows <= len(images) * len(combinations)
    for number in range(num_rows):
        block, image = divmod(number, len(images))
        kind, noun, place = combinations[(block + 31 * image) % len(combinations)]
        yield row(images[image], number, kind, noun, place)


def open_rows(num_rows: int, images: list[str]) -> Iterator[dict[str, Any]]:
    """Rows that only a language model can edit."""
    for number, (noun, place) in zip(range(num_rows), itertools.cycle(itertools.product(NOUNS, PLACES)), strict=False):
        yield row(images[number % len(images)], number, held, noun, place)


def write_images(folder: Path, number: int) -> list[str]:
    """So many pictures of 16 x 16 pixels; their names."""
    names = [f"{n:04}.png" for n in range(number)]
    for n, name in enumerate(names):
        Image.new("RGB", (16, 16), (n % 256, n // 256 * 16, 128)).save(folder / name)
    return names


def write_rows(file: Path, lines: Iterator[dict[str, Any]]) -> Path:
    """Rows as jsonl, written one by one."""
    with file.open("w", encoding="utf-8") as stream:
        for line in lines:
            stream.write(json.dumps(line) + "\n")
    return file
