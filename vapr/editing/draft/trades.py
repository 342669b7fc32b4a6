"""Plans the edits of many turns at once: values of closed sets are traded between rows, the rest is asked for.

When two rows trade values, each value is as often chosen as rejected, so that no word tells which answer is which.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from vapr.editing.rules.agreement import in_the_case_of
from vapr.editing.rules.categories import Categories, Category, Value
from vapr.editing.rules.nouns import OTHER, Nouns
from vapr.editing.rules.operations import Operation
from vapr.editing.rules.polarity import YES_OR_NO, flip
from vapr.editing.rules.turns import Turn
from vapr.editing.rules.why_not import NO_VALUE, Place, choices, replacements, why_not
from vapr.text import polarity

NO_PARTNER = "no other row to trade values with"
NEEDS_MODEL = "needs a language model"
NEITHER = "the answer says neither yes nor no"
FEW_VALUES = "fewer values than the category wants"
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
    """A plan for one turn."""

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
        balance: ``swap`` or ``uniform``, see :class:`vapr.editing.config.PlanConfig`.
        has_model: a language model writes what rules cannot.
    """

    def __init__(self, categories: Categories, nouns: Nouns, balance: str, *, has_model: bool) -> None:
        self.categories = categories
        self.nouns = nouns
        self.balance = balance
        self.has_model = has_model

    def by_rules(self, turn: Turn, number: int) -> Plan:
        """Return the plan of a turn as far as rules decide it; one without category or reason waits for a label."""
        if len(turn.question) > MAX_QUESTION:
            return Plan(reason=LONG_QUESTION)
        fitting = self.categories.by_rule(turn.question, turn.answer)
        first = None
        for category, rule in fitting:
            plan = self._plan(turn, number, category, rule)
            if plan.offers or self.has_model:
                plan.others = self._others(turn, number, {category.name}, fitting)
                return plan
            first = first or plan
        if first is not None or self.has_model:
            return first or Plan()
        possible = list(self._with_values(turn, number, set()))
        if not possible:
            return Plan(reason=NO_CATEGORY)
        chosen = random.Random(turn.digest()).choice(possible)
        chosen.others = (plan for plan in possible if plan is not chosen)
        return chosen

    def labelled(self, turn: Turn, number: int, name: str | None, decided_by: str) -> Plan:
        """Return the plan of a turn that the language model ``decided_by`` has put into a category."""
        if name is None:
            return Plan(decided_by=decided_by, reason=NO_CATEGORY)
        plan = self._plan(turn, number, self.categories[name], decided_by)
        plan.others = self._others(turn, number, {name}, iter(()))
        return plan

    def _plan(self, turn: Turn, number: int, category: Category, decided_by: str) -> Plan:
        offers, why_not = self.offers(turn, number, category)
        plan = Plan(category, decided_by, offers)
        plan.ask = len(offers) < category.min_edits or any(trade.operations == [] for trade in offers)
        if not plan.ask:
            return plan
        if "polarity" not in category.checks:
            plan.offers = []  # a model that has to write a yes or no is told which, so that they trade all the same
        elif not offers and self.has_model:
            plan.ask, plan.reason = False, NEITHER
        if not self.has_model:
            plan.reason = f"{NEEDS_MODEL}: {why_not or FEW_VALUES}"
        return plan

    def _with_values(self, turn: Turn, number: int, tried: Collection[str]) -> Iterator[Plan]:
        """Yield plans of one trade in the categories, but for those tried, one of whose values the answer holds."""
        for category in self.categories.all:
            if category.min_edits == 1 and "polarity" not in category.checks and category.name not in tried:
                offers, _ = self.offers(turn, number, category)
                if offers:
                    yield Plan(category, f"value:{offers[0].value.set.name}", offers)

    def _others(
        self, turn: Turn, number: int, tried: set[str], rules: Iterator[tuple[Category, str]]
    ) -> Iterator[Plan]:
        """Yield plans of what else a turn could trade: by the rules that are left, then by any value in its answer."""
        for category, rule in rules:
            tried.add(category.name)
            offers, _ = self.offers(turn, number, category)
            if len(offers) >= category.min_edits:
                yield Plan(category, rule, offers)
        yield from self._with_values(turn, number, tried)

    def offers(self, turn: Turn, number: int, category: Category) -> tuple[list[Trade], str | None]:
        """Return what an answer could trade in a category, and why not what else it holds."""
        if "polarity" in category.checks:
            return self._polarity_offers(turn, number, category)
        offers, declined = [], None
        for value in category.find_values(turn.answer):
            reason = why_not(turn, value)
            declined = declined or reason
            if reason is None and (targets := replacements(turn, value)):
                noun = Place(turn, value).noun if value.set.by_noun else None
                # Captions lose trades when they find too few: they would take single ones with them.
                several = "|several" if category.min_edits > 1 else ""
                offers.append(Trade(number, value, self._market(turn, value, noun) + several, targets, noun))
        if category.min_edits == 1 and len(offers) > 1:  # those that are said of a noun in the question, if any are
            asked = {noun for *_, noun in self.nouns.find(turn.question)}
            offers = [offer for offer in offers if Place(turn, offer.value).noun in asked] or offers
        return offers, declined if offers else declined or NO_VALUE

    def _polarity_offers(self, turn: Turn, number: int, category: Category) -> tuple[list[Trade], str | None]:
        start = YES_OR_NO.match(turn.answer)
        closed = next((one for one in category.values if start and start["word"].lower() in one.members), None)
        if start is None or closed is None or polarity(turn.answer) is None:
            return [], NEITHER
        value = Value(closed, *start.span("word"), start["word"], closed.members[start["word"].lower()])
        operations: list[Operation] = []  # known: yes or no; how to say it is the model's
        if reason := why_not(turn, value):
            if not self.has_model:
                return [], reason
        else:
            operations = flip(turn.answer) or []
        targets = frozenset(closed.members) - {value.name}
        return [Trade(number, value, f"{closed.name}|{turn.source}", targets, operations=operations)], reason

    def _market(self, turn: Turn, value: Value, noun: str | None) -> str:
        """Return where a value may be traded: its set, group, class of its noun, and the question's choices."""
        closed = value.set
        parts = [closed.name, closed.groups[value.group][0], *sorted(choices(turn, value))]
        if closed.by_source:
            parts.append(turn.source)
        if closed.by_noun:
            parts.append(self.nouns.noun_class(noun) if noun else OTHER)
        return "|".join(parts)

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
