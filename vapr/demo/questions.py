"""Questions about scenes with true answers, in several ordinary phrasings, and what a given answer says."""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vapr.demo.scenes import COLOURS, GRID, KINDS, Scene

Category = Literal["existence", "colour", "kind", "count", "side", "describe"]
CATEGORIES: tuple[Category, ...] = ("existence", "colour", "kind", "count", "side")
"""What is measured. ``describe`` is asked in the sft stage only: naming everything teaches most."""

NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
PHRASINGS: dict[Category, tuple[str, ...]] = {
    "existence": ("{value}.", "{value}, there is{negation}.", "{value}, it is{negation} there."),
    "colour": ("It is {value}.", "The {subject} is {value}.", "The color is {value}."),
    "kind": ("A {value}.", "It is a {value}.", "The {subject} toy is a {value}."),
    "count": ("There are {value}.", "There are {value} toys.", "There are {value} toys in the picture."),
    "side": ("On the {value}.", "It is on the {value}.", "The {subject} toy is on the {value}."),
}
"""Ways to say a value. People say the same thing in different ways, and so do answers in instruction data."""
COLUMNS = ("on the left", "in the middle", "on the right")
VALUES: dict[Category, tuple[str, ...]] = {
    "existence": ("yes", "no"),
    "colour": tuple(COLOURS),
    "kind": KINDS,
    "count": tuple(NUMBERS.values()),
    "side": ("left", "right"),
}


@dataclass(frozen=True, slots=True)
class Question:
    """A question with the value that is true, and how the true answer words it."""

    category: Category
    text: str
    subject: str  # what is asked about, as a phrasing names it
    truth: str
    phrasing: int = 0
    description: str = ""  # the answer to "describe"

    @property
    def answer(self) -> str:
        return self.description or self.say(self.truth, self.phrasing)

    def say(self, value: str, phrasing: int) -> str:
        """Word a value as an answer."""
        said = PHRASINGS[self.category][phrasing].format(
            value=value, subject=self.subject, negation=" not" if value == "no" else ""
        )
        said = said[0].upper() + said[1:]
        return said.replace("are one", "is one").replace("one toys", "one toy")


def read_answer(question: Question, answer: str) -> str | None:
    """Return the value that an answer gives; None if it is none of the answers that anybody would give: garbled."""
    for value in VALUES[question.category]:
        for phrasing in range(len(PHRASINGS[question.category])):
            if answer == question.say(value, phrasing):
                return value
    return None


def ask(
    scene: Scene, category: Category, random: np.random.Generator, *, yes_share: float, hard: bool
) -> Question | None:
    """Ask a question of a category; return None if the picture has no unambiguous one.

    Args:
        scene: the content of the picture.
        category: kind of question.
        random: chooses the thing that is asked about and the wording.
        yes_share: for ``existence``, the probability that the true answer is yes.
        hard: for ``existence`` with the answer no, ask about a colour and a kind that are both in the picture, on
            different things. Otherwise neither is.
    """
    if category == "describe":
        return _describe(scene)
    phrasing = int(random.integers(len(PHRASINGS[category])))
    if category == "existence":
        absent = _absent(scene, hard)
        if not absent:  # asked only where both answers were possible, so that yes keeps its share
            return None
        wants_yes = bool(random.random() < yes_share)
        named = _choose(random, sorted(scene.names) if wants_yes else absent)
        return Question(category, f"Is there a {named}?", named, "yes" if wants_yes else "no", phrasing)
    if category == "count":
        return Question(category, "How many toys are there?", "", NUMBERS[len(scene.things)], phrasing)
    by = "kind" if category == "colour" else "colour"
    names = Counter(getattr(thing, by) for thing in scene.things)
    things = [thing for thing in scene.things if names[getattr(thing, by)] == 1]
    if category == "side":
        things = [thing for thing in things if thing.column != GRID // 2]
    if not things:
        return None
    thing = things[random.integers(len(things))]
    if category == "side":
        text = f"Is the {thing.colour} toy on the left or on the right?"
        return Question(category, text, thing.colour, "left" if thing.column == 0 else "right", phrasing)
    if category == "colour":
        return Question(category, f"What color is the {thing.kind}?", thing.kind, thing.colour, phrasing)
    return Question(category, f"What is the {thing.colour} toy?", thing.colour, thing.kind, phrasing)


def _absent(scene: Scene, hard: bool) -> list[str]:
    """Return names of what is not there: of a colour and a kind that are, or of neither."""
    colours, kinds = {thing.colour for thing in scene.things}, {thing.kind for thing in scene.things}
    if hard:
        return sorted(
            f"{colour} {kind}" for colour in colours for kind in kinds if f"{colour} {kind}" not in scene.names
        )
    return [f"{colour} {kind}" for colour in COLOURS for kind in KINDS if colour not in colours and kind not in kinds]


def _choose(random: np.random.Generator, names: list[str]) -> str:
    return names[random.integers(len(names))]


def _describe(scene: Scene) -> Question:
    """Name everything, row by row: where, then what, so that both are learned by looking at the next thing."""
    things = sorted(scene.things, key=lambda thing: (thing.row, thing.column))
    named = ", ".join(f"{COLUMNS[thing.column]} a {thing.name}" for thing in things)
    return Question("describe", "What is in the picture?", "", "", description=f"{named[0].upper()}{named[1:]}.")
