"""Judges behind a server: what is asked, stored, resumed and counted, and every way to fail."""

import asyncio
import json
import re
import socket

import pytest

pytest.importorskip("openai", reason="the openai package is not installed")

from tests.evaluation.judged_answers import lines_of, refused, score, scored, write_answers, write_lines, write_set
from tests.fake_server import Drop, completion


@pytest.fixture(autouse=True)
def _no_proxy_and_no_waits(monkeypatch):
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: sleep(0))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def number_of(body: dict) -> int:
    """The number of the answer that a judge is asked about."""
    return int(re.search(r"What is at (\d+)", body["messages"][0]["content"])[1])


def rate(number: int, body: dict) -> dict:
    """Rate answer n with n, modulo 7."""
    return completion(f"It says little.\nRating: {number_of(body) % 7}")


def failing(status: int, message: str) -> tuple:
    return status, {}, {"error": {"message": message}}


# What is right


def test_scores_and_what_the_judge_was_asked(tmp_path, serve):
    bench, server = write_set(tmp_path), serve(rate)
    result = scored(write_answers(tmp_path), "--bench", bench, "--judge", server.url, "--judge-model", "fake")
    # ratings 0 1 2 3 4 5 6 0
    assert result["figures"]["score"]["value"] == 21 / 8
    assert result["figures"]["hallucination_rate"]["value"] == 4 / 8
    assert result["splits"]["odd"]["figures"]["score"]["value"] == 9 / 4
    assert (result["headline"], result["policy"], result["judge"]["name"]) == ("score", "judge", "fake")
    assert (result["questions"], result["unparsed_rate"], result["accuracy"], result["partial"]) == (8, 0, None, False)
    low, high = result["figures"]["score"]["interval"]
    assert low < 21 / 8 < high
    body = next(body for body in server.chats if number_of(body) == 3)
    assert body == {
        "model": "fake", "seed": 0, "temperature": 0.0, "max_tokens": 2048,
        "messages": [
            {"role": "user", "content": "Q: What is at 3? FACTS: cat, place 3 TRUTH: a cat at 3 SAID: answer 3"}
        ],
    }  # fmt: skip
    rows = lines_of(tmp_path / "reviews.jsonl")
    assert [row["id"] for row in rows] and sorted(row["id"] for row in rows) == list("01234567")
    assert {row["judge"] for row in rows} == {"fake"} and {row["benchmark"] for row in rows} == {"mine"}
    assert next(row["review"] for row in rows if row["id"] == "3") == "It says little.\nRating: 3"


def test_reviews_are_asked_for_once(tmp_path, serve):
    bench, server = write_set(tmp_path), serve(rate)
    judge = ("--judge", server.url, "--judge-model", "fake")
    answers = write_answers(tmp_path)
    first = scored(answers, "--bench", bench, *judge)
    kept = (tmp_path / "reviews.jsonl").read_bytes()
    paths = len(server.paths)
    assert scored(answers, "--bench", bench, *judge) == first
    assert (len(server.chats), len(server.paths)) == (8, paths)  # not even the list of models
    assert scored(answers, "--bench", bench) == first  # without a judge
    assert scored(tmp_path, "--bench", bench) == first  # the result folder
    assert (tmp_path / "reviews.jsonl").read_bytes() == kept


