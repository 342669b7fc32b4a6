"""CV-Bench, MMStar and SEED-Bench image: their own combinations worked out by hand, their files, their authors' rules."""

import json

import pytest

from tests.evaluation.benchmarks.test_choices import answered, cv_bench_row, mmstar_row, seed_row, write_lines
from vapr.evaluation.benchmarks.cv_bench import CV_BENCH
from vapr.evaluation.benchmarks.mmstar import MMSTAR, options_in
from vapr.evaluation.benchmarks.seed_bench import SEED_BENCH
from vapr.evaluation.readers.open import open_answers
from vapr.evaluation.score import score
from vapr.evaluation.scoring.prediction import Prediction


def official(benchmark, text: str) -> str | None:
    prediction = Prediction(benchmark=benchmark.name, id="1", question="", prediction=text, answer="A")
    return benchmark.read_answer(prediction, "official").value


def test_cv_bench_combination(tmp_path):
    """ADE20K 2 of 4, COCO 1 of 1, Omni3D 1 of 2: 2D is 0.75, 3D is 0.5, both are 0.625, where 4 of 7 are right."""
    sources = ["ADE20K"] * 4 + ["COCO"] + ["Omni3D"] * 2
    rows = [cv_bench_row(n, source=source, task="Count") for n, source in enumerate(sources)]
    questions = CV_BENCH.read(write_lines(tmp_path / "test_2d.jsonl", rows))
    assert questions[0].images == (tmp_path / "img/0.png",) and questions[0].question.startswith(
        "What colour?\n(A) red"
    )
    result = score(answered(questions, lambda q: "B" if q.id in "0145" else "C"), CV_BENCH)
    values = {name: figure["value"] for name, figure in result["figures"].items()}
    assert values == {"ADE20K": 0.5, "COCO": 1, "Omni3D": 0.5, "2D": 0.75, "3D": 0.5, "cv_bench": 0.625}
    assert result["accuracy"] == pytest.approx(4 / 7) and result["headline"] == "cv_bench"


def test_cv_bench_without_a_source_has_no_combination(tmp_path):
    rows = [cv_bench_row(n, source="COCO") for n in range(3)]
    result = score(answered(CV_BENCH.read(write_lines(tmp_path / "test_2d.jsonl", rows)), lambda q: "B"), CV_BENCH)
    assert result["figures"]["cv_bench"]["value"] is None and result["figures"]["COCO"]["value"] == 1


def test_cv_bench_prompt_of_the_authors(tmp_path):
    rows = [cv_bench_row(1, prompt="What colour? Select from the following choices.\n(A) red")]
    (question,) = CV_BENCH.read(write_lines(tmp_path / "test_2d.jsonl", rows))
    assert question.question.startswith("What colour? Select") and question.question.endswith("directly.")


def test_cv_bench_official_rule():
    texts = ["(B) blue", "The answer is (C).", "Answer: d", "because", "so I think the answer is: B", "7", ""]
    assert [official(CV_BENCH, text) for text in texts] == ["B", "C", "D", "B", None, None, None]  # ": b" is no letter


def test_mmstar_means(tmp_path):
    """One axis 1 of 1, the other 1 of 4: 0.625 over axes, 0.4 over questions."""
    rows = [mmstar_row(n, category="math", l2_category="geometry" if n == 0 else "counting") for n in range(5)]
    questions = MMSTAR.read(write_lines(tmp_path / "mmstar.jsonl", rows))
    result = score(answered(questions, lambda q: "B" if q.id in "01" else "C"), MMSTAR)
    assert result["accuracy"] == 0.4 and result["figures"]["mean_of_axes"]["value"] == 0.625
    assert result["figures"]["geometry"]["value"] == 1 and list(result["splits"]) == ["math"]


def test_mmstar_options_in_the_question():
    assert options_in("Which?\nOptions: A: The cat, big., B: A dog: brown, C: 0.5, D: none") == [
        "The cat, big.", "A dog: brown", "0.5", "none",
    ]  # fmt: skip
    assert options_in("Which?\nOptions:\n(A) 5 (B) 6\n(C) 7") == ["5", "6", "7"]
    assert options_in("Which?") == [] and options_in("Which?\nOptions: red, blue") == []


def test_mmstar_official_rule():
    texts = ["B", "b because", "(C) x", "Option D", "The answer is A", "A dog", "zxq", "the option is B", "", "("]
    assert [official(MMSTAR, text) for text in texts] == ["B", "B", "C", "D", "A", "A", None, None, None, None]


def test_seed_bench_questions_about_videos_are_no_part_of_it(tmp_path):
    file = tmp_path / "SEED-Bench.json"
    video = seed_row(1, question_id="v1", question_type_id=10, data_type="video")
    file.write_text(json.dumps({"questions": [seed_row(0), video, seed_row(8)], "question_type": {}}))
    questions = SEED_BENCH.read(tmp_path)
    assert [question.meta["split"] for question in questions] == ["Scene Understanding", "Text Understanding"]
    assert questions[0].question.splitlines()[1:3] == ["(A) red", "(B) blue"]
    assert questions[0].images == (tmp_path / "0.jpg",)


@pytest.mark.parametrize("keys", [("question_id", "prediction"), ("q_id", "prediction"), ("question_id", "text")])
def test_seed_bench_layouts_of_answers(keys, tmp_path):
    """What is uploaded, what the authors' script writes, and LLaVA's; eight of nine right, one dimension each."""
    questions = SEED_BENCH.read(write_lines(tmp_path / "SEED-Bench.json", [seed_row(n) for n in range(9)]))
    answers = [{keys[0]: str(n), keys[1]: "B" if n else "C"} for n in range(9)] + [{keys[0]: "v7", keys[1]: "A"}]
    file = write_lines(tmp_path / "results.json", answers)
    predictions, notes, _ = open_answers(file, SEED_BENCH, questions)
    result = score(predictions, SEED_BENCH, "official")
    assert notes == ["1 answers about videos left out"]
    assert result["accuracy"] == pytest.approx(8 / 9) and result["splits"]["Scene Understanding"]["accuracy"] == 0
    assert len(result["splits"]) == 9


def test_seed_bench_official_rule():
    assert [official(SEED_BENCH, text) for text in ("B", "b", "B.", " B", "E")] == ["B", None, None, None, None]
