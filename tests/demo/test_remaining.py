"""What is left of a demo: proportions at the machine's own speed."""

import pytest

from vapr.demo import remaining
from vapr.demo.remaining import Remaining, in_words


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(remaining.time, "monotonic", lambda: now[0])
    return now


def test_a_machine_half_as_fast_is_given_twice_the_time(clock):
    left = Remaining({"draw": 100.0, "train": 300.0, "ask": 100.0})
    assert left.begin("draw") == "stage 1 of 3, about 8 min left"
    clock[0] += 200
    left.begin("train")
    assert left.left() == pytest.approx(800, rel=0.03)
    clock[0] += 300
    assert left.left(0.5) == pytest.approx(500, rel=0.03)
    assert left.line(0.5) == "stage 2 of 3, about 8 min left"
    clock[0] += 300
    left.begin("ask")
    clock[0] += 200
    left.end()
    assert left.left() == 0
    assert left.seconds == {"draw": 200, "train": 600, "ask": 200}


def test_what_was_said_at_each_stage_is_kept(clock):
    left = Remaining({"draw": 60.0, "train": 60.0})
    left.begin("draw")
    clock[0] += 60
    left.begin("train")
    assert [(one["stage"], one["after"], one["seconds_left"]) for one in left.said] == [
        ("draw", 0.0, 120.0), ("train", 60.0, 60.0),
    ]  # fmt: skip


def test_times_in_words():
    assert [in_words(seconds) for seconds in (20, 61, 150, 299)] == [
        "less than a minute", "about 1 min", "about 2 min", "about 5 min",
    ]  # fmt: skip