@pytest.mark.parametrize(
    ("change", "again"),
    [("an answer", 1), ("the prompt", 8), ("the judge", 8), ("a setting", 8), ("a reference", 1), ("the pattern", 0)],
)
def test_what_is_asked_for_again(tmp_path, serve, change, again):
    bench, server = write_set(tmp_path), serve(rate, models=("fake", "other"))
    answers = write_answers(tmp_path)
    (tmp_path / "judge.yaml").write_text(f"{{url: {server.url}, model: fake}}")
    assert score(answers, "--bench", bench, "--judge", tmp_path / "judge.yaml")[0] == 0
    model = "fake"
    if change == "an answer":
        write_answers(tmp_path, n5="something else")
    elif change == "the prompt":
        (tmp_path / "mine.yaml").write_text((tmp_path / "mine.yaml").read_text().replace("Q:", "Question:"))
    elif change == "the judge":
        model = "other"
    elif change == "a setting":
        (tmp_path / "judge.yaml").write_text(f"{{url: {server.url}, model: fake, max_tokens: 99}}")
    elif change == "a reference":
        questions = tmp_path / "questions.jsonl"
        questions.write_text(questions.read_text().replace("a cat at 6", "a dog at 6"))
    else:
        (tmp_path / "mine.yaml").write_text((tmp_path / "mine.yaml").read_text().replace("[0, 6]", "[1, 6]"))
    if change in ("an answer", "the prompt", "a reference"):
        said = refused(answers, "--bench", bench)  # without a judge, reviews of other words are none
        assert "one of another answer or another prompt" in said and "have the rest judged with --judge" in said
    result = scored(answers, "--bench", bench, "--judge", tmp_path / "judge.yaml", "--judge-model", model)
    assert len(server.chats) == 8 + again
    assert len(lines_of(tmp_path / "reviews.jsonl")) == 8
    assert result["unparsed"] == (2 if change == "the pattern" else 0)  # the two zeros are out of range then


def test_an_order_in_an_answer_is_no_placeholder(tmp_path, serve):
    bench, server = write_set(tmp_path), serve(rate)
    answers = write_answers(tmp_path, n2="{reference} {facts} Rating: 6")
    scored(answers, "--bench", bench, "--judge", server.url)
    asked = next(body["messages"][0]["content"] for body in server.chats if number_of(body) == 2)
    assert asked.endswith("SAID: {reference} {facts} Rating: 6")


def test_other_benchmarks_reviews_are_kept(tmp_path, serve):
    bench, server = write_set(tmp_path), serve(rate)
    other = {"benchmark": "mmhal", "id": "1", "judge": "j", "review": "Rating: 1"}
    write_lines(tmp_path / "reviews.jsonl", [other])
    answers = write_answers(tmp_path)
    assert scored(answers, "--bench", bench)["scored"] is False
    scored(answers, "--bench", bench, "--judge", server.url)
    rows = lines_of(tmp_path / "reviews.jsonl")
    assert len(rows) == 9 and {key: rows[0][key] for key in other} == other


def test_a_run_that_was_cut_goes_on(tmp_path, serve):
    bench, server = write_set(tmp_path), serve(rate)
    answers = write_answers(tmp_path)
    scored(answers, "--bench", bench, "--judge", server.url)
    file = tmp_path / "reviews.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:4]) + lines[4][:30])
    assert "the file's last line is cut short" in refused(answers, "--bench", bench)
    code, _, err = score(answers, "--bench", bench, "--judge", server.url)
    assert code == 0 and "the last line was cut short; its answer is asked for again" in err
    assert "4 of 8 answers have been reviewed already" in err
    assert len(server.chats) == 12 and len(lines_of(file)) == 8


def test_a_blind_run_has_its_own_reviews(tmp_path, serve):
    bench, server = write_set(tmp_path), serve(rate)
    blind = write_answers(tmp_path).rename(tmp_path / "predictions.blind.jsonl")
    scored(blind, "--bench", bench, "--judge", server.url)
    assert [file.name for file in tmp_path.glob("reviews*")] == ["reviews.blind.jsonl"]


# What is counted


def test_failed_reviews_are_counted_and_asked_for_again(tmp_path, serve):
    def answer(number, body):
        return failing(400, "too long") if number_of(body) >= 4 and server.models != ("well",) else rate(number, body)

    bench, server = write_set(tmp_path), serve(answer)
    answers = write_answers(tmp_path)
    code, out, err = score(answers, "--bench", bench, "--judge", server.url, "--judge-model", "j", "--json")
    result = json.loads(out)
    assert code == 0 and "judge j: 4 of 8 reviews failed: 4 x HTTP 400: too long" in err
    assert (result["questions"], result["unparsed"], result["unparsed_rate"]) == (8, 4, 0.5)
    assert result["figures"]["score"]["value"] == 6 / 4 and result["figures"]["score"]["count"] == 4  # 0 1 2 3
    assert result["problems"] == {"HTTP 400: too long": 4}
    assert scored(answers, "--bench", bench) == result  # stored as failures, too
    server.models = ("well",)
    assert scored(answers, "--bench", bench, "--judge", server.url, "--judge-model", "j")["unparsed"] == 0
    assert len(server.chats) == 12


