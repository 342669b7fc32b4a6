"""HallusionBench: its constant answerers' figures, groups, uncertainty, and results of its authors' layout."""

import os
from pathlib import Path

import pytest

from tests.evaluation.benchmarks.authors_files import HALLUSION, answered, hallusionbench, write_json
from vapr.errors import UserError
from vapr.evaluation.benchmarks.hallusionbench import HALLUSIONBENCH
from vapr.evaluation.readers.open import open_answers
from vapr.evaluation.score import score
from vapr.evaluation.scoring.answers import POLICIES
from vapr.evaluation.scoring.prediction import Prediction

REAL = Path(os.environ.get("VAPR_REAL_DATA", "")) / "hallusionbench"
needs_real = pytest.mark.skipif(not os.environ.get("VAPR_REAL_DATA"), reason="VAPR_REAL_DATA is not set")


@needs_real
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("said", "a_acc", "q_acc", "f_acc"), [("Yes", 42.8698, 3.956, 7.2254), ("No", 57.1302, 19.3407, 12.1387)]
)
def test_constant_answers_to_the_printed_digits(said, a_acc, q_acc, f_acc, policy):
    result = score(answered(HALLUSIONBENCH.read(REAL), lambda question: said), HALLUSIONBENCH, policy)
    figures = {name: round(100 * figure["value"], 4) for name, figure in result["figures"].items()}
    assert (figures["a_acc"], figures["q_acc"], figures["f_acc"]) == (a_acc, q_acc, f_acc)
    assert result["splits"]["VD"]["questions"] + result["splits"]["VS"]["questions"] == 1129


def test_not_knowing_is_right_where_nothing_was_shown(tmp_path):
    questions = HALLUSIONBENCH.read(hallusionbench(tmp_path))
    rows = answered(questions, lambda question: "I do not know.")
    official = score(rows, HALLUSIONBENCH, "official")
    assert official["accuracy"] == 2 / 6 and official["guessed"] == 2 and official["unparsed_rate"] == 1
    assert official["yes_rate"] == 0  # uncertain is neither
    assert score(rows, HALLUSIONBENCH, "strict")["accuracy"] == 0


def test_results_of_the_authors_layout(tmp_path):
    questions = HALLUSIONBENCH.read(hallusionbench(tmp_path))
    rows = [row | {"model_prediction": row["gt_answer"] if n < 5 else "No."} for n, row in enumerate(HALLUSION)]
    file = write_json(tmp_path / "HallusionBench_result.json", rows[::-1])
    predictions, _, _ = open_answers(file, HALLUSIONBENCH, questions)
    assert score(predictions, HALLUSIONBENCH, "official")["accuracy"] == 5 / 6  # "0" and "1" are official answers
    assert score(predictions, HALLUSIONBENCH, "strict")["unparsed_rate"] == 5 / 6


def test_pictures(tmp_path):
    questions = HALLUSIONBENCH.read(hallusionbench(tmp_path))
    assert questions[0].images == () and questions[0].id == "VS_chart_0_0_0" and questions[0].answer == "yes"
    assert questions[2].images == (tmp_path / "VS/chart/0_1.png",) and questions[2].meta["together"] == [2, 2]


def test_groups_count_only_whole(tmp_path):
    rows = answered(HALLUSIONBENCH.read(hallusionbench(tmp_path)), lambda question: "Yes")
    with pytest.raises(UserError, match="question 'VD_chart_1_0' has 1 of its 2 answers"):
        score(rows[:-1], HALLUSIONBENCH)
    figures = score(rows[:-1], HALLUSIONBENCH, partial=True)["figures"]
    assert figures["q_acc"] == {"value": 0, "interval": figures["q_acc"]["interval"], "count": 2}
    assert figures["f_acc"]["count"] == 2 and figures["a_acc"]["count"] == 5
    bare = [Prediction(benchmark="hallusionbench", id="1", question="?", prediction="Yes", answer="yes")]
    for partial in (False, True):
        with pytest.raises(UserError, match="meta has no 'together'; give the questions"):
            score(bare, HALLUSIONBENCH, partial=partial)


def refused(rows, tmp_path, results=False) -> str:
    file = write_json(tmp_path / ("HallusionBench_result.json" if results else "HallusionBench.json"), rows)
    with pytest.raises(UserError) as error:
        if results:
            open_answers(file, HALLUSIONBENCH, HALLUSIONBENCH.read(hallusionbench(tmp_path)))
        else:
            HALLUSIONBENCH.read(tmp_path)
    assert "\n" not in str(error.value) and str(file) in str(error.value)
    return str(error.value)


def test_bad_files(tmp_path):
    row = HALLUSION[0]
    assert "row 1: 'gt_answer' is '2', not 0 (no) or 1 (yes)" in refused([row | {"gt_answer": "2"}], tmp_path)
    assert "row 2: no 'set_id'" in refused([row, {k: v for k, v in row.items() if k != "set_id"}], tmp_path)
    assert "stands twice" in refused([row, row], tmp_path)
    assert "row 1: a JSON str, not an object" in refused(["x"], tmp_path)
    said = [r | {"model_prediction": "Yes"} for r in HALLUSION]
    assert "no 'model_prediction'" in refused(HALLUSION, tmp_path, results=True)
    assert "'model_prediction' is null" in refused([said[0] | {"model_prediction": None}], tmp_path, results=True)
    assert "no question of HallusionBench" in refused([said[0] | {"set_id": "9"}], tmp_path, results=True)
    assert "is answered twice" in refused([*said, said[0]], tmp_path, results=True)
    assert "these are predictions of other questions" in refused(
        [said[0] | {"question": "What?"}], tmp_path, results=True
    )
    assert "5 answers to 6 questions" in refused(said[:5], tmp_path, results=True)
