"""Scores read from reviews, and what many come to."""

import re

import pytest

from vapr.evaluation.scoring.verdicts import mean, ratio, read_scores, read_yes_no, share_within

RATING = re.compile(r"rating:\s*(-?[\d.]+)", re.IGNORECASE)
PAIR = re.compile(r"^(?P<reference>\d+) (?P<score>\d+)$", re.MULTILINE)
YES_NO = re.compile(r"judgement: (yes|no)", re.IGNORECASE)


@pytest.mark.parametrize(
    ("review", "verdict"),
    [
        ("Rating: 4", (4,)),
        ("Good. rating:  2.5", (2.5,)),
        ("Rating: 4 ... so, as I said, Rating: 4.0", (4,)),
        ("Rating: 4, or Rating: 5", None),
        ("Rating: 7", None),
        ("Rating: -1", None),
        ("Rating: 1.2.3", None),
        ("Rating: four", None),
        ("", None),
        ("<think>Rating: 1</think>Rating: 3", (3,)),
        ("<think>Rating: 1", None),
    ],
)
def test_scores(review, verdict):
    assert read_scores(review, RATING, 0, 6) == verdict


def test_two_scores_come_by_their_names():
    assert read_scores("8 10\nBoth are good.", PAIR, 0, 10) == (10, 8)
    assert read_scores("8 11", PAIR, 0, 10) is None


@pytest.mark.parametrize(
    ("review", "verdict"),
    [
        ("Judgement: Yes", (1,)), ("JUDGEMENT: NO", (0,)), ("Judgement: yes. Judgement: Yes", (1,)),
        ("Judgement: Yes. Judgement: No", None), ("Yes", None), ("Judgement: maybe", None),
    ],
)  # fmt: skip
def test_yes_and_no(review, verdict):
    assert read_yes_no(review, YES_NO) == verdict


def test_figures_of_verdicts():
    verdicts = [(6.0, 8.0), (2.0, 8.0), (1.0, 4.0)]
    pictures = ["a", "a", "b"]
    assert mean(verdicts, pictures).value == 3
    assert mean(verdicts, pictures, place=1).value == 20 / 3
    assert ratio(verdicts, pictures).value == 45  # 100 * 9 / 20, not the mean of 75, 25 and 25
    assert share_within(verdicts, pictures, below=2).value == 1 / 3
    assert share_within(verdicts, pictures, at_least=2).value == 2 / 3
    # Drawn are pictures: a and a 50, b and b 25, and nothing lies outside.
    assert ratio(verdicts, pictures).interval == (25, 50)


def test_nothing_makes_no_figure():
    assert [figure.value for figure in (mean([], []), ratio([], []), share_within([], []))] == [None] * 3
