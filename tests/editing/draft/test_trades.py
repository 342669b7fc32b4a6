"""Trades: every value as often chosen as rejected, no near-synonyms, nothing that the rest of the answer gives away."""

import random
from collections import Counter
from pathlib import Path

import pytest

from vapr.editing.config import EditConfig
from vapr.editing.draft.editor import Editor
from vapr.editing.draft.trades import (
    FEW_VALUES,
    NEEDS_MODEL,
    NO_CATEGORY,
    NO_PARTNER,
    PARTNER_LOST,
    Plan,
    Planner,
    Trade,
    match,
    release,
)  # fmt: skip
from vapr.editing.rules.categories import Categories, Category, ClosedSet, load_categories
from vapr.editing.rules.nouns import Nouns
from vapr.editing.rules.turns import Turn
from vapr.editing.rules.why_not import NO_OPPOSITE, NO_VALUE
from vapr.llm.request import Reply

CATEGORIES = load_categories()
NOUNS = Nouns()


def turn(question: str, answer: str, *, source: str = "coco", number: int = 0, prompt: tuple = ()) -> Turn:
    prompt = prompt or ({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},)
    return Turn(number, 0, f"rows.json:{number + 1}", f"row-{number}", source, None, (Path(f"{number}.png"),),
                (f"{number}.png",), prompt, question, answer)  # fmt: skip


def planned(*turns: tuple[str, str], model: str | None = None, balance: str = "swap", seed: str = "s", source="coco"):
    """Plans of questions and answers, traded."""
    planner = Planner(CATEGORIES, NOUNS, balance, has_model=model is not None)
    plans = [planner.by_rules(turn(q, a, number=n, source=source), n) for n, (q, a) in enumerate(turns)]
    planner.trade(plans, seed)
    return plans


def targets(plans: list[Plan]) -> list[str | None]:
    return [plan.trades[0].target if plan.trades else None for plan in plans]


def colours(*names: str) -> list[tuple[str, str]]:
    return [("What color is the hat?", f"The hat is {name}.") for name in names]


def balanced(plans: list[Plan]) -> bool:
    """Whether each value of each market stands in chosen as often as in rejected."""
    trades = [trade for plan in plans for trade in plan.trades]
    chosen = Counter((trade.market, trade.value.name) for trade in trades)
    return chosen == Counter((trade.market, trade.target) for trade in trades)


def test_two_rows_trade_their_values():
    plans = planned(*colours("red", "blue"))
    assert targets(plans) == ["blue", "red"]
    assert plans[0].trades[0].partner is plans[1].trades[0] and plans[1].trades[0].partner is plans[0].trades[0]
    assert plans[0].decided_by == "attribute:asks-colour" and plans[0].category.name == "attribute"


def test_near_synonyms_are_not_traded():
    # red is like orange, pink and maroon; orange also like gold and brown, but gold is not like red
    plans = planned(*colours("red", "orange"))
    assert [plan.reason for plan in plans] == [NO_PARTNER, NO_PARTNER]
    plans = planned(*colours("red", "orange", "gold", "maroon"))
    assert sorted(zip(["red", "orange", "gold", "maroon"], targets(plans), strict=True)) == [
        ("gold", "red"), ("maroon", "orange"), ("orange", "maroon"), ("red", "gold"),
    ] or balanced(plans)  # fmt: skip
    for one, other in zip(["red", "orange", "gold", "maroon"], targets(plans), strict=True):
        assert other is None or not CATEGORIES["attribute"].values[0].alike(one, other)


def test_what_the_majority_has_too_many_of_is_left_over():
    plans = planned(*colours(*["red"] * 7, "blue", "green", "white"))
    assert Counter(targets(plans)[:7]) == {"blue": 1, "green": 1, "white": 1, None: 4}
    assert targets(plans)[7:] == ["red", "red", "red"]
    assert Counter(plan.reason for plan in plans) == {None: 6, NO_PARTNER: 4}


def test_values_are_traded_within_the_class_of_their_noun():
    plans = planned(
        ("What color is the hat?", "The hat is red."), ("What color is the dog?", "The dog is brown."),
        ("What color is the coat?", "A black coat."), ("What color is the cat?", "It is a white cat."),
    )  # fmt: skip
    assert targets(plans) == ["black", "white", "red", "brown"]


