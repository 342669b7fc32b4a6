"""The words that the figures choose: what does not appear is said, and nothing is claimed that chance explains."""

import copy

import pytest

from vapr.demo.claims import claims, headline

CATEGORIES = ("overall", "existence", "colour", "kind", "count", "side")


def change(value: float, p: float = 0.001, fixed: int = 50, broken: int = 10) -> dict:
    return {
        name: {
            "difference": {"value": value, "interval": [value - 0.02, value + 0.02], "count": 900},
            "fixed": fixed, "broken": broken, "p": p,
        }
        for name in CATEGORIES
    }  # fmt: skip


def policy(accuracy: float, yes: float, garbled: int = 0) -> dict:
    return {
        "accuracy": {name: {"value": accuracy, "interval": [accuracy - 0.03, accuracy + 0.03]} for name in CATEGORIES},
        "yes": {"yes_rate": {"value": yes}, "gold_yes_rate": {"value": 0.5}, "gap": {"value": yes - 0.5}},
        "garbled": {"answers": garbled},
    }


@pytest.fixture
def good() -> dict:
    return {
        "policies": {
            "sft": policy(0.7, 0.9), "dpo": policy(0.9, 0.55), "dpo-half": policy(0.85, 0.6),
            "dpo-quarter": policy(0.8, 0.7), "length-biased": policy(0.75, 0.8), "more-sft": policy(0.8, 0.6),
        },
        "compared": {
            "sft -> dpo": change(0.2), "length-biased -> dpo": change(0.15), "more-sft -> dpo": change(0.1),
            "dpo-quarter -> dpo": change(0.1), "dpo-half -> dpo": change(0.05),
        },
    }  # fmt: skip


def test_what_appears_is_said_with_its_interval(good):
    assert [claim.holds for claim in claims(good)] == [True] * 6
    assert claims(good)[0].found == "DPO added 20.0 points, 95 % interval 18.0 to 22.0: 50 answers fixed, 10 broken"
    assert headline(good) == "DPO added 20.0 points of accuracy and cut the “Yes” bias (40 to 5 points)"


def test_a_difference_of_chance_is_called_none(good):
    for name in good["compared"]:
        good["compared"][name] = change(0.01, p=0.4)
    accuracy, _, length, sft, scaling, _ = claims(good)
    assert not any(claim.holds for claim in (accuracy, length, sft, scaling))
    assert "made no difference that can be told from chance (+1.0 points" in accuracy.found
    assert sft.found == "no difference shown (+1.0 points, 95 % interval -1.0 to 3.0)"
    assert "no more than chance" in headline(good)


def test_a_control_that_is_ahead_and_a_loss_are_said(good):
    good["compared"]["more-sft -> dpo"] = change(-0.05)
    good["compared"]["sft -> dpo"] = change(-0.04, fixed=10, broken=50)
    accuracy, _, _, sft, *_ = claims(good)
    assert not accuracy.holds and accuracy.found.startswith("DPO cost 4.0 points, 95 % interval 2.0 to 6.0")
    assert "overall got worse" not in accuracy.found and "existence and colour" in accuracy.found
    assert not sft.holds and sft.found.startswith("behind by 5.0 points")
    assert headline(good).startswith("DPO cost 4.0 points")


def test_a_bias_that_was_not_there_is_not_called_halved(good):
    good["policies"]["sft"] = policy(0.7, 0.52)
    bias = claims(good)[1]
    assert not bias.holds and "hardly a bias" in bias.found and "hardly a “Yes” bias" in headline(good)
    for after, holds in ((0.7, True), (0.71, False), (0.3, True), (0.1, False)):  # 40 points before
        result = copy.deepcopy(good) | {"policies": {**good["policies"], "sft": policy(0.7, 0.9)}}
        result["policies"]["dpo"] = policy(0.9, after)
        assert claims(result)[1].holds == holds


def test_a_bias_that_went_with_the_right_answers_is_not_called_repaired(good):
    good["compared"]["sft -> dpo"]["existence"] = change(-0.1)["existence"]
    bias = claims(good)[1]
    assert not bias.holds and bias.found.endswith("but fewer of these answers are right")


def test_garbled_answers_and_scaling_that_does_not_rise_are_said(good):
    good["policies"]["dpo"] = policy(0.9, 0.55, garbled=7)
    good["policies"]["more-sft"] = policy(0.8, 0.6, garbled=2)
    good["policies"]["dpo-quarter"] = policy(0.87, 0.7)
    scaling, garbled = claims(good)[4:]
    assert not scaling.holds and "87.0%, 85.0%, 90.0%" in scaling.found
    assert not garbled.holds
    assert garbled.found == "garbled answers: 0 after sft, 7 after DPO (2 of more-sft)"
