"""POPE: the authors' files, LLaVA's answers with their published F1, and answerers whose figures theory gives."""

import json
import os
from pathlib import Path

import pytest

from vapr.errors import UserError
from vapr.evaluation.benchmarks.pope import POPE
from vapr.evaluation.readers.open import open_answers
from vapr.evaluation.score import score
from vapr.evaluation.scoring.prediction import Prediction, Question

REAL = Path(os.environ.get("VAPR_REAL_DATA", "")) / "pope"
needs_real = pytest.mark.skipif(not os.environ.get("VAPR_REAL_DATA"), reason="VAPR_REAL_DATA is not set")


def question(number: int, thing: str, label: str, image: str = "a.jpg") -> dict:
    return {"question_id": number, "image": image, "text": f"Is there a {thing} in the image?", "label": label}


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """Eight questions about two pictures, in two splits whose ids are alike."""
    for split in ("adversarial", "popular"):
        rows = [question(n, f"thing{n}", "yes" if n % 2 else "no", "ab"[n > 2] + ".jpg") for n in (1, 2, 3, 4)]
        write_lines(tmp_path / f"coco_pope_{split}.json", rows)
    return tmp_path


def answered(questions: list[Question], answer) -> list[Prediction]:
    return [Prediction.of(question, answer(question)) for question in questions]


def test_questions_of_a_folder(folder):
    questions = POPE.read(folder)
    assert [question.id for question in questions][::4] == ["adversarial-1", "popular-1"]
    assert questions[2].meta == {"split": "adversarial", "image": "b.jpg"} and questions[2].answer == "yes"
    assert questions[0].images == (folder / "a.jpg",)


@needs_real
def test_published_f1_of_llava():
    """LLaVA-1.5-13B: the official scorer's F1, 85.9 in the paper as the mean of the three."""
    questions = POPE.read(REAL)
    predictions, notes, _ = open_answers(REAL / "llava-v1.5-13b.jsonl", POPE, questions)
    assert notes == ["llava_pope_test.jsonl asks 8,910 of the 9,000 questions"]
    for policy in ("official", "strict", "last-answer"):
        result = score(predictions, POPE, policy)
        f1 = {name: round(part["f1"], 4) for name, part in result["splits"].items()}
        assert f1 == {"adversarial": 0.8446, "random": 0.8714, "popular": 0.8625}, policy
        assert round(result["figures"]["mean_f1_of_splits"]["value"], 4) == 0.8595
        assert result["splits"]["random"]["questions"] == 2910
        assert result["unparsed_rate"] == 0


@needs_real
def test_order_of_the_answers_is_nothing(tmp_path):
    lines = (REAL / "llava-v1.5-13b.jsonl").read_text().splitlines()
    (tmp_path / "answers.jsonl").write_text("\n".join(reversed(lines)))
    (tmp_path / "llava_pope_test.jsonl").write_bytes((REAL / "llava_pope_test.jsonl").read_bytes())
    predictions, _, _ = open_answers(tmp_path / "answers.jsonl", POPE, POPE.read(REAL))
    assert round(score(predictions, POPE)["splits"]["random"]["f1"], 4) == 0.8714


@pytest.mark.parametrize("policy", ["official", "strict", "last-answer"])
@pytest.mark.parametrize(
    ("answer", "accuracy", "precision", "recall", "f1", "yes_rate"),
    [
        (lambda q: "Yes", 0.5, 0.5, 1.0, 2 / 3, 1.0),
        (lambda q: "No.", 0.5, None, 0.0, 0.0, 0.0),
        (lambda q: q.answer.capitalize(), 1.0, 1.0, 1.0, 1.0, 0.5),
        (lambda q: "no" if q.answer == "yes" else "Yes, there is.", 0.0, 0.0, 0.0, 0.0, 0.5),
    ],
    ids=["always yes", "always no", "perfect", "always wrong"],
)
def test_answerers(folder, policy, answer, accuracy, precision, recall, f1, yes_rate):
    result = score(answered(POPE.read(folder), answer), POPE, policy)
    for part in (result, *result["splits"].values()):
        assert part["accuracy"] == accuracy and part["precision"] == precision and part["recall"] == recall
        assert part["f1"] == pytest.approx(f1) and part["yes_rate"] == yes_rate
        assert part["gold_yes_rate"] == 0.5 and part["unparsed_rate"] == 0
    assert list(result["splits"]) == ["adversarial", "popular"]


def test_noise_is_unparsed(folder):
    """The official rule calls noise a yes; it says so, and the other policies read nothing."""
    predictions = answered(POPE.read(folder), lambda q: "zxq vrt 81 lorem")
    for policy in ("strict", "last-answer"):
        result = score(predictions, POPE, policy)
        assert (
            result["unparsed_rate"] == 1 and result["accuracy"] == 0 and result["f1"] == 0 and result["yes_rate"] == 0
        )
    official = score(predictions, POPE, "official")
    assert official["yes_rate"] == 1 and official["unparsed_rate"] == 1 and official["guessed"] == 8
    assert official["policies"]["strict"] == {"accuracy": 0, "yes_rate": 0, "unparsed_rate": 1, "guessed": 0}


def test_the_official_rule():
    def read(text: str) -> str | None:
        prediction = Prediction(benchmark="pope", id="1", question="", prediction=text, answer="yes")
        return POPE.read_answer(prediction, "official").value

    assert [read(t) for t in ("No, there is none", "I do not see one", "There is. no", "None", "NO")] == [
        "no", "no", "yes", "yes", "yes",
    ]  # fmt: skip


BAD_FILES = {
    "an empty folder": ({}, "no coco_pope_*.json in it"),
    "no questions": ({"coco_pope_random.json": []}, "no question of POPE in it"),
    "a column missing": ({"coco_pope_random.json": [{"question_id": 1, "image": "a"}]}, "coco_pope_random.json:1: no 'text'"),
    "an id twice": ({"coco_pope_random.json": [question(1, "dog", "no")] * 2}, "question 'random-1' of pope stands twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(name, tmp_path):
    from vapr.evaluation.readers.open import open_questions

    files, message = BAD_FILES[name]
    for file, rows in files.items():
        write_lines(tmp_path / file, rows)
    with pytest.raises(UserError) as error:
        open_questions(POPE, tmp_path)
    assert message in str(error.value)


def test_the_mean_of_splits_is_not_certain_where_all_is_right(folder):
    figure = score(answered(POPE.read(folder), lambda q: q.answer), POPE)["figures"]["mean_f1_of_splits"]
    assert figure["value"] == 1 and figure["interval"] == [pytest.approx(1 - 1.959964 / 4), 1]  # two pictures