def test_random_markets_are_in_balance_and_repeat():
    rng = random.Random(0)
    for _ in range(30):
        names = rng.choices(["red", "orange", "pink", "blue", "grey", "silver", "white", "tan"], [9, 4, 3, 5, 2, 1, 2, 1],
                            k=rng.randint(1, 60))  # fmt: skip
        plans = planned(*colours(*names))
        assert balanced(plans)
        for plan in plans:
            assert bool(plan.trades) != bool(plan.reason)
            for trade in plan.trades:
                assert not trade.value.set.alike(trade.value.name, trade.target)
                assert trade.partner.partner is trade
        assert targets(planned(*colours(*names))) == targets(plans)


def test_a_market_of_two_halves_trades_completely():
    plans = planned(*colours(*["red"] * 20, *["blue"] * 20), seed="a")
    assert targets(plans) == ["blue"] * 20 + ["red"] * 20
    partners = [[trade.partner.turn for plan in planned(*colours(*["red"] * 20, *["blue"] * 20), seed=seed)
                 for trade in plan.trades] for seed in "ab"]  # fmt: skip
    assert partners[0] != partners[1]


def test_overlapping_near_synonyms_find_others():
    closed = ClosedSet(name="x", groups=[["a", "b", "c", "d"]], same=[["a", "b"], ["b", "c"], ["c", "d"]])
    category = Category(name="x", title="X", order=1, change="", keep="", values=[closed],
                        applies=[{"id": "all", "question": "."}])  # fmt: skip
    planner = Planner(Categories([category]), NOUNS, "swap", has_model=False)
    for names in (["a", "b", "c", "d"], ["a", "a", "b", "c", "d", "d"], ["b", "b", "c", "d", "a"]):
        plans = [planner.by_rules(turn("?", name, number=n), n) for n, name in enumerate(names)]
        planner.trade(plans, "s")
        assert balanced(plans)
        for plan in plans:
            assert all(not closed.alike(trade.value.name, trade.target) for trade in plan.trades)
    assert sum(len(plan.trades) for plan in plans) == 4  # b-d twice, or b-d and a-c: no more than four of five


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What color is the hat?", "It isn't blue; the hat is red."),  # -> "isn't blue, is blue"
        ("What color is the hat?", "The hat is red, the coat is blue."),
        ("Who wears the red hat? What color is it?", "The hat is red."),  # the question says so
        ("What color is the hat?", "The hat is red, and the flag is red."),  # one place is not enough
    ],
)
def test_values_that_the_texts_give_away_are_not_traded(question, answer):
    plans = planned((question, answer), *colours("blue"))
    assert targets(plans) == [None, None]


def test_how_big_does_not_say_that_it_is():
    plans = planned(("How big is the dog?", "It is big."), ("What size is the cat?", "It is small."))
    assert targets(plans) == ["small", "big"]


def test_only_what_the_question_offers():
    either = (
        ("Is the hat red or blue?", "Red"),
        ("Is the hat red or blue?", "Blue"),
        ("Is the cap green or red?", "Red"),
    )
    assert targets(planned(*either)) == ["blue", "red", None]


def test_of_several_values_those_of_the_noun_asked_for():
    plans = planned(("How big is the cat?", "The cat under the large table is to the left of the small box."))
    assert plans[0].offers == []  # two sizes
    plans = planned(("Where is the cat?", "The cat is to the left of the box above the table."),
                    ("Where is the dog?", "The dog is on the right."))  # fmt: skip
    assert targets(plans) == ["right", "left"]


def test_a_second_value_is_tried_where_the_first_finds_no_partner():
    plans = planned(
        ("Where is the cat?", "The cat is behind the bus to the left of the cart."),
        ("Where is the dog?", "On the right."),
    )
    assert targets(plans) == ["right", "left"]


def test_numbers_after_at_least_are_not_traded():
    plans = planned(
        ("How many dogs are there?", "There are at least two dogs."), ("How many cats are there?", "I see three cats.")
    )
    assert targets(plans) == [None, None]


