"""lmms-eval's logs, joined by the questions' own ids and texts."""

import json
import os
from pathlib import Path

import pytest

from tests.evaluation.readers.tool_files import lmms_sample, pope_hub_rows, pope_own_files, shuffled, write_jsonl
from vapr.errors import UserError
from vapr.evaluation.benchmarks.pope import POPE
from vapr.evaluation.readers.open import open_answers, open_benchmark
from vapr.evaluation.score import score
from vapr.evaluation.score_file import score_file

REAL = Path(os.environ.get("VAPR_REAL_DATA", "")) / "pope"
needs_real = pytest.mark.skipif(not os.environ.get("VAPR_REAL_DATA"), reason="VAPR_REAL_DATA is not set")


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own").mkdir()
    return pope_own_files(tmp_path / "own")


def said(row: dict) -> str:
    """Return an answer that differs among splits, so that a mistaken join shows: right but in the random split."""
    return {"yes": "Yes", "no": "No"}[row["answer"]] if row["category"] != "random" else "Perhaps."


def samples() -> list[dict]:
    return [lmms_sample(number, row, said(row)) for number, row in enumerate(pope_hub_rows())]


def test_a_log_without_documents_in_any_order(own, tmp_path):
    file = write_jsonl(tmp_path / "20260801_120000_samples_pope.jsonl", shuffled(samples()))
    notes: list[str] = []
    result = score_file(file, f"pope={own}", say=notes.append)
    assert result["questions"] == 18
    assert {split: part["accuracy"] for split, part in result["splits"].items()} == {
        "adversarial": 1,
        "popular": 1,
        "random": 0,
    }
    assert result["splits"]["random"]["unparsed"] == 6
    assert notes[0] == f"{file}: read as a log of lmms-eval"
    # every question here is asked in all three splits, which the log does not name
    assert "18 answers are to questions that several splits ask; joined in its order" in notes[1]


def test_the_task_tells_the_split(own, tmp_path):
    rows = [(n, row) for n, row in enumerate(pope_hub_rows()) if row["category"] == "popular"]
    file = write_jsonl(tmp_path / "x_samples_pope_pop.jsonl", shuffled([lmms_sample(n, row, "No") for n, row in rows]))
    benchmark, questions = open_benchmark(f"pope={own}")
    predictions, _, _ = open_answers(file, benchmark, questions, partial=True)
    assert {prediction.split for prediction in predictions} == {"popular"} and len(predictions) == 6


def test_the_older_form_with_documents(own, tmp_path):
    logs = []
    for number, row in enumerate(pope_hub_rows()):
        doc = {key: value for key, value in row.items() if key not in ("image", "image_source")}
        logs.append({
            "doc_id": number, "doc": doc, "target": row["answer"],
            "arguments": [[f"{row['question']}\nAnswer the question using a single word or phrase.", {"max_new_tokens": 128}, None, number, "pope", "test"]],
            "resps": [[said(row)]], "filtered_resps": [said(row)],
            "pope_accuracy": {"question_id": row["question_id"], "score": 1.0, "prediction": "x", "ground_truth": "x"},
        })  # fmt: skip
    file = tmp_path / "pope.json"
    file.write_text(
        json.dumps(
            {"args": {"model": "llava"}, "model_configs": {"task": "pope"}, "logs": shuffled(logs), "time": "0810_0101"}
        )
    )
    result = score_file(file, f"pope={own}", say=lambda line: None)
    assert [result["splits"][split]["accuracy"] for split in ("adversarial", "popular", "random")] == [1, 1, 0]


def test_the_models_own_words_are_read(own, tmp_path):
    """lmms-eval strips reasoning before it scores, and keeps what was said beside it."""
    rows = samples()
    rows[0] |= {"resps": ["<think>Is it? Yes.</think> No"], "filtered_resps": "No"}
    rows[1] |= {"resps": ["No", "Yes"], "filtered_resps": ["No", "Yes"]}
    benchmark, questions = open_benchmark(f"pope={own}")
    predictions, notes, _ = open_answers(write_jsonl(tmp_path / "x_samples_pope.jsonl", rows), benchmark, questions)
    by_id = {prediction.id: prediction.prediction for prediction in predictions}
    assert by_id["adversarial-1"] == "<think>Is it? Yes.</think> No" and by_id["adversarial-2"] == "No"
    assert "1 samples hold several responses; the first of each is read" in notes[-1]


