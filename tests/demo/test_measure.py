"""Figures of answers: what is right, garbled, biased, and which policy is better."""

import numpy as np
import pytest

from vapr.demo.datasets import Asked
from vapr.demo.measure import Answers, compare, distance, verdict
from vapr.demo.questions import Question
from vapr.demo.scenes import Scene

SCENE = Scene((), (50, 50, 50))


def questions(count: int) -> list[Asked]:
    """Yes/no questions, yes true of every other one, and one about a colour for each; one of both a picture."""
    asked = []
    for number in range(count):
        truth = "yes" if number % 2 == 0 else "no"
        asked.append(Asked(number, SCENE, Question("existence", "Is there a red box?", "red box", truth)))
        asked.append(Asked(number, SCENE, Question("colour", "What color is the box?", "box", "red")))
    return asked


def test_always_yes_is_right_half_the_time_and_half_too_often():
    asked = questions(40)
    texts = ["Yes." if one.question.category == "existence" else "It is red." for one in asked]
    figures = Answers(asked, texts).figures(0)
    assert figures["accuracy"]["existence"]["value"] == 0.5
    assert figures["accuracy"]["colour"]["value"] == 1.0
    assert figures["accuracy"]["overall"]["value"] == 0.75
    assert figures["accuracy"]["side"]["value"] is None
    assert figures["yes"]["yes_rate"]["value"] == 1.0
    assert distance(figures) == pytest.approx(0.5)
    assert figures["garbled"]["answers"] == 0


def test_any_true_wording_is_right_and_a_garbled_answer_is_wrong_and_counted():
    asked = questions(2)
    answers = Answers(asked, ["Yes, it is there.", "The box is red is red.", "Maybe.", "The color is blue."])
    assert answers.right.tolist() == [True, False, False, False]
    assert answers.said == ["yes", None, None, "blue"]
    figures = answers.figures(0)
    assert figures["garbled"]["answers"] == 2 and figures["garbled"]["value"] == 0.5
    assert figures["yes"]["unparsed_rate"]["value"] == 0.5


def test_a_difference_on_many_pictures_is_told_and_one_of_chance_is_not():
    asked = questions(60)
    truth = [one.question.answer for one in asked]
    wrong = ["It is blue." if one.question.category == "colour" else one.question.answer for one in asked]
    better = compare(Answers(asked, wrong), Answers(asked, truth), 0)
    assert better["overall"]["fixed"] == 60 and better["overall"]["broken"] == 0
    assert better["overall"]["difference"]["value"] == pytest.approx(0.5)
    assert [verdict(better[name]) for name in ("overall", "colour", "existence")] == [
        "better", "better", "no difference shown",
    ]  # fmt: skip
    assert verdict(compare(Answers(asked, truth), Answers(asked, wrong), 0)["overall"]) == "worse"
    chance = np.random.default_rng(0).permutation(120)
    one = ["?" if place < 20 else text for place, text in zip(chance, truth, strict=True)]
    other = ["?" if 20 <= place < 40 else text for place, text in zip(chance, truth, strict=True)]
    assert verdict(compare(Answers(asked, one), Answers(asked, other), 0)["overall"]) == "no difference shown"
