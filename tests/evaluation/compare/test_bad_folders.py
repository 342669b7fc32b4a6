"""What cannot be compared is told in one line that names the place and the way out."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from tests.evaluation.compare.answers import row, rows_of, write
from vapr.cli import main
from vapr.evaluation.benchmarks import BENCHMARKS


def error_of(*arguments: object) -> str:
    result = CliRunner().invoke(main, ["eval", "--compare", *map(str, arguments)])
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("Error: ") and result.stdout == ""
    return line


@pytest.fixture
def good(tmp_path):
    return write(tmp_path / "good", rows_of("++-"))


def other(*rows, **more):
    return [{**row(n, "Yes"), **more} for n in range(3)] if not rows else list(rows)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (other(benchmark="mme"), "no benchmark that all folders have: {good} holds pope; {bad} holds mme"),
        (other(row(7, "Yes")), "pope: no question that all folders have: {good} has 'q-0'; {bad} has 'q-7'"),
        (other(row(0, "Yes", "no")), "question 'q-0' has the truth 'yes' in {good}, but 'no' in {bad}"),
        (other(row(0, "Yes", question="Is it red?")), "has the question 'is there a thing0 in the image?' in {good}, but 'is it red?' in {bad}"),
        (other(row(0, "Yes", meta={"image": "other.jpg"})), "has the picture '0.jpg' in {good}, but 'other.jpg' in {bad}"),
        (other(row(0, "Yes", meta={"split": "popular"})), "has the split 'random' in {good}, but 'popular' in {bad}"),
        (other(row(0, "Yes"), row(0, "No")), "{bad}/predictions.jsonl: question 'q-0' of pope stands twice"),
        (other(row(0, 1)), "{bad}/predictions.jsonl:1: 'prediction' is 1, not a text"),
        (other({"question_id": 1, "text": "Yes"}), "{bad}/predictions.jsonl:1: no 'benchmark'"),
        ([], "{bad}/predictions.jsonl: no answers in it; finish the run"),
    ],
)  # fmt: skip
def test_answers_that_do_not_compare(good, tmp_path, rows, message):
    bad = write(tmp_path / "bad", rows)
    assert message.format(good=good, bad=bad) in error_of(good, bad)


def test_folders_that_are_none(good, tmp_path):
    assert "no result folder; give two or more" in error_of()
    assert f"{good}: one result folder alone; give two or more" in error_of(good)
    assert f"{good}/../good: given twice" in error_of(good, f"{good}/../good")
    assert "nowhere: no such folder" in error_of(good, tmp_path / "nowhere")
    assert f"a file; give its folder, {good}" in error_of(good, good / "predictions.jsonl")
    (tmp_path / "empty").mkdir()
    assert "empty: no result folder, it has no predictions.jsonl; vapr eval MODEL" in error_of(good, tmp_path / "empty")
    write(tmp_path / "several" / "base", rows_of("+"))
    assert f"give the folders in it: {tmp_path}/several/base" in error_of(good, tmp_path / "several")
    begun = write(tmp_path / "begun", rows_of("+"), "predictions.partial.jsonl")
    assert "begun: only predictions.partial.jsonl in it; finish the run" in error_of(good, begun)


def test_half_written_files(good, tmp_path):
    half = write(tmp_path / "half", rows_of("++-"))
    text = (half / "predictions.jsonl").read_text()
    (half / "predictions.jsonl").write_text(text[:-20])
    assert f"{half}/predictions.jsonl:3: not a line of JSON; the file's last line is cut short" in error_of(good, half)
    (half / "predictions.jsonl").write_text(text)
    for name in ("evaluation.json", "scores.json"):
        (half / name).write_text('{"pope": ')
        assert f"{half}/{name}: not a JSON object; it may be half-written" in error_of(good, half)
        (half / name).write_text('{"pope": NaN}')
        assert f"{half}/{name}: not a JSON object" in error_of(good, half)
        (half / name).unlink()
    (half / "predictions.blind.jsonl").write_text("[1]\n")
    assert f"{half}/predictions.blind.jsonl:1: a JSON list, not an object" in error_of(good, half)


def test_an_unknown_truth(good, tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, [row(0, "Yes", "perhaps")])
    assert f"{tmp_path}/a: question 'q-0' of pope: 'answer' is 'perhaps', no truth" in error_of(
        tmp_path / "a", tmp_path / "b"
    )


def test_a_page_is_html(good, tmp_path):
    again = write(tmp_path / "b", rows_of("+++"))
    assert "--out page.txt: the page is HTML" in error_of(good, again, "--out", "page.txt")


def test_two_folders_of_one_name_are_told_apart(tmp_path):
    names = [write(tmp_path / parent / "last", rows_of(marks)) for parent, marks in (("a", "++"), ("b", "+-"))]
    result = CliRunner().invoke(main, ["eval", "--compare", *map(str, names), "--json"])
    assert [folder["name"] for folder in json.loads(result.stdout)["folders"]] == [str(name) for name in names]


def test_withheld_truths_of_a_judge_set_may_not_differ(good, tmp_path, monkeypatch):
    monkeypatch.setitem(BENCHMARKS, "llava-x", replace(BENCHMARKS["pope"], name="llava-x", scored="needs a judge"))
    names = [write(tmp_path / name, [{**row(0, "It is."), "benchmark": "llava-x", "answer": answer}])
             for name, answer in (("a", "a cat"), ("b", "a dog"))]  # fmt: skip
    assert "has the truth 'a cat' in" in error_of(*names)
