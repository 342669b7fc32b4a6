"""Plans the edits of many turns at once: values of closed sets are traded between rows, the rest is asked for.

When two rows trade values, each value is as often chosen as rejected, so that no word tells which answer is which.
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from vapr.editing.draft.checks import VAGUE
from vapr.editing.rules.agreement import CannotEdit, in_the_case_of, number
from vapr.editing.rules.categories import Categories, Category, Value
from vapr.editing.rules.dependence import adds_up, argued, choices, replacements, told_before
from vapr.editing.rules.nouns import OTHER, Nouns
from vapr.editing.rules.operations import Operation, apply
from vapr.editing.rules.polarity import YES_OR_NO, flip
from vapr.editing.rules.turns import Turn
from vapr.editing.rules.word_sense import is_adjective, is_name, said_of
from vapr.text import polarity

NO_PARTNER = "no other row to trade values with"
NEEDS_MODEL = "needs a language model"
NEITHER = "the answer says neither yes nor no"
NO_CATEGORY = "no category fits"
PARTNER_LOST = "the other half of its trade was refused"
MAX_QUESTION = 8_000
LONG_QUESTION = f"question longer than {MAX_QUESTION:,} characters"  # rules would take their time over it


@dataclass(eq=False, slots=True)
class Trade:
    """A value of a turn that may take another row's place, and that row's value its own."""

    turn: int
    value: Value
    market: str  # values are traded inside one market only
    targets: frozenset[str]  # which of them may take its place
    noun: str | None = None  # that the value is said of, where the market is of a class of nouns
    target: str | None = None
    partner: "Trade | None" = None
    operations: list[Operation] | None = None  # where it takes more than to put the target in the value's place


@dataclass(slots=True)
class Plan:
    """What is to be done with one turn."""

    category: Category | None = None
    decided_by: str = ""  # "count:asks-how-many", "value:colours" or "model NAME"
    offers: list[Trade] = field(default_factory=list)  # what could be traded
    trades: list[Trade] = field(default_factory=list)  # what is
    ask: bool = False  # the language model writes the edit
    reason: str | None = None  # why nothing is done
    others: Iterator["Plan"] = field(default_factory=lambda: iter(()))  # further categories, if this finds no partner
    first: tuple[Category | None, str] | None = None  # category and decided_by, once another category is tried

    def try_another(self) -> bool:
        """Become the plan of the next category that the turn fits; False if there is none."""
        other = next(self.others, None)
        if other is None:
            return False
        self.first = self.first or (self.category, self.decided_by)
        self.category, self.decided_by, self.offers = other.category, other.decided_by, other.offers
        return True

    @property
    def must_begin(self) -> str | None:
        """ "yes" or "no", where the language model has to write an answer that begins so."""
        return self.trades[0].target if self.ask and self.trades else None

    def operations(self) -> list[Operation]:
        """The edits of the trades."""
        found = []
        for trade in self.trades:
            if trade.operations is not None:
                found += trade.operations
            elif trade.target is not None:
                value = trade.value
                found.append(Operation(value.text, in_the_case_of(value.text, trade.target), start=value.start))
        return found


class Planner:
    """Decides categories and trades.

    Args:
        categories: of the job.
        nouns: for noun classes.
        model: name of the language model that writes what rules cannot; None: there is none.
        balance: ``swap`` or ``uniform``, see :class:`vapr.editing.config.PlanConfig`.
    """

    def __init__(self, categories: Categories, nouns: Nouns, model: str | None, balance: str) -> None:
        self.categories = categories
        self.nouns = nouns
        self.model = model
        self.balance = balance

    def by_rules(self, turn: Turn, number: int) -> Plan:
        """The plan of one turn as far as rules decide it; a plan without category or reason waits for a label."""
        if len(turn.question) > MAX_QUESTION:
            return Plan(reason=LONG_QUESTION)
        first = None
        rules = self.categories.by_rule(turn.question, turn.answer)
        for category, rule in rules:
            offers = self.offers(turn, number, category)
            if offers or self.model is not None:
                plan = self._plan(category, rule, offers)
                plan.others = self._others(turn, number, {category.name}, rules)
                return plan
            first = first or Plan(category, rule, reason=NEEDS_MODEL)
        if first is not None:
            return first
        return Plan() if self.model is not None else self._by_value(turn, number)

    def labelled(self, turn: Turn, number: int, name: str | None) -> Plan:
        """The plan of a turn that the language model has put into a category."""
        decided_by = f"model {self.model}"
        if name is None:
            return Plan(decided_by=decided_by, reason=NO_CATEGORY)
        category = self.categories[name]
        plan = self._plan(category, decided_by, self.offers(turn, number, category))
        plan.others = self._others(turn, number, {name}, iter(()))
        return plan

    def _plan(self, category: Category, decided_by: str, offers: list[Trade]) -> Plan:
        plan = Plan(category, decided_by, offers)
        if "polarity" in category.checks and not offers:
            plan.reason = NEEDS_MODEL if self.model is None else NEITHER
            return plan
        plan.ask = len(offers) < category.min_edits or any(trade.operations == [] for trade in offers)
        if not plan.ask or "polarity" in category.checks:
            return plan  # a model that has to write a yes or no is told which, so that they trade all the same
        plan.offers = []
        if self.model is None:
            plan.reason = NEEDS_MODEL
        return plan

    def _by_value(self, turn: Turn, number: int) -> Plan:
        """Where no rule fits and no model is there to ask: a category one of whose values the answer holds."""
        possible = list(self._with_values(turn, number))
        if not possible:
            return Plan(reason=NO_CATEGORY)
        first = random.Random(turn.digest()).choice(possible)
        first.others = (plan for plan in possible if plan is not first)
        return first

    def _with_values(self, turn: Turn, number: int, tried: Collection[str] = ()) -> Iterator[Plan]:
        """Plans of one trade in the categories, but for those tried, one of whose values the answer holds."""
        for category in self.categories.all:
            single = category.min_edits == 1 and "polarity" not in category.checks and category.name not in tried
            if single and (offers := self.offers(turn, number, category)):
                yield Plan(category, f"value:{offers[0].value.set.name}", offers)

    def _others(
        self, turn: Turn, number: int, tried: set[str], rules: Iterator[tuple[Category, str]]
    ) -> Iterator[Plan]:
        """Plans of what else a turn could trade: by the rules that are left, then by any value in its answer."""
        for category, rule in rules:
            tried.add(category.name)
            offers = self.offers(turn, number, category)
            if len(offers) >= category.min_edits:
                yield Plan(category, rule, offers)
        yield from self._with_values(turn, number, tried)

    def offers(self, turn: Turn, number: int, category: Category) -> list[Trade]:
        """What an answer could trade in a category: values that stand in it once, with what they belong to."""
        if "polarity" in category.checks:
            return self._polarity_offers(turn, number, category)
        if polarity(turn.answer) is not None:
            return []  # "Yes, there are fewer" would contradict itself
        offers: list[Trade] = []
        if not (values := category.find_values(turn.answer)):
            return offers
        asked, said = category.named(turn.question), category.named(turn.answer)
        for value in values:
            options = choices(turn, value)
            targets = replacements(turn, value, options, asked, said)
            if not targets or self._in_doubt(turn, value, options):
                continue
            noun = self._noun(turn, value) if value.set.by_noun else None
            if (market := self._market(turn, value, options, noun)) is not None:
                # Captions lose trades when they find too few: they would take single ones with them.
                several = "|several" if category.min_edits > 1 else ""
                offers.append(Trade(number, value, market + several, targets, noun))
        return offers if category.min_edits > 1 else self._asked_for(turn, offers)

    def _in_doubt(self, turn: Turn, value: Value, options: set[str]) -> bool:
        """Whether the value means something else in its place, or other words depend on it."""
        answer, closed = turn.answer, value.set
        return (
            VAGUE.search(answer[: value.start]) is not None
            or is_name(answer, value.start, value.text)
            or (closed.adjective and not is_adjective(answer, value, self.nouns))
            or (bool(closed.said_of) and not said_of(answer, turn.question, value, self.nouns))
            or argued(answer, value)
            or adds_up(turn, value, chosen_from=bool(options))
            or told_before(turn, value, self.nouns)
        )

    def _asked_for(self, turn: Turn, offers: list[Trade]) -> list[Trade]:
        """Of several values those that are said of a noun in the question, if any are."""
        if len(offers) < 2:
            return offers
        asked = {noun for *_, noun in self.nouns.find(turn.question)}
        return [offer for offer in offers if self._noun(turn, offer.value) in asked] or offers

    def _polarity_offers(self, turn: Turn, number: int, category: Category) -> list[Trade]:
        start = YES_OR_NO.match(turn.answer)
        closed = next((closed for closed in category.values if start and start[1].lower() in closed.members), None)
        if start is None or closed is None or polarity(turn.answer) is None:
            return []
        operations = flip(turn.answer, self.nouns)
        if operations is None:
            if self.model is None:
                return []
            operations = []  # known: yes or no; how to say it is the model's
        value = Value(closed, start.start(1), start.end(1), start[1], closed.members[start[1].lower()])
        targets = frozenset(closed.members) - {value.name}
        return [Trade(number, value, f"{closed.name}|{turn.source}", targets, operations=operations)]

    def _market(self, turn: Turn, value: Value, options: set[str], noun: str | None) -> str | None:
        """Where a value may be traded: set, group, class of its noun, and how its number shows in the grammar."""
        closed = value.set
        parts = [closed.name, closed.groups[value.group][0], *sorted(options)]
        if closed.by_source:
            parts.append(turn.source)
        if closed.by_noun:
            parts.append(self.nouns.noun_class(noun) if noun else OTHER)
        one = any(number(member) == 1 for member in closed.groups[value.group])
        if one and (count := number(value.text)) is not None:
            try:
                other = "two" if count == 1 else "one"
                apply(turn.answer, [Operation(value.text, other, start=value.start)])
            except CannotEdit:
                if count == 1:
                    return None
                parts.append("plural")
        return "|".join(parts)

    def _noun(self, turn: Turn, value: Value) -> str | None:
        """The noun that a value is said of: the one after it, else the one before it, else the question's last."""
        clause = re.split(r"[.,;:!?]", turn.answer[value.end : value.end + 60])[0]
        after = list(self.nouns.find(" ".join(clause.split()[:4])))
        if after:
            return self._head(clause, after)
        before = list(self.nouns.find(re.split(r"[.;!?]", turn.answer[: value.start])[-1]))
        nearest = before or list(self.nouns.find(turn.question))
        return nearest[-1][2] if nearest else None

    @staticmethod
    def _head(clause: str, found: list[tuple[int, int, str]]) -> str:
        """Of nouns side by side the last: a baseball cap is a cap."""
        head = found[0]
        for following in found[1:]:
            if following[0] > head[1] + 1:
                break
            head = following
        return head[2]

    def trade(self, plans: Sequence[Plan], seed: str) -> None:
        """Choose the trades of all plans that have offers; plans left without get their reason.

        Args:
            plans: of a shard's turns.
            seed: decides who trades with whom.
        """
        rng = random.Random(seed)
        if self.balance == "uniform":
            self._uniform(plans, rng)
            return
        left = [plan for plan in plans if plan.offers and not plan.reason]
        moved = True
        while moved:
            singles = [plan for plan in left if _wanted(plan) == 1]
            # Those that the model writes last: what rules can do does not fall with what the model cannot.
            _trade_singles([plan for plan in singles if not plan.ask], rng)
            if any(plan.ask for plan in singles):
                _trade_singles([plan for plan in singles if not plan.trades], rng)
            _trade_several([plan for plan in left if _wanted(plan) > 1], rng)
            left = [plan for plan in left if not plan.trades]
            moved = [plan for plan in left if plan.try_another()] != []
        for plan in plans:
            if plan.offers and not plan.trades and not plan.reason:
                plan.reason = NO_PARTNER
                plan.category, plan.decided_by = plan.first or (plan.category, plan.decided_by)

    @staticmethod
    def _uniform(plans: Sequence[Plan], rng: random.Random) -> None:
        for plan in plans:
            if plan.reason:
                continue
            plan.trades = plan.offers[: _wanted(plan)]
            for trade in plan.trades:
                trade.target = rng.choice(sorted(trade.targets))


