"""RePOPE: its own truths, the questions that it drops, and answers to POPE scored with it."""

import pytest

from tests.evaluation.benchmarks.authors_files import answered, pope, write_lines
from vapr.errors import UserError
from vapr.evaluation.benchmarks.pope import POPE
from vapr.evaluation.benchmarks.repope import REPOPE
from vapr.evaluation.readers.open import open_answers
from vapr.evaluation.score import score
from vapr.evaluation.scoring.prediction import read_json_lines, write_predictions


@pytest.fixture
def folder(tmp_path):
    """Both files in one folder: RePOPE turns question 1 into a no and drops question 8 of each split."""
    for split in ("adversarial", "popular"):
        rows = [row for _, row in read_json_lines(pope(tmp_path) / f"coco_pope_{split}.json")]
        rows[0]["label"] = "no"
        write_lines(tmp_path / f"coco_repope_{split}.json", rows[:-1])
    return tmp_path


def test_each_reads_its_own_files(folder):
    assert len(POPE.read(folder)) == 16 and len(REPOPE.read(folder)) == 14
    assert {q.benchmark for q in REPOPE.read(folder)} == {"repope"}
    assert REPOPE.read(folder)[0].answer == "no" and POPE.read(folder)[0].answer == "yes"


def test_answers_to_pope_are_scored_with_its_truth(folder):
    write_predictions(folder / "predictions.jsonl", answered(POPE.read(folder), lambda q: q.answer))
    predictions, notes, _ = open_answers(folder / "predictions.jsonl", REPOPE, REPOPE.read(folder))
    assert notes == ["answers to pope: 2 are to questions that RePOPE drops"]
    assert score(predictions, REPOPE)["accuracy"] == 12 / 14
    with pytest.raises(UserError, match="no predictions of repope; it holds pope"):
        open_answers(folder / "predictions.jsonl", REPOPE, None)


def test_answers_of_llavas_layout(folder):
    asked = [
        {"question_id": n, "image": q.meta["image"], "text": q.question + "\nAnswer.", "category": q.meta["split"]}
        for n, q in enumerate(reversed(POPE.read(folder)))
    ]
    write_lines(folder / "llava_pope_test.jsonl", asked)
    file = write_lines(folder / "answers.jsonl", [{"question_id": n, "text": "Yes"} for n in range(16)])
    predictions, notes, _ = open_answers(file, REPOPE, REPOPE.read(folder))
    assert len(predictions) == 14 and notes == ["2 answers are to questions that the truth drops"]
    assert score(predictions, REPOPE)["accuracy"] == 6 / 14


def test_answers_of_popes_own_layout(folder):
    """They must name the picture: the authors' join by line is refused."""
    questions = POPE.read(folder)
    bare = [{"question": q.question, "answer": "Yes"} for q in questions]
    with pytest.raises(UserError, match=r"bare.jsonl:1: an answer that names no picture, .* never joined by line"):
        open_answers(write_lines(folder / "bare.jsonl", bare), POPE, questions)
    named = [row | {"image": q.meta["image"]} for row, q in zip(bare, questions, strict=True)]
    with pytest.raises(UserError, match="no 'split', and the file's name says none of"):
        open_answers(write_lines(folder / "named.jsonl", named), POPE, questions)
    split = [row | {"split": q.meta["split"]} for row, q in zip(named, questions, strict=True)]
    predictions, notes, _ = open_answers(write_lines(folder / "split.jsonl", split[::-1]), POPE, questions)
    assert score(predictions, POPE)["accuracy"] == 0.5 and notes == []
    half = write_lines(folder / "answers_popular.jsonl", named[8:])
    with pytest.raises(UserError, match="8 answers to 16 questions"):
        open_answers(half, POPE, questions)
    predictions, notes, _ = open_answers(half, POPE, questions, partial=True)
    assert {row.split for row in predictions} == {"popular"} and notes == ["partial: 8 of 16 questions have no answer"]
    other = [row | {"image": "other.jpg"} for row in split]
    with pytest.raises(UserError, match=r"'thing1' on other.jpg is no question of POPE adversarial"):
        open_answers(write_lines(folder / "other.jsonl", other), POPE, questions)
    with pytest.raises(UserError, match="no text 'answer'"):
        open_answers(write_lines(folder / "none.jsonl", [{"question": "?", "answer": None}]), POPE, questions)


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="no coco_repope_.*YanNeu/RePOPE"):
        REPOPE.read(tmp_path)
    row = {"question_id": 1, "image": None, "text": "Is there a dog in the image?", "label": "yes"}
    with pytest.raises(UserError, match=r"coco_repope_random.json:1: 'image' is null, not a text"):
        REPOPE.read(write_lines(tmp_path / "coco_repope_random.json", [row]))