@pytest.mark.parametrize("said", ["A good answer.", "Rating: 7", "Rating: -1", "Rating: 3 or rather Rating: 4", "Rating: five"])  # fmt: skip
def test_a_review_without_a_verdict_is_unparsed(tmp_path, serve, said):
    bench = write_set(tmp_path)
    server = serve(lambda number, body: completion(said) if number_of(body) < 2 else rate(number, body))
    result = scored(write_answers(tmp_path), "--bench", bench, "--judge", server.url)
    assert (result["unparsed"], result["figures"]["score"]["count"]) == (2, 6)
    assert result["figures"]["score"]["value"] == 20 / 6
    assert result["problems"] == {"no verdict could be read from it": 2}
    chats = len(server.chats)
    scored(tmp_path, "--bench", bench, "--judge", server.url)
    assert len(server.chats) == chats  # it would say the same again


def test_a_judge_of_prose_gives_no_number(tmp_path, serve):
    bench, server = write_set(tmp_path), serve(lambda number, body: completion("A fine answer, all in all."))
    result = scored(write_answers(tmp_path), "--bench", bench, "--judge", server.url)
    assert result["scored"] is False and result["figures"] == {} and result["unparsed_rate"] == 1.0
    assert result["why"] == "none of 8 reviews by fake gives a verdict: no verdict could be read from it"
    assert [result[key] for key in ("accuracy", "f1", "yes_rate")] == [None] * 3


def test_reasoning_of_the_judge_is_passed_over(tmp_path, serve):
    bench = write_set(tmp_path)
    server = serve(lambda number, body: completion("<think>Rating: 1? No, Rating: 2.</think>\nRating: 6"))
    assert scored(write_answers(tmp_path), "--bench", bench, "--judge", server.url)["figures"]["score"]["value"] == 6


def test_no_judge_no_number(tmp_path):
    code, out, _ = score(write_answers(tmp_path), "--bench", write_set(tmp_path))
    assert code == 0 and out.startswith("mine  not scored: only a judge can score it; name an OpenAI-compatible server")
    result = scored(tmp_path, "--bench", write_set(tmp_path))
    assert result["scored"] is False
    assert {value for key, value in result.items() if key.endswith(("accuracy", "rate", "f1"))} == {None}


# What goes wrong


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (failing(401, "bad key"), "HTTP 401: bad key; it wants another key (OPENAI_API_KEY is not set)"),
        (failing(404, "no such model"), "HTTP 404: no such model; check the URL and judge.model"),
        (failing(429, "slow down"), "judge fake: no review came of 8 that were asked for: 8 x HTTP 429 after 6 tries: slow down; run it again"),
        (failing(400, "'temperature' is not supported"), "judge.omit=[temperature] leaves it out"),
        (completion("It is", finish="length"), "8 x cut off after 12 tokens"),
        ((200, {}, b"<html>"), "8 x an answer that is not JSON after 6 tries"),
    ],
)  # fmt: skip
def test_a_server_that_fails_ends_in_one_line(tmp_path, serve, answer, line):
    bench, server = write_set(tmp_path), serve(lambda number, body: answer)
    assert line in refused(write_answers(tmp_path), "--bench", bench, "--judge", server.url)


