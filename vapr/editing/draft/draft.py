"""A turn on its way to a pair."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vapr.data.pair import Edit
from vapr.editing.draft.checks import Verdict
from vapr.editing.draft.trades import Plan
from vapr.editing.rules.categories import Category
from vapr.editing.rules.turns import Turn

RULES = "rules"
"""The name of the editor that has no language model."""


@dataclass(slots=True)
class Picture:
    """What a draft shows beside its rejected answer in place of its own images."""

    images: tuple[Path, ...]
    plan: dict[str, Any]  # plain data: how it was made


@dataclass(slots=True)
class Draft:
    """A turn on its way to a pair, or one of the candidates for it."""

    turn: Turn
    plan: Plan = field(default_factory=Plan)
    rejected: str | None = None
    edits: list[Edit] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    attempts: int = 0
    raw: str | None = None  # the model's last reply
    why: list[str] = field(default_factory=list)  # why the result is wrong, in the model's words
    refused: list[str] = field(default_factory=list)  # why earlier edits were
    status: str = "open"  # accepted | rejected | failed | partner_lost | over_target
    # and of a candidate: chosen | not_chosen | same | refused (asked for again) | lost (with its draft)
    reason: str | None = None
    picture: Picture | None = None  # where the answer stays and the images change
    restored: bool = False  # from an earlier round, which has noted its plan
    model: str | None = None  # the language model that the turn is given to, if there is any
    candidates: list["Draft"] = field(default_factory=list)  # all that the model was asked for
    score: int | None = None  # a judge's points

    def end(self, status: str, reason: str) -> None:
        self.status, self.reason, self.rejected, self.edits = status, reason, None, []

    def take(self, candidate: "Draft") -> None:
        """Become what a candidate is: a pair, or no pair for the same reason."""
        self.rejected, self.edits, self.why = candidate.rejected, candidate.edits, candidate.why
        self.raw, self.attempts, self.verdicts = candidate.raw, candidate.attempts, candidate.verdicts
        self.status, self.reason, self.score = candidate.status, candidate.reason, candidate.score

    @property
    def category(self) -> Category:
        """The category of a draft that has one."""
        assert self.plan.category is not None
        return self.plan.category

    @property
    def editor(self) -> str | None:
        """Who has edited it: a language model or :data:`RULES`; None: nobody has."""
        if self.attempts:
            return self.model
        return RULES if self.picture is not None or (self.plan.trades and not self.plan.ask) else None
