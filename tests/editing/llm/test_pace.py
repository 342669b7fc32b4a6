"""How many requests a server gets at once, against a clock that only the test moves."""

import asyncio

import pytest

from vapr.llm import pace
from vapr.llm.pace import Pace
from vapr.llm.reasoning import StillReasoning, without_reasoning


@pytest.fixture
def clock(monkeypatch):
    """``clock(seconds)`` lets that much time pass and returns the time."""
    now = [100.0]

    def passes(seconds: float = 0.0) -> float:
        now[0] += seconds
        return now[0]

    monkeypatch.setattr(pace.time, "monotonic", passes)
    return passes


def test_it_begins_with_as_many_as_are_allowed(clock):
    assert Pace(64, 120).limit == 64


def test_what_is_too_much_halves_it_once_for_all_that_was_under_way(clock):
    server = Pace(64, 120)
    sent = [clock(0.1) for _ in range(64)]
    clock(1)
    for sent_at in sent[:60]:
        server.too_much(sent_at)
    assert server.limit == 32
    later = clock(1)
    server.too_much(later)
    assert server.limit == 16
    for _ in range(10):
        server.too_much(clock(1))
    assert server.limit == 1


def test_it_rises_by_one_when_as_many_as_it_is_were_answered(clock):
    server = Pace(64, 120)
    for _ in range(4):
        server.too_much(clock(1))
    assert server.limit == 4
    for _ in range(4):
        server.answered(clock())
    assert 4.8 < server.limit <= 5
    for _ in range(5_000):
        server.answered(clock())
    assert server.limit == 64


def test_a_reply_after_half_of_the_timeout_was_too_slow(clock):
    server = Pace(8, 120)
    first, second = clock(), clock(1)
    clock(58)
    server.answered(first)
    assert server.limit == 8
    clock(2)  # 61 s after the first, 60 after the second
    server.answered(first)
    assert server.limit == 4
    clock(1)
    server.answered(second)  # it was under way with the first
    assert server.limit == 4


def test_all_wait_as_long_as_the_server_says(clock):
    server = Pace(8, 120)
    assert server.seconds_to_wait() == 0
    server.too_much(clock(), wait=30)
    server.too_much(clock(), wait=10)
    clock(12)
    assert server.seconds_to_wait() == 18
    clock(20)
    assert server.seconds_to_wait() == 0


def test_places_are_given_in_order_and_first_to_those_that_were_refused(clock):
    server, order = Pace(1, 120), []

    async def request(name: str, again: bool) -> None:
        await server.enter(again=again)
        order.append(name)
        server.leave()

    async def all_of_them() -> None:
        await server.enter()
        waiting = [asyncio.create_task(request(name, name == "refused")) for name in ("a", "b", "refused", "c")]
        await asyncio.sleep(0)
        waiting[1].cancel()
        await asyncio.sleep(0)
        assert order == []
        server.leave()
        await asyncio.gather(*waiting, return_exceptions=True)

    with server.running():
        asyncio.run(all_of_them())
    assert order == ["refused", "a", "c"]


# Reasoning


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>It is blue.</think>\n\n{}", "{}"),
        ("\n<think>\n</think>A pear.", "A pear."),
        ("It is blue, so\n</think>\nA pear.", "A pear."),  # the chat template wrote the first mark
        ("A pear.", "A pear."),
        ('{"a": "<think>x</think>"}', '{"a": "<think>x</think>"}'),
        ("The mark <think> is closed by </think> here.", "The mark <think> is closed by </think> here."),
        ("<think>One.</think>It says </think>.", "It says </think>."),
        ("<think>One.</think>", ""),
    ],
)
def test_the_answer_is_what_comes_after_the_reasoning(text, answer):
    assert without_reasoning(text) == answer


@pytest.mark.parametrize("text", ["<think>", " <think>It is blue, so {}"])
def test_reasoning_without_an_end_is_no_answer(text):
    with pytest.raises(StillReasoning):
        without_reasoning(text)