def _wanted(plan: Plan) -> int:
    """Trades of a turn: one targeted error, and only in a category that wants several as many as it takes."""
    category = plan.category
    return category.max_edits if category is not None and category.min_edits > 1 else 1


def _trade_singles(plans: list[Plan], rng: random.Random) -> None:
    """One trade each; where the first value of an answer finds no partner, the next is tried, and the last again."""
    for attempt in range(max((len(plan.offers) for plan in plans), default=0)):
        offers = [plan.offers[min(attempt, len(plan.offers) - 1)] for plan in plans]
        _match_markets(offers, rng)
        for plan, offer in zip(plans, offers, strict=True):
            plan.trades = [offer] if offer.partner is not None else []
        plans = [plan for plan in plans if not plan.trades]


def _trade_several(plans: list[Plan], rng: random.Random) -> None:
    """Several trades each, those likeliest to find partners. Who finds too few leaves, and its partners look anew."""
    values: dict[str, Counter[str]] = defaultdict(Counter)
    for plan in plans:
        for trade in plan.offers:
            values[trade.market][trade.value.name] += 1
    likely = {market: 1 - max(counts.values()) / counts.total() for market, counts in values.items()}
    for plan in plans:
        best = sorted(plan.offers, key=lambda trade: -likely[trade.market])[: _wanted(plan)]
        plan.offers = sorted(best, key=lambda trade: trade.value.start)
    while plans:
        _match_markets([trade for plan in plans for trade in plan.offers if trade.partner is None], rng)
        for plan in plans:
            plan.trades = [trade for trade in plan.offers if trade.partner is not None]
        short = [plan for plan in plans if plan.category and len(plan.trades) < plan.category.min_edits]
        if not short:
            return
        fewest = min(len(plan.trades) for plan in short)
        leaving = [plan for plan in short if len(plan.trades) == fewest]
        for trade in [trade for plan in leaving for trade in plan.trades]:
            if (partner := trade.partner) is not None:
                partner.partner = trade.partner = None
        gone = {id(plan) for plan in leaving}
        plans = [plan for plan in plans if id(plan) not in gone]
        for plan in leaving:
            plan.trades = []


