"""MathVista: numbers to the decimals that are asked for, options by letter or text, and what needs a language model."""

import json

import pytest

from tests.evaluation.benchmarks.test_choices import mathvista_row, write_lines
from vapr.evaluation.benchmarks.mathvista import MATHVISTA
from vapr.evaluation.readers.open import open_answers
from vapr.evaluation.score import score
from vapr.evaluation.scoring.prediction import Prediction

DEGREES = ["135°", "140°", "145°", "150°"]


def ask(text: str, answer: str, kind: str, precision: int | None = None, **more) -> Prediction:
    meta = {"question_type": "free_form", "answer_type": kind, "precision": precision, **more}
    return Prediction(benchmark="mathvista", id="1", question="", prediction=text, answer=answer, meta=meta)


def choose(text: str, answer: str, options: list[str], **more) -> Prediction:
    return ask(text, answer, "text", question_type="multi_choice", options=options, **more)


def right(prediction: Prediction, policy: str) -> float | None:
    return score([prediction], MATHVISTA, policy)["accuracy"]


@pytest.mark.parametrize(
    ("text", "answer", "kind", "precision", "strict", "last"),
    [
        ("1.2", "1.2", "float", 1, 1, 1),
        ("1.23 m", "1.2", "float", 1, 1, 1),
        ("1.26", "1.2", "float", 1, 0, 0),
        ("1.26", "1.26", "float", 2, 1, 1),
        ("6/5", "1.2", "float", 1, 1, 1),
        ("1.2", "1.2", "float", None, 1, 1),
        ("1.26", "1.2", "float", None, 0, 0),
        ("1.23", "1.2", "float", 1.0, 1, 1),
        ("1000 g", "1000", "integer", None, 1, 1),
        ("1,000", "1000", "integer", None, 1, 1),
        ("1000.4", "1000", "integer", None, 0, 0),
        ("four", "4", "integer", None, 1, 1),
        ("Five minus one.\n\nSo the answer is 4.\n\nI hope this helps!", "4", "integer", None, 0, 1),
        ("[1, 5]", "[1, 5]", "list", None, 1, 1),
        ("[1,5]", "[1, 5]", "list", None, 1, 1),
        ("The pair is [1, 5].", "[1, 5]", "list", None, 0, 1),
        ("[5, 1]", "[1, 5]", "list", None, 0, 0),
        ("many", "4", "integer", None, 0, 0),
    ],
)
def test_free_answers(text, answer, kind, precision, strict, last):
    assert right(ask(text, answer, kind, precision), "strict") == strict
    assert right(ask(text, answer, kind, precision), "last-answer") == last


@pytest.mark.parametrize(
    ("text", "strict", "last"),
    [
        ("C", 1, 1),
        ("145°", 1, 1),
        ("145", 1, 1),
        ("145 degrees", 1, 1),
        ("The correct answer is **(C) 145°**.\n\nSince 90 + 55 = 145.", 1, 1),
        ("Therefore, ∠BOC = ∠COB = 70°\n\nTherefore, the correct answer is (C) 145°.", 0, 1),
        ("140°", 0, 0),
        ("1450", 0, 0),
    ],
)
def test_options(text, strict, last):
    assert right(choose(text, "145°", DEGREES), "strict") == strict
    assert right(choose(text, "145°", DEGREES), "last-answer") == last


@pytest.mark.parametrize(
    ("extraction", "answer", "kind", "precision", "said"),
    [
        ("1.16", "1.2", "float", 1, "1.2"),
        ("1000.9", "1000", "integer", None, "1000"),  # the authors cut, they do not round
        ("1,000", "1000", "integer", None, None),
        ("about 4", "4", "integer", None, None),
        ("[1, 5]", "[1, 5]", "list", None, "[1, 5]"),
    ],
)
def test_the_official_rule_for_free_answers(extraction, answer, kind, precision, said):
    prediction = ask("a long story", answer, kind, precision, extraction=extraction)
    assert MATHVISTA.read_answer(prediction, "official").value == said
    assert right(prediction, "official") == (said == answer)


@pytest.mark.parametrize(
    ("extraction", "said", "guessed"),
    [
        ("C", "C", False),
        ("(c) 145°", "C", False),
        ("145°", "C", False),
        ("145", "C", True),  # nearest by letters that differ
        ("92.5", "A", True),  # so is this
        ("", None, False),  # the authors' script makes the shortest option of nothing
    ],
)
def test_the_official_rule_for_options(extraction, said, guessed):
    reading = MATHVISTA.read_answer(choose("a story", "145°", DEGREES, extraction=extraction), "official")
    assert (reading.value, reading.guessed) == (said, guessed)


def test_an_empty_extraction_is_no_answer():
    """A judge that never answered: the shortest of these options is the true one."""
    silent = [choose("a story", "6", ["12cm", "6", "140°"], extraction="")]
    result = score(silent, MATHVISTA, "official")
    assert result["accuracy"] == 0 and result["unparsed_rate"] == 1 and "shortest" in result["note"]


def test_the_official_rule_needs_what_a_language_model_extracted():
    told = [choose("It must be the third.", "145°", DEGREES), ask("4", "4", "integer"), choose("C", "145°", DEGREES)]
    result = score(told, MATHVISTA, "official")
    assert result["scored"] is False and result["accuracy"] is None and result["unparsed_rate"] is None
    assert result["why"].startswith(
        "a language model extracts what an answer says, and 2 of 3 answers have no 'extraction'"
    )
    strict = score(told, MATHVISTA, "strict")
    assert strict["accuracy"] == pytest.approx(2 / 3) and strict["policies"]["official"]["accuracy"] is None
    assert "2 of 3" in strict["policies"]["official"]["why"]


def test_plain_answers_need_no_extraction():
    plain = [choose("145°", "145°", DEGREES), ask("4", "4", "integer"), ask("1.25", "1.2", "float", 1)]
    assert score(plain, MATHVISTA, "official")["accuracy"] == 1


@pytest.fixture
def files(tmp_path):
    free = {"choices": None, "question_type": "free_form", "answer_type": "float", "precision": 1.0, "answer": "1.2"}
    rows = {"1": mathvista_row(1), "2": mathvista_row(2) | free | {"unit": "m"}}
    (tmp_path / "testmini.json").write_text(json.dumps(rows))
    return tmp_path


def test_files_of_the_authors(files):
    first, second = MATHVISTA.read(files)
    assert first.question.splitlines()[1] == "(A) red" and first.images == (files / "images/1.jpg",)
    assert second.question.splitlines()[0] == "What colour? (Unit: m)" and "1 decimals" in second.question
    answers = {
        "1": {"response": "I say blue", "extraction": "blue"}, "2": {"response": "1.24 m", "extraction": "1.24"},
    }  # fmt: skip
    (files / "output_model.json").write_text(json.dumps(answers))
    predictions, _, _ = open_answers(files / "output_model.json", MATHVISTA, [first, second])
    result = score(predictions, MATHVISTA, "official")
    assert result["accuracy"] == 1 and result["figures"]["algebraic reasoning"]["count"] == 2
    assert set(result["figures"]) == {"multi_choice", "free_form", "algebraic reasoning"}
    (files / "query.json").write_text(json.dumps({"1": "Hint: the authors' prompt"}))
    assert MATHVISTA.read(files)[0].question == "Hint: the authors' prompt"


def test_more_than_one_file_is_no_matter(tmp_path):
    write_lines(tmp_path / "testmini.jsonl", [mathvista_row(n) for n in range(3)])
    assert [question.id for question in MATHVISTA.read(tmp_path)] == ["0", "1", "2"]
