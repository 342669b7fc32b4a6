"""Who swaps pictures with whom: each picture must refute the other's answer."""

import pytest

from vapr.editing.draft.picture_swaps import Swaps
from vapr.editing.draft.trades import Planner
from vapr.editing.rules.categories import load_categories
from vapr.editing.rules.nouns import lexicon
from vapr.editing.rules.turns import Turn

COLOUR = "What color is the {}?"


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(load_categories(), lexicon(), "swap", has_model=False)


def swapped(planner: Planner, *said: tuple[str, str, str], seed: str = "seed") -> dict[int, int]:
    """Partners of turns, each of a picture, a question and an answer."""
    turns = [
        Turn(n, 0, f"in:{n}", str(n), "mine", None, (), (picture,), (), question, answer)
        for n, (picture, question, answer) in enumerate(said)
    ]
    return dict(Swaps(planner, turns).match(range(len(turns)), seed))


RED = ("a.png", COLOUR.format("car"), "The car is red.")
BLUE = ("b.png", COLOUR.format("car"), "The car is blue.")


def test_two_colours_of_one_noun(planner):
    assert swapped(planner, RED, BLUE) == {0: 1, 1: 0}
    assert swapped(planner, RED, ("b.png", "What is the color of the car?", "The car is blue.")) == {0: 1, 1: 0}


@pytest.mark.parametrize(
    "other",
    [
        ("b.png", COLOUR.format("car"), "The car is red."),  # true of both
        ("b.png", COLOUR.format("car"), "The car is maroon."),  # red, too
        ("a.png", COLOUR.format("car"), "The car is blue."),  # one picture
        ("b.png", COLOUR.format("boat"), "The boat is blue."),  # its car may be red
        ("b.png", "How many cars are there?", "There are two."),
    ],
)
def test_pictures_that_refute_nothing_are_not_swapped(planner, other):
    assert swapped(planner, RED, other) == {}


def test_a_picture_of_which_a_row_says_the_same_is_left_out(planner):
    also_red = ("b.png", "What is the color of the car?", "The car is red.")
    for n in range(10):  # whoever of the two red cars is tried
        assert swapped(planner, RED, BLUE, also_red, seed=str(n)) == {}


def test_yes_and_no_only_to_one_question(planner):
    yes, no = ("a.png", "Is there a dog?", "Yes, there is."), ("b.png", "Is there a dog?", "No, there is not.")
    assert swapped(planner, yes, no) == {0: 1, 1: 0}
    assert swapped(planner, yes, ("b.png", "Is there a brown dog?", "No, there is not.")) == {}


def test_what_claims_nothing_plain_says_why(planner):
    turn = Turn(0, 0, "in:0", "0", "mine", None, (), ("a.png",), (), "Why?", "Because it is so.")
    swaps = Swaps(planner, [turn])
    assert not swaps.claims and swaps.reasons[0]
