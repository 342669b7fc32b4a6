"""Yes-bias figures against scikit-learn and values worked by hand."""

import json

import numpy as np
import pytest
from scipy.stats import norm
from sklearn import metrics

from vapr.evaluation.scoring import yes_no


@pytest.fixture
def answers():
    rng = np.random.default_rng(0)
    gold = rng.choice(["yes", "no"], 400, p=[0.4, 0.6])
    said = np.where(rng.random(400) < 0.75, gold, np.where(gold == "yes", "no", "yes"))
    return list(gold), list(said), [f"{n // 4}.jpg" for n in range(400)]


def test_figures_are_those_of_scikit_learn(answers):
    gold, said, images = answers
    figures = {name: figure.value for name, figure in yes_no.figures_of(gold, said, images).items()}
    for positive, end in (("yes", ""), ("no", "_no")):
        assert figures["precision" + end] == pytest.approx(metrics.precision_score(gold, said, pos_label=positive))
        assert figures["recall" + end] == pytest.approx(metrics.recall_score(gold, said, pos_label=positive))
        assert figures["f1" + end] == pytest.approx(metrics.f1_score(gold, said, pos_label=positive))
    assert figures["accuracy"] == pytest.approx(metrics.accuracy_score(gold, said))
    assert figures["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(gold, said))
    (tn, fp), (fn, tp) = metrics.confusion_matrix(gold, said, labels=["no", "yes"])
    assert figures["fpr"] == fp / (fp + tn) and figures["fnr"] == fn / (fn + tp)
    assert figures["gap"] == pytest.approx((tp + fp - tp - fn) / 400)
    hits, alarms = norm.ppf((tp + 0.5) / (tp + fn + 1)), norm.ppf((fp + 0.5) / (fp + tn + 1))
    assert figures["d_prime"] == pytest.approx(hits - alarms)
    assert figures["criterion"] == pytest.approx(-(hits + alarms) / 2)


def test_unparsed_answers_by_hand():
    gold, said = ["yes", "yes", "yes", "no", "no"], ["yes", None, "no", "no", None]
    figures = yes_no.figures_of(gold, said, "abcde")
    values = {name: figure.value for name, figure in figures.items()}
    assert values["accuracy"] == 2 / 5 and values["unparsed_rate"] == 2 / 5 and values["yes_rate"] == 1 / 5
    assert values["precision"] == 1 and values["recall"] == 1 / 3 and values["f1"] == 1 / 2
    assert values["fpr"] == 0 and values["fnr"] == pytest.approx(2 / 3)
    assert values["balanced_accuracy"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    moved = yes_no.unparsed_as(gold, said)
    assert moved["yes"] == {
        "accuracy": 3 / 5,
        "yes_rate": 3 / 5,
        "fpr": 1 / 2,
        "fnr": 1 / 3,
        "f1": pytest.approx(2 / 3),
    }
    assert moved["no"]["accuracy"] == 3 / 5 and moved["no"]["yes_rate"] == 1 / 5
    assert moved["drop"] == {"accuracy": 2 / 3, "yes_rate": 1 / 3, "fpr": 0, "fnr": 1 / 2, "f1": pytest.approx(2 / 3)}


def test_intervals_cover_what_they_are_of():
    """Of 200 samples with a known yes rate and F1, about 95 % of the intervals hold them."""
    rng, held = np.random.default_rng(1), {"yes_rate": 0, "f1": 0, "recall": 0}
    truth = {"yes_rate": 0.5 * 0.8 + 0.5 * 0.3, "recall": 0.8, "f1": 2 * 0.4 / (0.55 + 0.5)}
    for _ in range(200):
        gold = rng.choice(["yes", "no"], 120)
        said = np.where(rng.random(120) < np.where(gold == "yes", 0.8, 0.3), "yes", "no")
        figures = yes_no.figures_of(list(gold), list(said), range(120))
        for name in held:
            low, high = figures[name].interval
            held[name] += low <= truth[name] <= high
    assert all(0.88 <= count / 200 <= 1 for count in held.values()), held


@pytest.mark.parametrize("said", ["yes", "no", "gold"])
def test_no_answerer_is_certain(said):
    gold = ["yes", "no"] * 10
    figures = yes_no.figures_of(gold, gold if said == "gold" else [said] * 20, range(20))
    for name in ("recall", "f1", "f1_no", "balanced_accuracy", "gap", "fpr", "yes_rate"):
        low, high = figures[name].interval
        assert high - low > 0.05 and low - 1e-9 <= figures[name].value <= high + 1e-9, name


def test_nothing_to_measure_is_none():
    figures = yes_no.figures_of(["no", "no"], ["no", "no"], "ab")
    assert figures["recall"].value is None and figures["fnr"].value is None and figures["d_prime"].value is None
    assert figures["f1"].value is None and figures["f1_no"].value == 1


@pytest.mark.parametrize("said", ["no", None])
def test_a_set_without_a_yes_has_no_f1_and_no_nan(said):
    gold, answers = ["no", "no"], [said, said]
    bias = yes_no.yes_bias(gold, answers, yes_no.figures_of(gold, answers, "ab"))
    assert {name: moved["f1"] for name, moved in bias["unparsed_as"].items()} == {
        "yes": None if said else 0.0, "no": None, "drop": None,
    }  # fmt: skip
    json.dumps(bias, allow_nan=False)