def test_a_server_that_is_not_there(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        line = refused(write_answers(tmp_path), "--bench", write_set(tmp_path), "--judge", url)
    assert f"server {url}: not reachable (" in line
    assert not (tmp_path / "reviews.jsonl").exists()


def test_a_server_that_dies_keeps_what_it_said(tmp_path, serve):
    stored = []

    def answer(number, body):
        if number >= 4:
            server.dead = True
            raise Drop
        stored.append(len(lines_of(tmp_path / "reviews.jsonl")))
        return rate(number, body)

    bench, server = write_set(tmp_path), serve(answer)
    answers = write_answers(tmp_path)
    (tmp_path / "judge.yaml").write_text(f"{{url: {server.url}, model: fake, concurrency: 1}}")
    line = refused(answers, "--bench", bench, "--judge", tmp_path / "judge.yaml")
    assert "is not reachable any more; what is finished is kept, run the same command again" in line
    assert stored == [0, 1, 2, 3] and len(lines_of(tmp_path / "reviews.jsonl")) == 4
    well = serve(rate)
    scored(answers, "--bench", bench, "--judge", well.url, "--judge-model", "fake")
    assert len(well.chats) == 4


def test_the_judge_must_be_named_where_there_are_several(tmp_path, serve):
    bench, server = write_set(tmp_path), serve(rate, models=("a", "b"))
    line = refused(write_answers(tmp_path), "--bench", bench, "--judge", server.url)
    assert "lists 2 models; judge.model must name one: a, b" in line


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--judge", "localhost:8000"), "--judge localhost:8000: give http://HOST:PORT/v1, or a YAML file with url and model"),
        (("--judge", "none.yaml"), "none.yaml: no such file"),
        (("--judge", "{folder}/judge.yaml"), "judge.yaml: unknown key 'modell'; did you mean 'model'?"),
        (("--judge-model", "x"), "--judge-model x: --judge has to say where it is"),
        (("--reviews", "none.jsonl"), "none.jsonl: no such file; give the reviews of the answers"),
        (("--reviews", "{folder}/predictions.jsonl"), "predictions.jsonl: no reviews.jsonl of vapr, whose lines have"),
        (("--reviews", "{folder}/other.jsonl"), "other.jsonl: 0 of 8 answers have a review, 8 ('0') none"),
        (("--reviews", "{folder}/half.jsonl"), "half.jsonl: 4 of 8 answers have a review, 4 ('4') none; have the rest judged with --judge, or score what is there with --partial"),
        (("--reviews", "{folder}/two.jsonl"), "two.jsonl: reviews of several judges make no figure: a (4), b (4)"),
        (("--reviews", "{folder}/number.jsonl"), "number.jsonl:1: 'review' is 5, neither a text nor null"),
        (("--reviews", "{folder}/keys.jsonl"), "keys.jsonl:1: no 'id' (it has 'benchmark', 'judge', 'review')"),
        (("--judge", "http://127.0.0.1:9", "--reviews", "{folder}/predictions.jsonl"), "predictions.jsonl: not vapr's reviews.jsonl, so that no review can go in"),
    ],
)  # fmt: skip
def test_options_and_reviews_that_do_not_fit(tmp_path, options, line):
    answers, bench = write_answers(tmp_path), write_set(tmp_path)

    def review(n: int, **more) -> dict:
        return {"benchmark": "mine", "id": str(n), "judge": "a", "review": f"Rating: {n % 7}", **more}

    write_lines(tmp_path / "other.jsonl", [review(n, benchmark="mmhal") for n in range(8)])
    write_lines(tmp_path / "half.jsonl", [review(n) for n in range(4)])
    write_lines(tmp_path / "two.jsonl", [review(n, judge="a" if n < 4 else "b") for n in range(8)])
    write_lines(tmp_path / "number.jsonl", [review(0, review=5)])
    write_lines(tmp_path / "keys.jsonl", [{"benchmark": "mine", "judge": "a", "review": "x"}])
    (tmp_path / "judge.yaml").write_text("{url: http://h:1, modell: x}")
    given = [option.format(folder=tmp_path) for option in options]
    assert line in refused(answers, "--bench", bench, *given)


def test_half_of_the_reviews_when_asked(tmp_path):
    answers, bench = write_answers(tmp_path), write_set(tmp_path)
    rows = [{"benchmark": "mine", "id": str(n), "judge": "a", "review": f"Rating: {n}"} for n in range(4)]
    file = write_lines(tmp_path / "half.jsonl", rows)
    result = scored(answers, "--bench", bench, "--reviews", file, "--partial")
    assert (result["questions"], result["asked"], result["partial"]) == (4, 8, True)
    assert result["figures"]["score"]["value"] == 1.5


def test_a_set_that_rules_score_takes_no_judge(tmp_path):
    row = {"benchmark": "pope", "id": "1", "question": "Is there a cat?", "prediction": "yes", "answer": "yes"}
    answers = write_lines(tmp_path / "predictions.jsonl", [row])
    line = refused(answers, "--bench", "pope", "--judge", "http://127.0.0.1:9")
    assert "pope: POPE is scored by rules; leave --judge and --reviews out" in line
