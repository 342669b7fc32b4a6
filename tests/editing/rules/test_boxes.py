"""Boxes of a row: in pixels, of the right thing, or a reason."""

from dataclasses import replace
from pathlib import Path

import pytest

from vapr.editing.rules.boxes import NO_BOXES, NOT_NAMED, Box, CannotPlace, region_of
from vapr.editing.rules.nouns import lexicon
from vapr.editing.rules.turns import Turn

TURN = Turn(0, 0, "in.json:1", "1", "mine", None, (Path("a.png"),), ("a.png",), (), "What is it?", "A puppy.")
SIZE = (640, 480)
DOG = {"bbox": [10, 20, 30, 40], "label": "dog"}
CAR = {"bbox": [100, 20, 30, 40], "category": "car"}


def region(boxes, *, answer="A puppy.", question="What is it?", number=0, order="xywh", relative=False, size=SIZE):
    turn = replace(TURN, boxes=boxes, answer=answer, question=question, number=number)
    return region_of(turn, size, lexicon(), order=order, relative=relative)


def test_orders_and_units():
    assert region([[10, 20, 30, 40]]) == [Box(10, 20, 40, 60)]
    assert region([10, 20, 30, 40]) == [Box(10, 20, 40, 60)]
    assert region([[10, 20, 30, 40]], order="xyxy") == [Box(10, 20, 30, 40)]
    assert region([[0.25, 0.5, 0.5, 0.25]], relative=True) == [Box(160, 240, 480, 360)]
    assert region([[0.25, 0.5, 0.5, 0.75]], relative=True, order="xyxy") == [Box(160, 240, 320, 360)]
    assert region([[1.6, 2.2, 10.1, 10.1]], order="xyxy") == [Box(1, 2, 11, 11)]  # no pixel of the thing is left


def test_a_rounded_box_is_cut_off_at_the_edge():
    assert region([[-0.4, 470, 640.7, 480.2]], order="xyxy") == [Box(0, 470, 640, 480)]


@pytest.mark.parametrize(
    "numbers", [[600, 20, 100, 40], [10, 470, 30, 40], [-5, 0, 10, 10], [10, 20, 0, 40], [640.5, 0, 0.4, 9]]
)
def test_a_box_outside_is_refused(numbers):
    with pytest.raises(CannotPlace, match="box outside of the picture: .* of 640 x 480 pixels"):
        region([numbers])


@pytest.mark.parametrize(
    ("boxes", "reason"),
    [
        (None, NO_BOXES),
        ([], NO_BOXES),
        ([[]], NO_BOXES),
        ("[1, 2, 3, 4]", "boxes must be a list, got str"),
        ([[1, 2, 3]], "boxes are given for|a box is four numbers"),
        ([[1, 2, 3, "4"]], "a box is four numbers"),
        ([[1, 2, 3, True]], "a box is four numbers"),
        ([[1, 2, 3, float("nan")]], "a box is four numbers"),
        ([{"label": "dog"}], "a box is four numbers"),
        ([CAR], NOT_NAMED),
    ],
)
def test_what_is_no_box(boxes, reason):
    with pytest.raises(CannotPlace, match=reason):
        region(boxes)


def test_labels_pick_what_the_answer_names():
    dog, car = Box(10, 20, 40, 60), Box(100, 20, 130, 60)
    assert region([DOG, CAR]) == [dog]  # a puppy is a dog
    assert region([DOG, CAR, DOG], answer="Red.", question="What colour is the car?") == [car]
    assert region([DOG, CAR], answer="A dog in a car.") == [dog, car]
    assert region([{**DOG, "label": "zorb"}, CAR], answer="A Zorb!") == [dog]


def test_boxes_of_each_answer():
    per_answer = [[[1, 2, 3, 4]], [DOG]]
    assert region(per_answer) == [Box(1, 2, 4, 6)]
    assert region(per_answer, number=1) == [Box(10, 20, 40, 60)]
    with pytest.raises(CannotPlace, match="boxes are given for 2 answers, and this is answer 3"):
        region(per_answer, number=2)
