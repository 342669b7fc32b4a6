"""Small pair sets with planted facts, for the audit's tests."""

import random
from pathlib import Path

from vapr.audit.measure import audit
from vapr.data.pairs import write_pairs
from vapr.data.sources import read_pairs

COLOURS = ("red", "blue", "green", "black", "white", "brown")
THINGS = ("dog", "cat", "car", "boat", "hat", "cup")


def row(n: int, chosen: str, rejected: str, **more) -> dict:
    image = f"{'ab'[n % 2]}/{n // 2 % 60}.png"
    return {
        "id": str(n),
        "images": [image],
        "prompt": f"What is it, {n}?",
        "chosen": chosen,
        "rejected": rejected,
        **more,
    }


def opened(folder: Path, rows: list[dict], name: str = "pairs.jsonl"):
    write_pairs(folder / name, rows)
    return read_pairs(folder / name)


def audited(folder: Path, rows: list[dict], **options) -> dict:
    return audit({"set": opened(folder, rows)}, **options)["sets"]["set"]


def gates(one: dict) -> dict[str, str]:
    return {gate["name"]: gate["status"] for gate in one["gates"]}


def colour_rows(count: int, replace, seed: int = 0) -> list[dict]:
    """Chosen colours are unevenly frequent; ``replace(colours, rng)`` gives the rejected ones."""
    rng = random.Random(seed)
    colours = rng.choices(COLOURS, weights=(8, 5, 3, 2, 1, 1), k=count)
    return [
        row(n, f"The {thing} is {old} today.", f"The {thing} is {new} today.", category=("odd", "even")[n % 3 == 0])
        for n, (old, new) in enumerate(zip(colours, replace(colours, rng), strict=True))
        if new is not None
        for thing in (rng.choice(THINGS),)
    ]


def uniform(colours, rng):
    return [rng.choice([new for new in COLOURS if new != old]) for old in colours]


def swapped(colours, rng):
    """Rows trade colours two by two; those that find no partner are left out."""
    rest = {colour: [n for n, own in enumerate(colours) if own == colour] for colour in COLOURS}
    new = [None] * len(colours)
    while len(live := sorted((c for c in COLOURS if rest[c]), key=lambda c: -len(rest[c]))) > 1:
        first, second = rest[live[0]].pop(), rest[live[1]].pop()
        new[first], new[second] = colours[second], colours[first]
    return new