def test_uniform_takes_any_other_value():
    plans = planned(*colours(*["red"] * 300), balance="uniform")
    drawn = Counter(targets(plans))
    assert len(drawn) > 12 and not set(drawn) & {"red", "orange", "pink", "maroon", None}
    assert max(drawn.values()) < 60


def test_yes_and_no_are_half_and_half_for_each_source():
    planner = Planner(CATEGORIES, NOUNS, "swap", has_model=False)
    rows = [("gqa", "Yes")] * 30 + [("gqa", "No")] * 10 + [("coco", "No")] * 8 + [("coco", "Yes")] * 4
    plans = [planner.by_rules(turn("Is it?", a, source=s, number=n), n) for n, (s, a) in enumerate(rows)]
    planner.trade(plans, "s")
    said = Counter((rows[n][0], plan.trades[0].target) for n, plan in enumerate(plans) if plan.trades)
    assert said == {("gqa", "yes"): 10, ("gqa", "no"): 10, ("coco", "yes"): 4, ("coco", "no"): 4}


def test_yes_or_no_that_no_rule_can_turn_is_the_models_but_still_trades():
    hard = ("Is it a dog?", "Yes, both of them are dogs, and they sleep.")
    without = planned(hard, ("Is it?", "No"))
    assert without[0].reason == f"{NEEDS_MODEL}: {NO_OPPOSITE}" and without[1].reason == NO_PARTNER
    plans = planned(hard, ("Is it?", "No"), model="m")
    assert (plans[0].ask, plans[0].must_begin, plans[0].reason) == (True, "no", None)
    assert (plans[1].ask, targets(plans)[1]) == (False, "yes")


def test_a_model_is_asked_only_where_nothing_can_be_traded():
    plans = planned(*colours("red", "blue"), ("What is in the box?", "A kitten."), model="m")
    assert [plan.ask for plan in plans] == [False, False, True]
    assert planned(("What is in the box?", "A kitten."))[0].reason == f"{NEEDS_MODEL}: {NO_VALUE}"


def test_no_rule_fits():
    assert planned(("Tell me something.", "Gladly, madam."))[0].reason == NO_CATEGORY
    waits = Planner(CATEGORIES, NOUNS, "swap", has_model=True).by_rules(turn("Tell me something.", "Gladly, madam."), 0)
    assert (waits.category, waits.reason) == (None, None)
    by_value = planned(("Tell me about the dog.", "The dog wears a red hat."))[0]
    assert (by_value.category.name, by_value.decided_by) == ("attribute", "value:colours")


CAPTION = "Describe the image."


def test_captions_trade_several_values_or_none():
    plans = planned(
        (CAPTION, "A red car stands in front of the wall."), (CAPTION, "A blue car stands behind the tree."),
        (CAPTION, "A green car stands on the lawn."), (CAPTION, "A white bus is here and a dog sleeps."),
    )  # fmt: skip
    assert [[trade.target for trade in plan.trades] for plan in plans[:2]] == [
        ["blue", "behind"],
        ["red", "in front of"],
    ]
    assert plans[2].reason == f"{NEEDS_MODEL}: {FEW_VALUES}"  # one value, two are wanted
    assert plans[3].reason == f"{NEEDS_MODEL}: a word that rules do not know"
    assert balanced(plans)


def test_captions_that_find_too_few_leave_and_the_others_trade_anew():
    plans = planned(
        (CAPTION, "A red car stands in front of the wall."), (CAPTION, "A blue car stands behind the tree."),
        (CAPTION, "A striped tower stands behind the house."),  # nobody trades those
        (CAPTION, "A red bus stands in front of the wall."), (CAPTION, "A blue bus stands behind the tree."),
    )  # fmt: skip
    assert [len(plan.trades) for plan in plans] == [2, 2, 0, 2, 2]
    assert plans[2].reason == NO_PARTNER and balanced(plans)


def test_what_finds_no_partner_is_tried_in_the_next_category():
    plans = planned(
        (CAPTION, "A red car stands in front of the wall."),  # no caption trades with it
        ("What color is the bus?", "The bus is blue."),
        ("What color is the hat?", "The hat is green."),  # a hat is no vehicle
    )
    assert [[trade.target for trade in plan.trades] for plan in plans] == [["blue"], ["red"], []]
    assert (plans[0].category.name, plans[0].decided_by, plans[0].reason) == ("attribute", "value:colours", None)
    assert (plans[2].category.name, plans[2].reason) == ("attribute", NO_PARTNER)
    assert balanced(plans)