def test_a_log_of_pope_is_scored_with_repopes_truths(own, tmp_path):
    """RePOPE calls the second question's truth a mistake, and drops the first."""
    (tmp_path / "re").mkdir()
    for split in ("adversarial", "popular", "random"):
        rows = [json.loads(line) for line in (own / f"coco_pope_{split}.json").read_text().splitlines()][1:]
        rows[0]["label"] = "yes"
        write_jsonl(tmp_path / "re" / f"coco_repope_{split}.json", rows)
    notes: list[str] = []
    file = write_jsonl(tmp_path / "x_samples_pope.jsonl", shuffled(samples()))
    result = score_file(file, f"repope={tmp_path / 're'}", say=notes.append)
    assert result["questions"] == 15 and result["splits"]["popular"]["accuracy"] == pytest.approx(4 / 5)
    assert "answers to pope; 3 are to questions that repope drops" in notes[1]


@needs_real
def test_real_answers_of_llava_as_a_log_give_the_published_f1(tmp_path):
    """LLaVA-1.5-13B's answers, shuffled, as lmms-eval would have logged them: no picture, no split, ids without one."""
    questions = POPE.read(REAL)
    predictions, _, _ = open_answers(REAL / "llava-v1.5-13b.jsonl", POPE, questions)
    said = {prediction.id: prediction.prediction for prediction in predictions}
    rows = [
        lmms_sample(n, {"question_id": q.id.split("-")[1], "question": q.question, "answer": q.answer}, said[q.id])
        for n, q in enumerate(questions) if q.id in said
    ]  # fmt: skip
    file = write_jsonl(tmp_path / "x_samples_pope.jsonl", shuffled(rows))
    joined, _, _ = open_answers(file, POPE, [q for q in questions if q.id in said])
    splits = score(joined, POPE, "official")["splits"]
    assert {name: round(part["f1"], 4) for name, part in splits.items()} == {
        "adversarial": 0.8446,
        "popular": 0.8625,
        "random": 0.8714,
    }


def without(rows: list[dict], key: str) -> list[dict]:
    return [{k: v for k, v in row.items() if k != key} for row in rows]


BAD = {
    "fewer answers than questions": (samples()[:12], ":1: 2 answer(s) to what 3 questions ask ('adversarial-1', 'popular-1', ...), and nothing tells to which"),
    "an answer twice": ([*samples(), lmms_sample(18, {**pope_hub_rows()[0], "question_id": "1"}, "Yes")], ":1: 4 answer(s) to what 3 questions ask"),
    "another benchmark's": ([{**row, "input": "Which is taller?\nA. a\nB. b", "pope_accuracy": {"question_id": "x"}} for row in samples()], ":1: 'Which is taller? A. a B. b' is no question of pope; give the questions that x_samples_pope.jsonl answers"),
    "a document that is a text": ([{"doc_id": 0, "filtered_resps": ["yes"], "doc": "x"}], ":1: 'doc_id' is no number or 'doc' no object"),
    "no number of a document": ([{"doc_id": None, "filtered_resps": ["yes"]}], ":1: 'doc_id' is no number or 'doc' no object"),
    "a sample without an answer": ([samples()[0], {"doc_id": 1}], ":2: no 'filtered_resps'; a sample of lmms-eval has doc_id, filtered_resps"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_logs(own, tmp_path, case):
    rows, message = BAD[case]
    with pytest.raises(UserError) as error:
        score_file(write_jsonl(tmp_path / "x_samples_pope.jsonl", rows), f"pope={own}")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_half_written_log(own, tmp_path):
    file = write_jsonl(tmp_path / "x_samples_pope.jsonl", samples())
    file.write_text(file.read_text()[:-40])
    with pytest.raises(
        UserError, match=r"x_samples_pope.jsonl:18: not a line of JSON; the file's last line is cut short"
    ):
        score_file(file, f"pope={own}")


def test_its_results_are_refused(own, tmp_path):
    file = tmp_path / "20260801_120000_results.json"
    file.write_text(
        json.dumps({"results": {"pope": {"pope_accuracy,none": 0.87}}, "configs": {}, "versions": {}, "n-samples": {}})
    )
    with pytest.raises(
        UserError,
        match="scores, without an answer in them; give 20260801_120000_samples_TASK.jsonl, which --log_samples writes",
    ):
        score_file(file, f"pope={own}")
