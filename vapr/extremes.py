"""The pairs with the largest and the smallest margins of an epoch, kept while training."""

import heapq
from typing import Any

KEPT = 8


class Extremes:
    """Margins are those of the step that trained on the pair, before its update."""

    def __init__(self) -> None:
        self.epoch = -1
        self.largest: list[list[Any]] = []  # [margin, row number, step], the largest first
        self.smallest: list[list[Any]] = []  # the smallest first

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self.epoch, self.largest, self.smallest = state["epoch"], state["largest"], state["smallest"]

    def add(self, epoch: int, step: int, margins: list[tuple[int, float]]) -> None:
        """Note a step's margins as (row number, margin). A new epoch begins anew, so that no pair is listed twice."""
        if epoch != self.epoch:
            self.epoch, self.largest, self.smallest = epoch, [], []
        entries = [[margin, number, step] for number, margin in margins]
        self.largest = heapq.nlargest(KEPT, self.largest + entries)
        self.smallest = heapq.nsmallest(KEPT, self.smallest + entries)

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"epoch": self.epoch, "largest": self.largest, "smallest": self.smallest}
