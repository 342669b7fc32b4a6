"""A sample is spread over splits, seeded, and leaves together what counts together."""

from vapr.evaluation.generation.sample import sample
from vapr.evaluation.scoring.prediction import Question


def ask(number: int, **meta) -> Question:
    return Question(benchmark="any", id=str(number), question="?", answer="yes", meta=meta)


def test_splits_keep_their_shares_and_questions_their_order():
    questions = [ask(n, split="a" if n < 60 else "b", image=f"{n % 5}.jpg") for n in range(90)]
    drawn = sample(questions, 30)
    assert [sum(q.meta["split"] == split for q in drawn) for split in "ab"] == [20, 10]
    assert [int(q.id) for q in drawn] == sorted(int(q.id) for q in drawn)
    assert sample(questions, 30) == drawn != sample(questions, 30, seed=1)
    assert sample(questions, 90) == sample(questions, 1000) == questions


def test_naturalbenchs_groups_are_whole():
    questions = [ask(n, split="yes_no" if n < 400 else "multiple_choice", group=n // 4) for n in range(600)]
    drawn = sample(questions, 50)
    assert 50 <= len(drawn) <= 56
    groups = [q.meta["group"] for q in drawn]
    assert {groups.count(group) for group in groups} == {4}


def test_hallusionbenchs_sets_are_whole():
    questions = [
        ask(n, category="VD", subcategory="illusion", set_id=str(n // 7), figure_id=str(n % 7)) for n in range(700)
    ]
    drawn = sample(questions, 20)
    assert len(drawn) == 21
    assert len({q.meta["set_id"] for q in drawn}) == 3


def test_two_questions_about_a_picture_are_drawn_together():
    questions = [ask(n, split="count", image=f"{n // 2}.jpg") for n in range(100)]
    drawn = sample(questions, 10)
    assert len(drawn) == 10
    assert len({q.meta["image"] for q in drawn}) == 5
