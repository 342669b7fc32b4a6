"""MMMU: LLaVA-1.5-13B's answers with their published score, and open answers worked out by hand."""

import json
import os
from pathlib import Path

import pytest

from tests.evaluation.benchmarks.test_choices import mmmu_row, write_lines
from vapr.evaluation.benchmarks import mmmu_rule
from vapr.evaluation.benchmarks.mmmu import DISCIPLINES, MMMU
from vapr.evaluation.readers.open import open_answers
from vapr.evaluation.score import score, score_rows
from vapr.evaluation.scoring.prediction import Prediction

REAL = Path(os.environ.get("VAPR_REAL_DATA", "")) / "mmmu"
needs_real = pytest.mark.skipif(not os.environ.get("VAPR_REAL_DATA"), reason="VAPR_REAL_DATA is not set")


@needs_real
def test_published_score_of_llava():
    """0.367 from the answers by subject, of which two are guesses, and from the file of letters."""
    questions = MMMU.read(REAL)
    predictions, notes, _ = open_answers(REAL / "llava1.5_13b", MMMU, questions)
    assert notes == ["total_val_output.json left aside: the subjects' own files are read"]
    result = score(predictions, MMMU, "official")
    assert len(questions) == 900 and len(result["splits"]) == 30
    assert round(result["accuracy"], 3) == 0.367 and result["guessed"] == 2 and result["unparsed_rate"] == 2 / 900
    # one of the two draws is right; of four options each, half a question is to be expected
    assert result["figures"]["expected_accuracy"]["value"] == pytest.approx((330 - 1 + 2 / 4) / 900)

    letters, _, _ = open_answers(REAL / "llava1.5_13b" / "total_val_output.json", MMMU, questions)
    total = score(letters, MMMU, "official")
    assert round(total["accuracy"], 3) == 0.367 and total["guessed"] == 0
    for policy in ("strict", "last-answer"):  # a list of all options is no answer, and "Step b" is not "B"
        assert score(predictions, MMMU, policy)["accuracy"] == pytest.approx(328 / 900)


@needs_real
def test_each_letter_is_the_one_that_the_authors_read():
    read_by_authors = json.loads((REAL / "llava1.5_13b" / "total_val_output.json").read_text())
    rows = score_rows(open_answers(REAL / "llava1.5_13b", MMMU, MMMU.read(REAL))[0], MMMU, "official")
    choices = [row for row in rows if row.prediction.meta["question_type"] == "multiple-choice"]
    guessed = [row.prediction.id for row in choices if row.reading.guessed]
    assert len(choices) == 847 and guessed == ["validation_Design_4", "validation_Psychology_4"]
    assert all(row.reading.value == read_by_authors[row.prediction.id] for row in choices if not row.reading.guessed)


def test_disciplines_hold_thirty_subjects():
    subjects = [subject for subjects in DISCIPLINES.values() for subject in subjects]
    assert len(subjects) == len(set(subjects)) == 30 and len(DISCIPLINES) == 6


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("'B'!", "B"),
        ("B?", "B"),
        ("(A) is wrong, so (C)", "C"),  # the last in brackets
        ("A or B is fine ", "B"),
        ("B) blue", None),  # neither "(B)" nor " B ", and too short to be looked through
        ("it looks to me rather red, not blue", "B"),  # the option whose text stands last
        ("so it is blue", None),
        ("", None),
    ],
)
def test_the_authors_rule_for_options(text, letter):
    reading = mmmu_rule.read_choice(text, "ABCD", ["red", "blue", "green", "yellow"], "validation_Art_1")
    assert (None if reading.guessed else reading.value) == letter and reading.value in "ABCD"


@pytest.mark.parametrize(
    ("text", "truths", "right"),
    [
        ("The answer is 1,234.", ["1234"], True),
        ("x = 3 = 4", ["4"], True),
        ("x = 4\nso that is all", ["4"], False),  # "=" counts in the last line alone
        ("Step b", ["B"], True),
        ("b", ["B"], True),
        ("basic", ["B"], False),
        ("0.29", ["0.286"], True),  # equal to two decimals
        ("0.28", ["0.286"], False),
        ("It is a transformation of sorts", ["Transformation"], True),
        ("mgs", ["$MgS$", "MgS"], True),
        ("Mx", ["$MgS$", "MgS"], False),
        ("It is 12 or 13", ["13"], True),  # any of several numbers will do
        ("", ["3"], False),
    ],
)
def test_the_authors_rule_for_open_answers(text, truths, right):
    assert mmmu_rule.open_is_right(mmmu_rule.read_open(text), truths) == right


@pytest.mark.parametrize(
    ("text", "answer", "strict", "last"),
    [
        ("0.29", "0.286", 1, 1),
        ("3.43", ["24/7", "3.429"], 1, 1),
        ("24/7", ["24/7", "3.429"], 1, 1),
        ("1 foot per second", ["24/7", "3.429"], 0, 0),
        ("0.02", "1/64", 0, 0),
        ("$1/64$", "1/64", 1, 1),
        ("The answer is MgS.", ["$MgS$", "MgS"], 1, 1),
        ("We burn it. The compound is MgS.", ["$MgS$", "MgS"], 0, 1),
        ("It is 12 or 13", "13", 0, 0),
        ("We add. So the result is 13 m.", "13", 0, 1),
        ("Step b", "B", 0, 0),
    ],
)
def test_open_answers_as_they_are_stated(text, answer, strict, last):
    prediction = Prediction(
        benchmark="mmmu", id="validation_Math_1", question="", prediction=text, answer=answer,
        meta={"question_type": "short-answer"},
    )  # fmt: skip
    assert score([prediction], MMMU, "strict")["accuracy"] == strict
    assert score([prediction], MMMU, "last-answer")["accuracy"] == last


def test_an_open_answer_without_a_number_is_unparsed_where_the_truth_is_one():
    prediction = Prediction(benchmark="mmmu", id="validation_Math_1", question="", prediction="zxq", answer="13")
    assert score([prediction], MMMU)["unparsed"] == 1


def test_questions_with_pictures_in_them(tmp_path):
    rows = [
        mmmu_row(1, question="Is <image 2> like <image 1>, or is <image 2> older?", image_2="b.png"),
        mmmu_row(2, question_type="open", options="[]", answer="['$MgS$', 'MgS']"),
    ]
    first, second = MMMU.read(write_lines(tmp_path / "validation.jsonl", rows))
    assert first.question.startswith("Is <image> like <image>, or is image 2 older?\n(A) red")
    assert first.images == (tmp_path / "b.png", tmp_path / "a.png") and first.meta["split"] == "Art_Theory"
    assert second.answer == ["$MgS$", "MgS"] and second.question.endswith("a single word or phrase.")


def test_means(tmp_path):
    """Art 1 of 1, Math 1 of 4: 0.4 over questions, 0.625 over subjects."""
    predictions = [
        Prediction(benchmark="mmmu", id=f"validation_{subject}_1{n}", question="", prediction="B", answer=answer, meta={"options": ["x", "y"]})
        for n, (subject, answer) in enumerate([("Art", "B"), ("Math", "B"), ("Math", "A"), ("Math", "A"), ("Math", "A")])
    ]  # fmt: skip
    result = score(predictions, MMMU, "official")
    assert result["accuracy"] == 0.4 and result["figures"]["mean_of_subjects"]["value"] == 0.625
    assert result["figures"]["Art and Design"]["value"] == 1 and result["figures"]["Science"]["value"] == 0.25
