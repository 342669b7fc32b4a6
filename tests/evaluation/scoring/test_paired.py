"""Paired tests against values worked by hand, enumeration and simulation."""

import math
from itertools import product

import numpy as np
import pytest

from vapr.evaluation.scoring.paired import detectable_difference, difference, mcnemar, power, sign_flip


def outcomes(both, only_a, only_b, neither):
    """Return right_a and right_b with these counts."""
    cells = [(1, 1)] * both + [(1, 0)] * only_a + [(0, 1)] * only_b + [(0, 0)] * neither
    return np.array(cells, dtype=bool).reshape(-1, 2).T


def test_few_discordant_answers_are_tested_exactly():
    # 2 against 8 of 10: 2 (1 + 10 + 45) / 1024
    assert mcnemar(*outcomes(50, 2, 8, 40)) == {
        "only_a": 2,
        "only_b": 8,
        "p": pytest.approx(112 / 1024),
        "test": "exact",
    }


def test_many_are_tested_with_corrected_chi_square():
    # (|10 - 20| - 1)^2 / 30 = 2.7, and P(chi2 with one degree > x) = erfc(sqrt(x / 2))
    result = mcnemar(*outcomes(100, 10, 20, 70))
    assert result["test"] == "chi2" and result["p"] == pytest.approx(math.erfc(math.sqrt(2.7 / 2)))


def test_25_discordant_answers_are_the_first_of_chi_square():
    assert [mcnemar(*outcomes(0, 10, b, 0))["test"] for b in (14, 15)] == ["exact", "chi2"]


@pytest.mark.parametrize("cells", [(10, 0, 0, 5), (0, 0, 0, 0), (0, 13, 13, 0), (3, 4, 4, 3)])
def test_equal_models_do_not_differ(cells):
    assert mcnemar(*outcomes(*cells))["p"] == 1


def test_sign_flip_of_single_questions_is_the_exact_test():
    a, b = outcomes(50, 2, 8, 40)
    assert sign_flip(a, b, range(100)) == pytest.approx(112 / 1024, abs=0.01)


def test_sign_flip_counts_pictures_not_questions():
    a, b = outcomes(0, 0, 12, 60)
    pictures = np.repeat(np.arange(18), 4)  # all twelve are about three pictures: at best 2 / 2^3
    assert mcnemar(a, b)["p"] < 0.001
    assert sign_flip(a, b, pictures) == pytest.approx(0.25, abs=0.01)


def test_sign_flip_of_unequal_pictures_is_the_enumerated_one():
    sums = [3, 2, 2, -1]
    a, b = outcomes(0, 1, 7, 0)
    pictures = [3, 0, 0, 0, 1, 1, 2, 2]
    drawn = [
        abs(sum(sign * size for sign, size in zip(signs, sums, strict=True))) for signs in product((1, -1), repeat=4)
    ]
    assert sign_flip(a, b, pictures) == pytest.approx(np.mean([value >= sum(sums) for value in drawn]), abs=0.01)


def test_difference_is_b_minus_a_with_an_interval_near_the_normal_one():
    a, b = outcomes(400, 40, 80, 480)
    figure = difference(a, b, range(1000))
    assert figure.value == pytest.approx(0.04) and figure.count == 1000
    reach = 1.96 * math.sqrt((0.12 - 0.04**2) / 1000)
    assert figure.interval == pytest.approx((0.04 - reach, 0.04 + reach), abs=0.003)


def test_difference_of_equal_pictures_is_wider():
    a, b = outcomes(400, 40, 80, 480)
    alone, together = difference(a, b, range(1000)), difference(a, b, np.arange(1000) // 4)
    widths = [figure.interval[1] - figure.interval[0] for figure in (alone, together)]
    assert widths[1] / widths[0] == pytest.approx(2, abs=0.2)  # sqrt(4): neighbours are equal


def test_no_discordance_is_not_certainty():
    a, b = outcomes(8, 0, 0, 2)
    assert difference(a, b, range(10)).interval == pytest.approx((-1.96 / 12, 1.96 / 12), abs=1e-3)
    assert difference(a[:0], b[:0], []).value is None


def test_power_is_what_a_simulation_finds():
    drawn = np.random.default_rng(0).multinomial(500, [0.05, 0.12, 0.83], size=4000)
    only_a, only_b = drawn[:, 0], drawn[:, 1]
    told = np.abs(only_a - only_b) / np.sqrt(only_a + only_b) > 1.96
    assert power(0.17, 500, 0.07) == pytest.approx(told.mean(), abs=0.03)


@pytest.mark.parametrize(("share", "n"), [(0.1, 1000), (0.3, 100), (0.02, 9000)])
def test_the_detectable_difference_has_the_power_asked_for(share, n):
    assert power(share, n, detectable_difference(share, n, 0.9)) == pytest.approx(0.9, abs=1e-6)


def test_detectable_difference_by_hand():
    # n = (1.96 sqrt(0.2) + 0.8416 sqrt(0.2 - 0.1^2))^2 / 0.1^2 = 154.6 at a difference of 0.1
    assert detectable_difference(0.2, 154.6) == pytest.approx(0.1, abs=1e-3)


def test_what_cannot_be_told_is_one():
    assert detectable_difference(0.0, 0) == detectable_difference(0.5, 3) == 1
    assert 0 < detectable_difference(0.0, 100) < 0.1
    assert power(0.0, 0, 0.0) == 0