def _match_markets(trades: list[Trade], rng: random.Random) -> None:
    """First between answers about the same noun, so that "yellow banana" does not tell either; then in the class."""
    same_noun, markets = defaultdict(list), defaultdict(list)
    for trade in trades:
        if trade.noun is not None:
            same_noun[trade.market, trade.noun].append(trade)
    for key in sorted(same_noun):
        match(same_noun[key], rng)
    for trade in trades:
        if trade.partner is None:
            markets[trade.market].append(trade)
    for market in sorted(markets):
        match(markets[market], rng)


def match(trades: list[Trade], rng: random.Random) -> None:
    """Pair trades of different values, as many as can be; each partner's value becomes the other's target.

    Sorted by value, a trade and the one half the list further differ when no value has more than half; what a value has
    beyond that stays without a partner. Those that met and do not fit then change partners with others.
    """
    by_value: dict[str, list[Trade]] = defaultdict(list)
    for trade in trades:
        by_value[trade.value.name].append(trade)
    for name in sorted(by_value):
        rng.shuffle(by_value[name])
    order = sorted(by_value, key=lambda name: (-len(by_value[name]), name))
    largest = by_value[order[0]]
    rest = len(trades) - len(largest)
    del largest[rest if rest < len(largest) else len(largest) - len(trades) % 2 :]
    paired = [trade for name in order for trade in by_value[name]]
    half = len(paired) // 2
    ones, others = paired[:half], paired[half:]
    for n in range(half):
        if not _fit(ones[n], others[n]):
            for m in range(half):
                if _fit(ones[n], others[m]) and _fit(ones[m], others[n]):
                    others[n], others[m] = others[m], others[n]
                    break
    for one, other in zip(ones, others, strict=True):
        if _fit(one, other):
            one.partner, other.partner = other, one
            one.target, other.target = other.value.name, one.value.name


def _fit(one: Trade, other: Trade) -> bool:
    return other.value.name in one.targets and one.value.name in other.targets


def release(trade: Trade, plans: Sequence[Plan]) -> list[int]:
    """Undo a trade on both sides; the numbers of the turns that lost one."""
    lost = []
    for side in (trade, trade.partner):
        if side is not None and side in plans[side.turn].trades:
            plans[side.turn].trades.remove(side)
            lost.append(side.turn)
    return lost
