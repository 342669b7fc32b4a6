"""``vapr score``: one object for programs, a table for people, and one line for what cannot be scored."""

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.evaluation.benchmarks.test_pope import question, write_lines
from vapr.cli import main

KEYS = ("accuracy", "precision", "recall", "f1", "yes_rate", "gold_yes_rate", "unparsed_rate")


def vapr(*arguments: object):
    result = CliRunner().invoke(main, ["score", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def row(number: int, said: str, truth: str = "yes", **more) -> dict:
    asked = f"Is there a thing{number} in the image?"
    return {
        "benchmark": "pope", "id": f"random-{number}", "question": asked, "prediction": said, "answer": truth,
        "meta": {"split": "random", "image": f"{number % 3}.jpg"}, **more,
    }  # fmt: skip


ROWS = [row(1, "Yes"), row(2, "yes, it is", "no"), row(3, "No"), row(4, "Perhaps", "no")]


@pytest.fixture
def questions(tmp_path) -> Path:
    rows = [question(n, f"thing{n}", "yes" if n % 2 else "no") for n in (1, 2, 3, 4)]
    return write_lines(tmp_path / "coco_pope_random.json", rows)


@pytest.fixture
def file(tmp_path) -> Path:
    return write_lines(tmp_path / "predictions.jsonl", ROWS)


def test_json(file):
    result = json.loads(vapr(file, "--bench", "pope", "--json").stdout)
    # said yes: 1 right, 1 wrong; one of two yes found; "Perhaps" is unparsed, and wrong
    expected = {"accuracy": 0.25, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_rate": 0.5, "gold_yes_rate": 0.5,
                "unparsed_rate": 0.25}  # fmt: skip
    assert {key: result[key] for key in KEYS} == expected
    assert {key: result["splits"]["random"][key] for key in KEYS} == expected
    assert result["policy"] == "strict" and result["questions"] == 4 and set(KEYS) <= set(result["intervals"])
    bias = result["yes_bias"]
    assert bias["fpr"]["value"] == 0.5 and bias["fnr"]["value"] == 0.5 and bias["gap"]["value"] == 0
    assert bias["unparsed_as"]["no"]["accuracy"] == 0.5 and bias["unparsed_as"]["drop"]["yes_rate"] == pytest.approx(
        2 / 3
    )


def test_a_table_names_its_policy(file):
    shown = vapr(file, "--bench", "pope", "--policy", "official").stdout
    assert "official" in shown and "unparsed" in shown


def test_the_truth_of_the_questions_counts(file, questions, tmp_path):
    wrong = write_lines(tmp_path / "other.jsonl", [{**r, "answer": "yes"} for r in reversed(ROWS)])
    result = json.loads(vapr(wrong, "--bench", f"pope={questions}", "--json").stdout)
    assert result["accuracy"] == 0.25 and result["asked"] == 4 and result["partial"] is False
    said = vapr(wrong, "--bench", f"pope={questions}").stderr
    assert "2 answers stand beside another truth than the questions have, first 'random-4'" in said
    assert "another truth" not in vapr(file, "--bench", f"pope={questions}").stderr


def test_other_ids_are_joined_by_picture_and_question(questions, tmp_path):
    rows = [{**r, "id": str(n), "answer": "?", "meta": {"image": "a.jpg"}} for n, r in enumerate(reversed(ROWS))]
    file = write_lines(tmp_path / "other.jsonl", rows)
    result = json.loads(vapr(file, "--bench", f"pope={questions}", "--json").stdout)
    assert result["accuracy"] == 0.25 and result["f1"] == 0.5
    twice = write_lines(tmp_path / "twice.jsonl", [*rows, {**rows[0], "id": "9"}])
    refused = vapr(twice, "--bench", f"pope={questions}")
    assert "question 'random-4' is answered twice" in refused.stderr
    write_lines(tmp_path / "coco_pope_popular.json", [question(1, "thing1", "yes")])
    refused = vapr(file, "--bench", f"pope={tmp_path}")
    assert "'3' is no id of pope, and 2 of its questions ask that of a.jpg; give meta.split" in refused.stderr


def test_partial_only_when_asked(questions, tmp_path):
    fewer = write_lines(tmp_path / "predictions.jsonl", ROWS[:3])
    refused = vapr(fewer, "--bench", f"pope={questions}")
    assert refused.exit_code == 2
    assert "3 answers to 4 questions; 'random-4' has none" in refused.stderr and "--partial" in refused.stderr
    scored = vapr(fewer, "--bench", f"pope={questions}", "--partial", "--json")
    result = json.loads(scored.stdout)
    assert result["partial"] is True and result["asked"] == 4 and result["questions"] == 3
    assert "1 of 4 questions have no answer" in scored.stderr
    shown = vapr(fewer, "--bench", f"pope={questions}", "--partial").stdout
    assert shown.startswith("pope, read as 'strict', 3 answers of 4: partial, ")


BAD = {
    "a column missing": ([{"benchmark": "pope", "id": 1, "prediction": "Yes"}], "predictions.jsonl:1: no 'answer'"),
    "another shape": ([{"question": "q", "answer": "yes"}], "no predictions.jsonl of vapr; give the questions, too"),
    "a question twice": ([*ROWS, ROWS[0]], "question 'random-1' of pope stands twice"),
    "another benchmark": ([row(1, "A", benchmark="mmstar")], "no predictions of pope; it holds mmstar"),
    "no text": ([*ROWS, row(5, None)], "predictions.jsonl:5: 'prediction' is null, not a text"),
    "a list": ([*ROWS, ["Yes"]], "predictions.jsonl:5: a JSON list, not an object"),
    "no truth": ([row(1, "Yes", "maybe")], "'answer' is 'maybe', no truth that POPE has"),
    "meta is a list": ([row(1, "Yes", meta=["random"])], "predictions.jsonl:1: 'meta' is [\"random\"], not an object"),
    "nothing": ([], "predictions.jsonl: no answers in it, it is empty"),
    "no benchmark named": ([{"id": 1, "prediction": "Yes", "answer": "yes"}], "predictions.jsonl:1: no 'benchmark'"),
    "no id": ([row(1, "Yes", id=None)], "predictions.jsonl:1: 'id' is null, neither a text nor a whole number"),
    "a list for an id": ([row(1, "Yes", id=[1])], "predictions.jsonl:1: 'id' is [1], neither a text nor"),
    "meta is text": ([row(1, "Yes", meta="random")], "predictions.jsonl:1: 'meta' is \"random\", not an object"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_predictions(name, tmp_path):
    rows, message = BAD[name]
    result = vapr(write_lines(tmp_path / "predictions.jsonl", rows), "--bench", "pope")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and message in result.stderr, result.stderr


@pytest.mark.parametrize("options", [4, "red", {"A": "red"}])
def test_options_that_are_no_list(options, tmp_path):
    rows = [row(1, "A", "A", benchmark="mmstar", meta={"options": options})]
    result = vapr(write_lines(tmp_path / "predictions.jsonl", rows), "--bench", "mmstar")
    assert result.exit_code == 2 and "write a list of their texts, that of A first" in result.stderr


def test_objects_that_are_no_lists(tmp_path):
    meta = {"vocabulary": "dog", "safe": ""}
    rows = [row(1, "A dog.", {"truth": [["dog"]], "hallu": 5}, benchmark="amber-g", meta=meta)]
    result = vapr(write_lines(tmp_path / "predictions.jsonl", rows), "--bench", "amber-g")
    assert result.exit_code == 2 and "no truth that AMBER (generative) has" in result.stderr


def test_half_a_line(tmp_path):
    file = write_lines(tmp_path / "predictions.jsonl", ROWS)
    file.write_bytes(file.read_bytes()[:-30])
    result = vapr(file, "--bench", "pope")
    assert (
        result.exit_code == 2
        and "predictions.jsonl:4: not a line of JSON; the file's last line is cut short" in result.stderr
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "random-9"}, "an answer to 'random-9', which is no question of pope"),
        (
            {"question": "Is there a whale in the image?"},
            "'random-1' answers 'Is there a whale in the image?', but the",
        ),
    ],
)
def test_answers_to_other_questions(change, message, questions, tmp_path):
    file = write_lines(tmp_path / "predictions.jsonl", [{**ROWS[0], **change}, *ROWS[1:]])
    result = vapr(file, "--bench", f"pope={questions}")
    assert result.exit_code == 2 and message in result.stderr, result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bench", "pop"), "--bench pop: no such benchmark; did you mean pope?"),
        (("--bench", "zzz"), "no such benchmark; there are "),
        (("--bench", "pope=nowhere"), "--bench pope=nowhere: no such file or folder"),
        (("--bench", "pope="), "--bench pope=: no such file or folder"),
    ],
)
def test_bad_arguments(arguments, message, file):
    result = vapr(file, *arguments)
    assert result.exit_code == 2 and message in result.stderr, result.stderr


