"""Means of shares: worked out by hand, and an interval that covers the truth as often as it says."""

import numpy as np
import pytest

from vapr.evaluation.scoring.averages import mean_of
from vapr.evaluation.scoring.figures import NONE, share
from vapr.intervals import wilson


def test_by_hand():
    """Of 40 and 160 independent questions, a mean with equal weights is worth 1 / (1/4/40 + 1/4/160) = 128."""
    mean = mean_of([share([1] * 20 + [0] * 20), share([1] * 120 + [0] * 40)])
    assert mean.value == 0.625 and mean.count == 200
    assert mean.interval == pytest.approx(wilson(0.625, 128))
    assert mean_of([share([1, 0]), share([1, 1])], [0.25, 0.75]).value == 0.875


def test_nothing_measured():
    assert mean_of([]) == NONE and mean_of([share([1, 0]), NONE]) == NONE


def test_one_share_keeps_its_interval():
    for right in ([1, 0, 1, 1], [1] * 50, [0] * 3):
        mean, alone = mean_of([share(right)]), share(right)
        assert mean.value == alone.value and mean.interval == pytest.approx(alone.interval)


def test_questions_of_one_picture_make_it_wider():
    right, pictures = [1, 1, 0, 0] * 10, [number // 2 for number in range(40)]
    narrow, wide = mean_of([share(right)] * 2), mean_of([share(right, pictures)] * 2)
    assert wide.interval[0] < narrow.interval[0] and wide.interval[1] > narrow.interval[1]


@pytest.mark.parametrize("truth", [0.99, 0.97, 0.6])
def test_coverage(truth):
    """The interval of a mean over 18 axes holds the truth in 95 % of 1,000 draws, near 1 as well."""
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        low, high = mean_of([share(draw.random(80) < truth) for _ in range(18)]).interval
        covered += low <= truth <= high
    assert 930 <= covered <= 980
