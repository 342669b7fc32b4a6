"""The demo's data on disk: pictures with questions, instructions, and the pairs that ``vapr edit`` makes of them."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vapr.data.pair import PreferencePair
from vapr.data.pairs import Pairs, write_pairs
from vapr.demo.questions import CATEGORIES, Question, ask
from vapr.demo.scenes import Scene, draw, random_scene
from vapr.editing.config import EditConfig, PlanConfig
from vapr.editing.job.run import run
from vapr.editing.job.start import Start

KINDS_CATEGORY = Path(__file__).parent / "kinds.yaml"
"""The category that the demo adds to those of ``vapr edit``."""

MOST = 3
"""Most things in a picture."""

CLAUSE = " in the picture."
"""What a length-biased rejected answer ends with, besides its error: true or not, it only makes the answer longer."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question about a picture of a set."""

    picture: int
    scene: Scene
    question: Question


def draw_pictures(
    folder: Path, random: np.random.Generator, num_pictures: int, *,
    yes_share: float, hard: bool, grow: bool = False, other_than: Iterable[Asked] = (),
) -> list[Asked]:  # fmt: skip
    """Write pictures into a new folder and ask up to seven questions about each.

    Args:
        folder: created.
        random: source of everything random.
        num_pictures: how many.
        yes_share: share of existence questions whose true answer is yes.
        hard: whether absent things are made of a colour and a kind that are present.
        grow: begin with one thing in a picture, end with up to ``MOST``, and ask for descriptions: how the policy
            learns to see. Else two to ``MOST`` things throughout.
        other_than: pictures whose contents are not drawn again.
    """
    folder.mkdir()
    seen = {contents(asked.scene) for asked in other_than}
    found: list[Asked] = []
    for number in range(num_pictures):
        most = min(MOST, 1 + (MOST + 2) * number // num_pictures) if grow else MOST
        scene = random_scene(random, 1 if grow else 2, most)
        while contents(scene) in seen:
            scene = random_scene(random, 1 if grow else 2, most)
        draw(scene).save(folder / f"{number:05d}.png")
        asked = [
            ask(scene, category, random, yes_share=yes_share, hard=hard)
            for category in (*CATEGORIES, "existence", *(("describe",) if grow else ()))
        ]
        by_text = {question.text: question for question in asked if question is not None}
        found += [Asked(number, scene, question) for question in by_text.values()]
    return found


def contents(scene: Scene) -> frozenset[tuple[str, int, int]]:
    """Return what a picture shows where; two pictures of the same contents are the same to every question."""
    return frozenset((thing.name, thing.column, thing.row) for thing in scene.things)


def write_instructions(folder: Path, asked: Sequence[Asked]) -> Path:
    """Write ``instructions.jsonl``: questions with true answers, as people have them before any editing."""
    path = folder / "instructions.jsonl"
    lines = (
        {
            "id": f"{number:06d}",
            "image": f"{one.picture:05d}.png",
            "question": one.question.text,
            "answer": one.question.answer,
            "source": "demo",
        }
        for number, one in enumerate(asked)
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def edit(instructions: Path, out: Path, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Make pairs with the rules editor, as ``vapr edit`` does; return the job's ledger."""
    config = EditConfig(seed=seed, plan=PlanConfig(add_categories=[str(KINDS_CATEGORY)]))
    return run(Start(source=str(instructions), folder=out, config=config), say)


def subset(pairs: Pairs, pictures: int) -> list[dict[str, Any]]:
    """Return rows of the pairs about the first pictures, so that smaller sets lie inside larger ones."""
    return [_row(pair) for pair in pairs if int(Path(str(pair.images[0])).stem) < pictures]


def length_biased(pairs: Pairs) -> list[dict[str, Any]]:
    """Return the same pairs with rejected answers that are longer, besides being wrong: length tells them, too."""
    rows = [_row(pair) for pair in pairs]
    return [
        {
            **row,
            "rejected": row["rejected"].removesuffix(".") + CLAUSE,
        }
        for row in rows
    ]


def write_set(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write ``pairs.jsonl`` into a folder; return the file."""
    folder.mkdir(exist_ok=True)
    write_pairs(folder / "pairs.jsonl", rows)
    return folder / "pairs.jsonl"


def _row(pair: PreferencePair) -> dict[str, Any]:
    return {
        "id": pair.id,
        "images": [str(pair.images[0])],
        "prompt": list(pair.prompt),
        "chosen": pair.chosen[0]["content"][0]["text"],
        "rejected": pair.rejected[0]["content"][0]["text"],
        "category": pair.category,
    }


def without_rejected(asked: Sequence[Asked]) -> list[dict[str, Any]]:
    """Return rows of questions with true answers; sft and the held-out questions have no use for rejected ones."""
    return [
        {
            "id": f"{number:06d}",
            "images": [f"{one.picture:05d}.png"],
            "prompt": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": one.question.text}]}
            ],
            "chosen": one.question.answer,
            "rejected": "-",
            "category": one.question.category,
        }
        for number, one in enumerate(asked)
    ]  # fmt: skip