def test_no_file(tmp_path):
    result = vapr(tmp_path / "none.jsonl", "--bench", "pope")
    assert result.exit_code == 2 and "none.jsonl: no such file" in result.stderr


@pytest.mark.skipif(not os.environ.get("VAPR_REAL_DATA"), reason="VAPR_REAL_DATA is not set")
def test_results_that_hold_their_questions_need_no_other_file():
    """The authors' files of real models, with their published scores."""
    real = Path(os.environ["VAPR_REAL_DATA"])
    mmmu = vapr(real / "mmmu" / "llava1.5_13b", "--bench", "mmmu", "--policy", "official", "--json")
    assert round(json.loads(mmmu.stdout)["accuracy"], 3) == 0.367
    assert "questions and truths are those that stand beside the answers" in mmmu.stderr
    for number, score in ((1, 72.8), (2, 72.7), (3, 72.1)):
        name = real / "llava_bench" / "llava-v1.5-13b"
        reviews = name.with_name(f"{name.name}-eval{number}.jsonl")
        judged = vapr(f"{name}.jsonl", "--bench", "llava-bench", "--reviews", reviews, "--json")
        assert round(json.loads(judged.stdout)["figures"]["relative_score"]["value"], 1) == score
    letters = vapr(real / "mmmu" / "llava1.5_13b" / "total_val_output.json", "--bench", "mmmu")
    assert letters.exit_code == 2 and "give the questions, too: --bench mmmu=PATH" in letters.stderr
    pope = json.loads(vapr(real / "pope" / "llava-v1.5-13b.jsonl", "--bench", f"pope={real / 'pope'}", "--json").stdout)
    assert pope["asked"] == 8910 and pope["partial"] is False
