"""LLaVA-Bench in the Wild: the published scores from the published reviews, and files that do not fit."""

import json
import os
import re
from pathlib import Path

import pytest

from tests.evaluation.judged_answers import lines_of, refused, score, scored, write_lines
from tests.fake_server import FakeServer, completion
from vapr.errors import UserError
from vapr.evaluation.benchmarks.llava_bench import LLAVA_BENCH

QUESTIONS = [
    {"question_id": n, "image": f"{n // 2:03}.jpg", "text": f"What is {n}?", "category": ("conv", "detail", "complex")[n % 3]}
    for n in range(6)
]  # fmt: skip


@pytest.fixture
def real(tmp_path) -> tuple[Path, str]:
    """The published answers and reviews, and ``--bench`` with the questions, which are made from the two here."""
    if not (folder := os.environ.get("VAPR_REAL_DATA")):
        pytest.skip("VAPR_REAL_DATA is not set")
    at = Path(folder) / "llava_bench"
    kinds = {row["question_id"]: row["category"] for row in lines_of(at / "llava-v1.5-13b-eval1.jsonl")}
    rows = [
        {"question_id": row["question_id"], "image": f"{row['question_id']:03}.jpg", "text": row["prompt"],
         "category": kinds[row["question_id"]].removeprefix("llava_bench_")}
        for row in lines_of(at / "llava-v1.5-13b.jsonl")
    ]  # fmt: skip
    return at, f"llava-bench={write_lines(tmp_path / 'questions.jsonl', rows)}"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A small LLaVA-Bench with answers, and captions that hold braces."""
    write_lines(tmp_path / "questions.jsonl", QUESTIONS)
    write_lines(tmp_path / "answers_gpt4.jsonl", [{"question_id": n, "text": f"GPT says {n}"} for n in range(6)])
    captions = [{"id": f"{n:03}", "image": f"{n:03}.jpg", "caption": f"scene {n} {{answer}}"} for n in range(3)]
    write_lines(tmp_path / "context.jsonl", captions)
    write_lines(tmp_path / "mine.jsonl", [answer(n) for n in range(6)])
    return tmp_path


def answer(n: int, **more) -> dict:
    return {"question_id": n, "prompt": f"What is {n}?", "text": f"It is {n}", "answer_id": f"a{n}", **more}


def review(n: int, scores: list[float], **more) -> dict:
    content = f"{scores[0]:g} {scores[1]:g}\nBoth are fine." if min(scores) >= 0 else "error"
    return {"question_id": n, "answer2_id": f"a{n}", "content": content, "tuple": scores, **more}


@pytest.mark.parametrize(
    ("number", "overall", "kinds"),
    [(1, 72.8, (74.7, 52.7, 82.8)), (2, 72.7, (74.7, 51.1, 83.7)), (3, 72.1, (72.5, 51.1, 83.5))],
)
def test_the_published_reviews_give_the_published_scores(real, number, overall, kinds):
    at, bench = real
    reviews = at / f"llava-v1.5-13b-eval{number}.jsonl"
    result = scored(at / "llava-v1.5-13b.jsonl", "--bench", bench, "--reviews", reviews)
    assert round(result["figures"]["relative_score"]["value"], 1) == overall
    splits = result["splits"]
    assert (
        tuple(round(splits[kind]["figures"]["relative_score"]["value"], 1) for kind in ("conv", "detail", "complex"))
        == kinds
    )
    assert (result["headline"], result["questions"], result["unparsed_rate"]) == ("relative_score", 60, 0)
    low, high = result["figures"]["relative_score"]["interval"]
    assert low < result["figures"]["relative_score"]["value"] < high
    code, out, _ = score(at / "llava-v1.5-13b.jsonl", "--bench", bench, "--reviews", reviews)
    assert code == 0 and re.search(rf"relative_score +{result['figures']['relative_score']['value']:.2f} ", out)


def test_the_answers_of_another_model_do_not_take_these_reviews(real, tmp_path):
    at, bench = real
    rows = [row | {"answer_id": f"other {row['answer_id']}"} for row in lines_of(at / "llava-v1.5-13b.jsonl")]
    other = write_lines(tmp_path / "other.jsonl", rows)
    line = refused(other, "--bench", bench, "--reviews", at / "llava-v1.5-13b-eval1.jsonl")
    assert "0 of 60 answers have a review, 60 ('0') one of another answer" in line


def test_half_of_the_real_reviews_fail(real, tmp_path):
    at, bench = real
    rows = lines_of(at / "llava-v1.5-13b-eval1.jsonl")
    broken = [row | {"content": "", "tuple": [-1, -1]} if n % 2 else row for n, row in enumerate(rows)]
    file = write_lines(tmp_path / "half.jsonl", broken)
    result = scored(at / "llava-v1.5-13b.jsonl", "--bench", bench, "--reviews", file)
    left = [row["tuple"] for row in rows[::2]]
    assert result["figures"]["relative_score"]["value"] == pytest.approx(
        100 * sum(model for _, model in left) / sum(gpt for gpt, _ in left)
    )
    assert result["problems"] == {"marked as failed by who asked for it": 30}
    assert (result["unparsed"], result["unparsed_rate"], result["figures"]["relative_score"]["count"]) == (30, 0.5, 30)


def test_all_reviews_failed_is_no_number(folder):
    """A known harness makes 100 of it."""
    file = write_lines(folder / "failed.jsonl", [review(n, [-1, -1]) for n in range(6)])
    result = scored(folder / "mine.jsonl", "--bench", f"llava-bench={folder}", "--reviews", file)
    assert result["scored"] is False and result["figures"] == {} and result["accuracy"] is None
    assert "none of 6 reviews" in result["why"] and result["unparsed_rate"] == 1
    code, out, _ = score(folder / "mine.jsonl", "--bench", f"llava-bench={folder}", "--reviews", file)
    assert code == 0 and "not scored: none of 6 reviews" in out and len(out.splitlines()) == 1


def test_the_figure_is_a_ratio_of_means(folder):
    scores = [[8, 4], [10, 9], [5, 7.5], [8, 8], [4, 2], [10, 5]]
    file = write_lines(folder / "r.jsonl", [review(n, s) for n, s in enumerate(scores)])
    result = scored(folder / "mine.jsonl", "--bench", f"llava-bench={folder}", "--reviews", file)
    values = {name: figure["value"] for name, figure in result["figures"].items()}
    assert values == pytest.approx({"relative_score": 100 * 35.5 / 45, "model_score": 35.5 / 6, "reference_score": 7.5})
    assert result["splits"]["conv"]["figures"]["relative_score"]["value"] == pytest.approx(100 * 12 / 16)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("8 10\nBoth ...", (10, 8)), ("8, 7.5\nBoth ...", (7.5, 8)), ("\n9 9", (9, 9)), ("8.5 9\r\nwhy", (9, 8.5)),
        ("8", None), ("8 9 10", None), ("8/10 9/10", None), ("Assistant 1: 8 Assistant 2: 9", None),
        ("The first is better.\n8 9", None), ("8 90", None), ("-1 -1", None), ("", None),
    ],
)  # fmt: skip
def test_first_lines(text, verdict):
    assert LLAVA_BENCH.judged.read_review(text) == verdict


def test_a_judge_is_asked_with_caption_and_both_answers(folder, monkeypatch):
    pytest.importorskip("openai", reason="the openai package is not installed")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with FakeServer(lambda number, body: completion("10 5\nThe first is better.")) as server:
        options = ("--bench", f"llava-bench={folder}", "--judge", server.url)
        result = scored(folder / "mine.jsonl", *options)
        assert scored(folder / "mine.jsonl", *options) == result and len(server.chats) == 6
        asked = [body["messages"][0]["content"] for body in server.chats]
    assert result["figures"]["relative_score"]["value"] == 50 and result["judge"]["name"] == "fake"
    assert any(
        "scene 1 {answer}" in text and "What is 3?" in text and "GPT says 3" in text and "It is 3" in text
        for text in asked
    )
    assert (folder / "mine.reviews.jsonl").exists()


def test_without_references_no_judge_is_asked(folder):
    (folder / "answers_gpt4.jsonl").unlink()
    options = ("--bench", f"llava-bench={folder}", "--judge", "http://127.0.0.1:9")
    result = scored(folder / "mine.jsonl", *options)
    assert result["scored"] is False and "answers_gpt4.jsonl and context.jsonl have to lie beside" in result["why"]


@pytest.mark.parametrize(
    ("file", "rows", "line"),
    [
        ("questions.jsonl", [{"question_id": 1, "text": "?"}], "questions.jsonl:1: no 'image'"),
        ("questions.jsonl", [QUESTIONS[0] | {"image": {"bytes": "x"}}], "questions.jsonl:1: 'image' is {"),
        ("questions.jsonl", [QUESTIONS[0], QUESTIONS[0]], "question '0' of llava-bench stands twice"),
        ("context.jsonl", [{"image": "000.jpg"}], "context.jsonl:1: no 'caption'"),
        ("mine.jsonl", [answer(7)], "mine.jsonl:1: question_id 7 is no question of LLaVA-Bench"),
        ("mine.jsonl", [answer(1, prompt="Who?")], "mine.jsonl:1: an answer to 'Who?', not to 'What is 1?'"),
        ("mine.jsonl", [answer(1), answer(1)], "question '1' of llava-bench stands twice"),
        ("mine.jsonl", [answer(1)], "1 answers to 6 questions"),
        ("r.jsonl", [review(0, [8, 9]), review(0, [8, 9])], "r.jsonl: two reviews of '0'; keep one of them"),
        ("r.jsonl", [review(0, [8, 9], tuple=[8])], "r.jsonl:1: 'tuple' is [8], not the two scores of a review"),
        ("r.jsonl", [{"id": 1}], "r.jsonl:1: no 'question_id'"),
        ("r.jsonl", [review(n, [8, 9]) for n in range(5)], "5 of 6 answers have a review, 1 ('5') none"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit(folder, file, rows, line):
    write_lines(folder / "r.jsonl", [review(n, [8, 9]) for n in range(6)])
    write_lines(folder / file, rows)
    said = refused(folder / "mine.jsonl", "--bench", f"llava-bench={folder}", "--reviews", folder / "r.jsonl")
    assert line in said


def test_one_missing_reference_is_named(folder):
    rows = [{"question_id": n, "text": "x"} for n in range(5)]
    write_lines(folder / "answers_gpt4.jsonl", rows)
    line = refused(folder / "mine.jsonl", "--bench", f"llava-bench={folder}", "--judge", "http://127.0.0.1:9")
    assert "question '5' of llava-bench: no answer of GPT-4; answers_gpt4.jsonl" in line


def test_pictures_and_facts_of_the_questions(folder):
    (folder / "images").mkdir()
    (folder / "images" / "001.jpg").write_bytes(b"x")
    questions = LLAVA_BENCH.read(folder)
    assert [q.id for q in questions] == list("012345") and questions[2].images == (folder / "images" / "001.jpg",)
    assert questions[2].answer == "GPT says 2" and questions[2].meta["category"] == "complex"
    assert json.dumps(dict(questions[2].meta))
    with pytest.raises(UserError, match="no questions.jsonl in it"):
        LLAVA_BENCH.read(folder / "images")
