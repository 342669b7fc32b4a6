"""The pairs with the largest and the smallest margins of an epoch, kept while training."""

import heapq
from collections.abc import Sequence
from typing import Any

from vapr.data.images import read_image
from vapr.data.pair import PreferencePair
from vapr.errors import UserError
from vapr.pages.page import thumbnail
from vapr.pages.run_report import ShownPair

KEPT = 8


class Extremes:
    """The pairs with the largest and smallest margins, as the step that trained on them measured before its update."""

    def __init__(self) -> None:
        self.epoch = -1
        self.largest: list[list[Any]] = []  # [margin, row number, step], the largest first
        self.smallest: list[list[Any]] = []  # the smallest first

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a state that :meth:`state` returned."""
        self.epoch, self.largest, self.smallest = state["epoch"], state["largest"], state["smallest"]

    def add(self, epoch: int, step: int, margins: list[tuple[int, float]]) -> None:
        """Add a step's margins, (row number, margin). A new epoch begins anew, so that no pair is listed twice."""
        if epoch != self.epoch:
            self.epoch, self.largest, self.smallest = epoch, [], []
        entries = [[margin, number, step] for number, margin in margins]
        self.largest = heapq.nlargest(KEPT, self.largest + entries)
        self.smallest = heapq.nsmallest(KEPT, self.smallest + entries)

    def state(self) -> dict[str, Any]:
        """Return plain data for a checkpoint."""
        return {"epoch": self.epoch, "largest": self.largest, "smallest": self.smallest}


def shown_pairs(extremes: Extremes, pairs: Sequence[PreferencePair]) -> list[ShownPair]:
    """Read the pairs again, with small pictures; a pair that cannot be read any more says so in its place."""
    entries = {number: (margin, step) for margin, number, step in [*extremes.largest, *extremes.smallest]}
    return [_shown(pairs, number, margin, step) for number, (margin, step) in entries.items()]


def _shown(pairs: Sequence[PreferencePair], number: int, margin: float, step: int) -> ShownPair:
    try:
        pair = pairs[number]
    except UserError as error:
        return ShownPair(margin, step, "", "", "", "", "", (), f"cannot be read any more: {error}")
    question, chosen, rejected = (_text(messages) for messages in (pair.prompt, pair.chosen, pair.rejected))
    pictures: tuple[str, ...] = ()
    problem = None
    try:
        pictures = tuple(thumbnail(read_image(image)) for image in (*pair.images, *(pair.rejected_images or ())))
    except UserError as error:
        problem = str(error)
    return ShownPair(margin, step, pair.id, pair.where, question, chosen, rejected, pictures, problem)


def _text(messages: Sequence[dict[str, Any]]) -> str:
    """Join the texts of messages; where there are several, each names its speaker."""
    texts = ["".join(part.get("text", "") for part in message["content"]) for message in messages]
    if len(texts) == 1:
        return texts[0]
    return "\n".join(f"{message['role']}: {text}" for message, text in zip(messages, texts, strict=True))
