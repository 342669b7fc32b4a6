"""The view at the first answer token, for answers whose bias and ability are known."""

import math

import numpy as np
import pytest
from scipy.special import log_expit
from scipy.stats import norm
from sklearn.metrics import roc_curve

from vapr.errors import UserError
from vapr.evaluation.scoring.logit_view import logit_view
from vapr.evaluation.scoring.prediction import Prediction


def predictions(margins, **more) -> list[Prediction]:
    return [
        Prediction(
            benchmark="pope", id=str(n), question="?", prediction="Yes", answer="yes",
            meta={"image": f"{n // 2}", "log_p_yes": float(log_expit(m)), "log_p_no": float(log_expit(-m)), **more},
        )
        for n, m in enumerate(margins)
    ]  # fmt: skip


def test_bias_is_told_from_ability():
    rng = np.random.default_rng(0)
    gold = np.array(["yes", "no"] * 1000)
    margins = rng.normal(np.where(gold == "yes", 1.0, -1.0) + 0.7, 1.0)  # leans to yes by 0.7
    view = logit_view(predictions(margins), list(gold))
    assert view["questions"] == 2000 and view["without"] == 0
    assert view["threshold_shift"]["value"] == pytest.approx(0.7, abs=0.08)
    assert view["accuracy_shifted"]["value"] == pytest.approx(norm.cdf(1), abs=0.02)
    assert view["accuracy_unshifted"]["value"] == pytest.approx((norm.cdf(1.7) + norm.cdf(0.3)) / 2, abs=0.02)
    assert view["p_yes_minus_p_no"]["value"] == pytest.approx(np.tanh(margins / 2).mean())
    for name in ("threshold_shift", "accuracy_shifted", "p_yes_minus_p_no", "error_shifted"):
        low, high = view[name]["interval"]
        assert low < view[name]["value"] < high and high - low < 0.2, name


def test_the_error_is_that_of_the_roc_curve():
    rng = np.random.default_rng(3)
    gold = np.array(["yes"] * 70 + ["no"] * 130)
    margins = rng.normal(np.where(gold == "yes", 0.5, -0.5), 1.0)
    fpr, tpr, _ = roc_curve(gold == "yes", margins, drop_intermediate=False)
    closest = np.argmin(np.abs(fpr - (1 - tpr)))
    view = logit_view(predictions(margins), list(gold))
    assert view["error_shifted"]["value"] == pytest.approx((fpr[closest] + 1 - tpr[closest]) / 2, abs=0.01)


def test_by_hand():
    # No: -1, 0.5, 2; yes: 1, 3, 4. Between 1 and 2, one "no" is above and one "yes" below.
    view = logit_view(predictions([-1, 0.5, 2, 1, 3, 4]), ["no"] * 3 + ["yes"] * 3)
    assert view["threshold_shift"]["value"] == pytest.approx(1.5)
    assert view["accuracy_shifted"]["value"] == pytest.approx(4 / 6)
    assert view["accuracy_unshifted"]["value"] == pytest.approx(4 / 6)
    assert view["error_shifted"]["value"] == pytest.approx(1 / 3)


def test_rows_without_logits_are_counted():
    rows = predictions([1, -1]) + predictions([3], log_p_yes=None)
    view = logit_view(rows, ["yes", "no", "yes"])
    assert view["questions"] == 2 and view["without"] == 1
    assert logit_view(rows[2:], ["yes"]) is None


def test_one_truth_has_no_threshold():
    view = logit_view(predictions([1, 2]), ["yes", "yes"])
    assert view["threshold_shift"]["value"] is None and view["accuracy_unshifted"]["value"] == 1


def test_certainty_is_no_infinity():
    view = logit_view(predictions([0.0, 0.0], log_p_no=-math.inf), ["yes", "no"])
    assert math.isfinite(view["threshold_shift"]["value"])


@pytest.mark.parametrize("value", ["-0.1", 0.7, float("nan"), True, [1]])
def test_what_is_no_log_of_a_probability(value):
    with pytest.raises(UserError, match="question '0' of pope: 'log_p_yes' is .*no log of a probability"):
        logit_view(predictions([1], log_p_yes=value), ["yes"])