def test_the_next_category_by_rule_comes_before_those_by_value():
    question = "How many dogs are there? What color is the car?"
    answer = "There are two dogs in a red car."
    plans = planned((question, answer), ("What color is the bus?", "It is a white bus."))
    assert [plan.decided_by for plan in plans] == ["attribute:asks-colour"] * 2
    alone = planned((question, answer))[0]
    assert (alone.category.name, alone.reason) == ("count", NO_PARTNER)  # what it was tried in first


def test_with_a_model_too_what_finds_no_partner_is_tried_in_the_next_category():
    plans = planned(
        (CAPTION, "A red car stands in front of the wall."), ("What color is the bus?", "It is blue."), model="m"
    )
    assert targets(plans) == ["blue", "red"] and not any(plan.ask for plan in plans)


def test_what_rules_can_turn_trades_among_itself_before_what_is_the_models():
    hard = ("Is it a dog?", "Yes, both of them are dogs, and they sleep.")
    rows = [hard] * 20 + [("Is it?", "Yes")] * 20 + [("Is it?", "No")] * 20 + [hard] * 20
    for seed in "abc":
        plans = planned(*rows, model="m", seed=seed)
        assert [bool(plan.trades) for plan in plans] == [False] * 20 + [True] * 40 + [False] * 20
        assert not any(plans[trade.partner.turn].ask for plan in plans for trade in plan.trades)
    plans = planned(*[hard] * 3, *[("Is it?", "Yes")] * 2, *[("Is it?", "No")] * 4, model="m")
    assert sum(bool(plan.trades) for plan in plans) == 8  # no place stays empty: two of the hard ones trade, too
    assert [plan.trades != [] for plan in plans[3:]] == [True] * 6 and balanced(plans)


class Silent:
    """A language model that says nothing of use."""

    name, revision, engine, num_gpus = "silent", "1", "test", 0

    def ask(self, requests, on_reply=lambda: None):
        return [Reply(None, "an empty reply")] * len(requests)


def test_what_rules_can_turn_does_not_fall_with_what_the_model_cannot():
    answers = (
        ["Yes, there is."] * 20 + ["No, there is not."] * 20 + ["Yes, both of them are dogs, and they sleep."] * 20
    )
    turns = [turn(f"Is it? {n}", answer, number=n) for n, answer in enumerate(answers)]
    drafts, _ = Editor(EditConfig(), CATEGORIES, Silent()).edit(turns, "s")
    assert [draft.status for draft in drafts] == ["accepted"] * 40 + ["rejected"] * 20
    assert {draft.reason for draft in drafts[40:]} == {NO_PARTNER}


def test_releasing_a_trade_takes_it_from_both():
    plans = planned(*colours("red", "blue", "red", "blue"))
    partner = plans[0].trades[0].partner.turn
    assert sorted(release(plans[0].trades[0], plans)) == sorted([0, partner])
    assert [bool(plan.trades) for plan in plans] == [n not in (0, partner) for n in range(4)]
    assert PARTNER_LOST.startswith("the other half")


def test_match_needs_two_different_values():
    closed = ClosedSet(name="x", groups=[["a", "b"]])
    value = closed.find("a")[0]
    alone = [Trade(n, value, "x", frozenset("b")) for n in range(3)]
    match(alone, random.Random(0))
    assert [trade.partner for trade in alone] == [None] * 3


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Are there more dogs than cats?", "Yes, there are more dogs than cats."),
        ("Which building is taller?", "The old one is taller."),
        ("How many pieces of fruit are there?", "There are three pieces of fruit: an apple, a pear and a plum."),
        ("What color is the traffic light?", "The traffic light is green, so the cars can go."),
        ("What color is the sky?", "The sky is gray because it rains."),
    ],
)
def test_rules_leave_what_would_contradict_itself_or_the_question(question, answer):
    (plan,) = planned((question, answer))
    assert plan.offers == [] and plan.trades == []
    allowed = planned(("What color is the hat?", "The hat is green."))
    assert allowed[0].offers
