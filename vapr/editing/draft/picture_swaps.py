"""Pairs turns whose answers say two things of one noun, so that each picture refutes the other's answer.

"The car is red" is false of a picture whose car is blue, and the other way round: as often as a picture is a rejected
one it is a chosen one, and no picture gives itself away.
"""

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vapr.editing.draft.trades import Planner, Trade, match
from vapr.editing.rules.turns import Turn, bare

Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Claim:
    """What a turn says: a value of a closed set, of a noun or in answer to a question."""

    key: Key  # market of the value, and noun or question: only within one a picture refutes the other answer
    value: str
    decided_by: str


class Swaps:
    """Finds the turn whose picture takes the place of a turn's own.

    Args:
        planner: finds what an answer claims.
        turns: of a shard.
    """

    def __init__(self, planner: Planner, turns: Sequence[Turn]) -> None:
        self._turns = turns
        self._offers: dict[int, Trade] = {}
        self.claims: dict[int, Claim] = {}
        self.reasons: dict[int, str] = {}  # why a turn claims nothing that another picture could refute
        self._said: dict[tuple[tuple[str | bytes, ...], Key], list[Trade]] = defaultdict(list)
        for number, turn in enumerate(turns):
            plan = planner.by_rules(turn, number)
            while plan.offers and plan.category is not None and plan.category.min_edits > 1 and plan.try_another():
                pass
            if not plan.offers or plan.category is None or plan.category.min_edits > 1:
                self.reasons[number] = plan.reason or "several claims"
                continue
            offer = plan.offers[0]
            self._offers[number] = offer
            self.claims[number] = Claim(_key(turn, offer), offer.value.name, plan.decided_by)
            for one in plan.offers:
                self._said[turn.image_names, _key(turn, one)].append(one)

    def match(self, numbers: Sequence[int], seed: str) -> Mapping[int, int]:
        """Return the partner of each of these turns that finds one among the others."""
        groups: dict[Key, list[Trade]] = defaultdict(list)
        for number in numbers:
            if number in self._offers:
                self._offers[number].partner = None
                groups[self.claims[number].key].append(self._offers[number])
        rng = random.Random(seed)
        found: dict[int, int] = {}
        for key in sorted(groups):
            match(groups[key], rng)
            for offer in groups[key]:
                if offer.partner is not None and self._refute_each_other(offer, offer.partner, key):
                    found[offer.turn] = offer.partner.turn
        return found

    def _refute_each_other(self, one: Trade, other: Trade, key: Key) -> bool:
        names, other_names = (self._turns[trade.turn].image_names for trade in (one, other))
        if names == other_names or len(names) != len(other_names):
            return False
        return not (self._is_said_of(names, other, key) or self._is_said_of(other_names, one, key))

    def _is_said_of(self, image_names: tuple[str | bytes, ...], offer: Trade, key: Key) -> bool:
        """Tell whether some answer says the same of these images: two cars may be in one picture."""
        return any(offer.value.set.alike(said.value.name, offer.value.name) for said in self._said[image_names, key])


def _key(turn: Turn, offer: Trade) -> Key:
    return offer.market, offer.noun or bare(turn.question)
