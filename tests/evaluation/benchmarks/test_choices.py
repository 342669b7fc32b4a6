"""Benchmarks of options: answerers whose figures theory gives, for every benchmark and policy, and bad files."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from vapr.errors import UserError
from vapr.evaluation.benchmarks import BENCHMARKS
from vapr.evaluation.readers.open import open_answers, open_questions
from vapr.evaluation.score import score
from vapr.evaluation.scoring.answers import POLICIES
from vapr.evaluation.scoring.prediction import Prediction, Question

COLOURS = ["red", "blue", "green", "yellow"]
SOURCES = {"ADE20K": "Count", "COCO": "Relation", "Omni3D": "Depth"}


def cv_bench_row(number: int, answer: str = "(B)", **more) -> dict:
    source = ["ADE20K", "COCO", "Omni3D"][number % 3]
    return {
        "idx": number, "type": "3D" if source == "Omni3D" else "2D", "task": SOURCES[source], "filename": f"{number}.png",
        "question": "What colour?", "choices": COLOURS, "answer": answer, "source": source, **more,
    }  # fmt: skip


def mmstar_row(number: int, answer: str = "B", **more) -> dict:
    listed = ", ".join(f"{letter}: {option}" for letter, option in zip("ABCD", COLOURS, strict=True))
    return {
        "index": number, "question": f"What colour?\nOptions: {listed}", "answer": answer,
        "category": ["math", "logical reasoning"][number % 2], "l2_category": f"axis {number % 4}", **more,
    }  # fmt: skip


def seed_row(number: int, answer: str = "B", **more) -> dict:
    choices = {f"choice_{letter}": colour for letter, colour in zip("abcd", COLOURS, strict=True)}
    return {
        "question_id": str(number), "question_type_id": 1 + number % 9, "question": "What colour?", "answer": answer,
        "data_id": f"{number}.jpg", "data_type": "image", **choices, **more,
    }  # fmt: skip


def mmmu_row(number: int, answer: str = "B", **more) -> dict:
    return {
        "id": f"validation_{['Math', 'Art_Theory'][number % 2]}_{number}", "question": "What colour in <image 1>?",
        "options": str(COLOURS), "answer": answer, "question_type": "multiple-choice", "image_1": "a.png", **more,
    }  # fmt: skip


def mathvista_row(number: int, answer: str = "B", **more) -> dict:
    return {
        "pid": str(number), "question": "What colour?", "choices": COLOURS, "answer": COLOURS["ABCD".index(answer)],
        "question_type": "multi_choice", "answer_type": "text", "precision": None, "image": f"images/{number}.jpg",
        "metadata": {"task": "figure question answering", "skills": ["algebraic reasoning"]}, **more,
    }  # fmt: skip


ROWS: dict[str, tuple[str, Callable[..., dict]]] = {
    "cv-bench": ("test_2d.jsonl", cv_bench_row),
    "mmstar": ("mmstar.jsonl", mmstar_row),
    "seed-bench": ("SEED-Bench.json", seed_row),
    "mmmu": ("validation.jsonl", mmmu_row),
    "mathvista": ("testmini.jsonl", mathvista_row),
}


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def questions_of(name: str, folder: Path, count: int = 40, letters: str = "BACD") -> list[Question]:
    """Return questions whose answers go round the letters, all on pictures of their own."""
    file, row = ROWS[name]
    bracket = "({})" if name == "cv-bench" else "{}"
    rows = [row(n, bracket.format(letters[n % len(letters)])) for n in range(count)]
    return open_questions(BENCHMARKS[name], write_lines(folder / file, rows).parent)


def letter_of(question: Question) -> str:
    gold = BENCHMARKS[question.benchmark].gold(Prediction.of(question, ""))
    assert gold is not None
    return gold


def answered(questions: list[Question], answer: Callable[[Question], str]) -> list[Prediction]:
    """Return answers; those to MathVista as they come with a judge that extracts what they say."""
    return [
        Prediction.of(q, text := answer(q), **({"extraction": text} if q.benchmark == "mathvista" else {}))
        for q in questions
    ]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ROWS)
def test_perfect_wrong_and_constant_answerers(name, policy, tmp_path):
    benchmark, questions = BENCHMARKS[name], questions_of(name, tmp_path)
    for answer, accuracy in (
        (letter_of, 1.0),
        (lambda q: "ABCD"[("ABCD".index(letter_of(q)) + 1) % 4], 0.0),
        (lambda q: "A", 0.25),
    ):
        result = score(answered(questions, answer), benchmark, policy)
        assert result["accuracy"] == accuracy and result["unparsed"] == result["guessed"] == 0
        assert result["yes_rate"] is None and result["precision"] is None
        low, high = result["intervals"]["accuracy"]
        assert low <= accuracy <= high and high - low < 0.3
        assert all(part["unparsed_rate"] == 0 for part in result["splits"].values())
        for figure in result["figures"].values():
            assert figure["interval"][0] <= figure["value"] + 1e-9 and figure["value"] <= figure["interval"][1] + 1e-9
        if accuracy != 0.25:
            assert [figure["value"] for figure in result["figures"].values()] == pytest.approx(
                [accuracy] * len(result["figures"])
            )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ROWS)
def test_a_random_answerer_is_right_as_often_as_it_should(name, policy, tmp_path):
    draw = random.Random(5)
    questions = questions_of(name, tmp_path, 1000)
    result = score(answered(questions, lambda q: draw.choice("ABCD")), BENCHMARKS[name], policy)
    assert result["accuracy"] == pytest.approx(0.25, abs=3 * (0.25 * 0.75 / 1000) ** 0.5)
    low, high = result["intervals"]["accuracy"]
    assert low < 0.25 < high and high - low == pytest.approx(2 * 1.96 * (0.25 * 0.75 / 1000) ** 0.5, rel=0.02)


@pytest.mark.parametrize("policy", ["strict", "last-answer"])
@pytest.mark.parametrize("name", ROWS)
def test_noise_is_unparsed(name, policy, tmp_path):
    result = score(answered(questions_of(name, tmp_path), lambda q: "zxq vrt lorem qua"), BENCHMARKS[name], policy)
    assert result["accuracy"] == 0 and result["unparsed_rate"] == 1 and result["guessed"] == 0


def test_noise_under_the_official_rules(tmp_path):
    """Which rules make something of nothing: it is counted, and never unparsed in silence."""

    def official(name: str, text: str) -> dict:
        return score(answered(questions_of(name, tmp_path), lambda q: text), BENCHMARKS[name], "official")

    assert official("seed-bench", "because")["unparsed_rate"] == 1
    for name in ("cv-bench", "mmstar"):  # the first character is a letter of an option
        result = official(name, "because")
        assert result["accuracy"] == 0.25 and result["guessed"] == 40 and result["unparsed_rate"] == 1
        result = official(name, "zxq")
        assert result["accuracy"] == 0 and result["guessed"] == 0 and result["unparsed_rate"] == 1
    result = official("mmmu", "zxq vrt lorem")  # an option is drawn
    assert result["guessed"] == 40 and result["unparsed_rate"] == 1
    assert result["figures"]["expected_accuracy"]["value"] == 0.25
    result = official("mathvista", "bluish")  # the nearest text is that of B
    assert result["accuracy"] == 0.25 and result["guessed"] == 40


def test_drawn_options_are_right_as_often_as_expected(tmp_path):
    predictions = answered(questions_of("mmmu", tmp_path, 1000), lambda q: "zxq")
    result = score(predictions, BENCHMARKS["mmmu"], "official")
    assert result["accuracy"] == pytest.approx(0.25, abs=3 * (0.25 * 0.75 / 1000) ** 0.5)
    assert result["figures"]["expected_accuracy"]["value"] == 0.25
    turned = score(predictions[::-1], BENCHMARKS["mmmu"], "official")
    assert turned["accuracy"] == result["accuracy"]  # a draw hangs on its question alone


def test_reasoning_before_the_answer(tmp_path):
    for name in ROWS:
        said = answered(questions_of(name, tmp_path), lambda q: f"<think>A. No, B?</think>So it is ({letter_of(q)}).")
        assert score(said, BENCHMARKS[name], "strict")["unparsed_rate"] == 1
        assert score(said, BENCHMARKS[name], "last-answer")["accuracy"] == 1


def without(row: dict, key: str) -> dict:
    return {name: value for name, value in row.items() if name != key}


BAD_QUESTIONS = {
    "cv-bench, empty folder": ("cv-bench", "other.txt", "", "no test*.jsonl in it; get them from nyu-visionx"),
    "cv-bench, a column missing": ("cv-bench", "test_2d.jsonl", [without(cv_bench_row(1), "source")], "test_2d.jsonl:1: no 'source'"),
    "cv-bench, another source": ("cv-bench", "test_2d.jsonl", [cv_bench_row(1, source="VOC")], "'source' is 'VOC'; CV-Bench has ADE20K, COCO, Omni3D"),
    "cv-bench, an id twice": ("cv-bench", "test_2d.jsonl", [cv_bench_row(1)] * 2, "question '1' of cv-bench stands twice"),
    "cv-bench, cut short": ("cv-bench", "test_2d.jsonl", '{"idx": 1, "ty', "test_2d.jsonl:1: not a line of JSON; the file's last line is cut short"),
    "cv-bench, a number of choices": ("cv-bench", "test_2d.jsonl", [cv_bench_row(1) | {"choices": 4}], "test_2d.jsonl:1: 'choices' is '4', not a list"),
    "mmstar, a number for a question": ("mmstar", "mmstar.jsonl", [mmstar_row(1) | {"question": 5}], "mmstar.jsonl:1: 'question' is 5, not a text"),
    "mmmu, a number for a question": ("mmmu", "validation.jsonl", [mmmu_row(1) | {"question": 5}], "validation.jsonl:1: 'question' is 5, not a text"),
    "mathvista, a word for decimals": ("mathvista", "testmini.jsonl", [mathvista_row(1, precision="two")], "testmini.jsonl:1: 'precision' is 'two', no number of decimals"),
    "mmstar, a column missing": ("mmstar", "mmstar.jsonl", [without(mmstar_row(1), "l2_category")], "a question of MMStar has"),
    "mmstar, no rows": ("mmstar", "mmstar.jsonl", "", "no question of MMStar in it"),
    "seed-bench, no list": ("seed-bench", "SEED-Bench.json", '"questions"', "a JSON str, not a list of rows"),
    "seed-bench, cut short": ("seed-bench", "SEED-Bench.json", '{"questions": [{"question_id":', "SEED-Bench.json:1: not JSON (Expecting value); is the file whole?"),
    "seed-bench, a number for a row": ("seed-bench", "SEED-Bench.json", '{"questions": [7]}', "row 1: a JSON int, not an object"),
    "seed-bench, no choice": ("seed-bench", "SEED-Bench.json", [without(seed_row(1), "choice_d")] * 2, "no 'choice_d'"),
    "mmmu, truths without types": ("mmmu", "answer_dict_val.json", '{"validation_Art_1": "A"}', "'validation_Art_1' has no question_type"),
    "mmmu, a list of truths": ("mmmu", "answer_dict_val.json", "[]", "a JSON list, not MMMU's object of truths by id"),
    "mmmu, a column missing": ("mmmu", "validation.jsonl", [without(mmmu_row(1), "answer")], "a question of MMMU has"),
    "mathvista, a list": ("mathvista", "testmini.json", "[]", "not MathVista's object of rows by pid"),
    "mathvista, an answer that is no choice": ("mathvista", "testmini.jsonl", [mathvista_row(1, choices=["pink"])], "'answer' is 'blue', none of the 1 choices"),
    "mathvista, no files": ("mathvista", "other.txt", "", "no *testmini*.json* in it"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_QUESTIONS)
def test_bad_questions(case, tmp_path):
    name, file, content, message = BAD_QUESTIONS[case]
    if isinstance(content, list):
        write_lines(tmp_path / file, content)
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(UserError) as error:
        open_questions(BENCHMARKS[name], tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


SEED_ANSWERS = [{"question_id": str(n), "prediction": "B"} for n in range(8)]
BAD_ANSWERS = {
    "seed-bench, no prediction": ("seed-bench", [{"question_id": "1"}], "answers.jsonl:1: no answer; needs question_id and prediction"),
    "seed-bench, another question": ("seed-bench", [{"question_id": "77", "prediction": "A"}], "an answer to '77', which is no question about an image"),
    "seed-bench, answered twice": ("seed-bench", [SEED_ANSWERS[0]] * 2, "question '0' of seed-bench stands twice"),
    "seed-bench, too few": ("seed-bench", SEED_ANSWERS[:7], "7 answers to 8 questions; '7' has none"),
    "mmmu, not a text": ("mmmu", {"validation_Math_0": 3}, "'response' is 3, not a text"),
    "mmmu, another question": ("mmmu", {"validation_Law_1": "A"}, "'validation_Law_1', which is no question of MMMU"),
    "mmmu, odd letters": ("mmmu", [{"id": "validation_Math_0", "response": "A", "all_choices": ["B"], "index2ans": {"B": "x"}}], "all_choices are not the letters from A on"),
    "mmmu, numbers": ("mmmu", [1, 2], "neither answers by id nor a list of rows"),
    "mathvista, no response": ("mathvista", {"0": {"answer": "blue"}}, "no 'response' that is a text; has pid, answer"),
    "mathvista, another question": ("mathvista", {"99": {"response": "blue"}}, "'99', which is no question of MathVista"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ANSWERS)
def test_bad_answers(case, tmp_path):
    name, content, message = BAD_ANSWERS[case]
    questions = questions_of(name, tmp_path, 8)
    file = tmp_path / ("answers.jsonl" if name == "seed-bench" else "answers.json")
    file.write_text("".join(json.dumps(row) + "\n" for row in content) if name == "seed-bench" else json.dumps(content))
    with pytest.raises(UserError) as error:
        open_answers(file, BENCHMARKS[name], questions)
    assert message in str(error.value) and "\n" not in str(error.value)
