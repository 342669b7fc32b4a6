"""Comparing result folders: known 2 x 2 tables, what changed, and that order changes nothing."""

import json
import math
import random
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest
from scipy.stats import binomtest

from tests.evaluation.compare.answers import row, rows_of, write
from vapr.evaluation.benchmarks import BENCHMARKS
from vapr.evaluation.benchmarks.benchmark import Reading
from vapr.evaluation.compare.changes import KINDS
from vapr.evaluation.compare.folders import read_folders
from vapr.evaluation.compare.holm import holm
from vapr.evaluation.compare.measure import compare
from vapr.evaluation.compare.report_text import show


def compared(*folders, **options):
    return compare(read_folders(folders), **options)[0]


def test_a_known_table(tmp_path):
    # 20 both right, 9 only the first, 2 only the second, 9 neither
    first = write(tmp_path / "a", rows_of("+" * 20 + "+" * 9 + "-" * 2 + "-" * 9))
    second = write(tmp_path / "b", rows_of("+" * 20 + "-" * 9 + "+" * 2 + "-" * 9))
    result = compared(first, second)
    part = result["benchmarks"]["pope"]
    (one,) = part["comparisons"]
    assert [model["accuracy"]["value"] for model in part["models"]] == [29 / 40, 22 / 40]
    assert [model["headline"]["value"] for model in part["models"]] == [58 / 69, 44 / 62]  # F1: 2 TP / (2 TP + misses)
    assert one["headline"]["value"] == pytest.approx(44 / 62 - 58 / 69)
    assert one["headline"]["interval"][0] < 44 / 62 - 58 / 69 < one["headline"]["interval"][1]
    assert one["mcnemar"] == {"only_a": 9, "only_b": 2, "p": pytest.approx(binomtest(2, 11).pvalue), "test": "exact"}
    assert one["p"] == pytest.approx(2 * (1 + 11 + 55) / 2**11) and one["p_by_picture"] is None
    assert one["p_holm"] == one["p"] and result["tests"] == 1
    assert one["difference"]["value"] == pytest.approx(-7 / 40)
    low, high = one["difference"]["interval"]
    assert low < -7 / 40 < high < 0.01 and low > -0.36
    kinds = {name: kind["questions"] for name, kind in one["changes"]["kinds"].items()}
    assert kinds == {"fixed": 2, "broken": 9, "became unparsed": 0, "became parsed": 0, "still unparsed": 0,
                     "still wrong": 9, "still right": 20}  # fmt: skip
    assert one["changes"]["kinds"]["fixed"]["ids"] == ["q-29", "q-30"]
    # A difference as large as what the set could have shown is about three standard errors of the discordant share.
    assert 2.5 * math.sqrt(11 / 40 / 40) < one["detectable"] < 3.2 * math.sqrt(11 / 40 / 40)


def test_questions_about_one_picture_are_one_in_the_test(tmp_path):
    # 12 pictures of 4 questions each; 5 pictures are lost as wholes
    first = write(tmp_path / "a", [row(n, "Yes", meta={"image": f"{n // 4}.jpg"}) for n in range(48)])
    lost = [row(n, "No" if n < 20 else "Yes", meta={"image": f"{n // 4}.jpg"}) for n in range(48)]
    (one,) = compared(first, write(tmp_path / "b", lost))["benchmarks"]["pope"]["comparisons"]
    assert one["mcnemar"]["p"] == pytest.approx(2 / 2**20)
    assert one["p"] == one["p_by_picture"] == pytest.approx(2 / 2**5, abs=0.01)  # five signs that must agree


def test_losses_of_format_are_apart_and_everything_adds_up(tmp_path):
    draw = random.Random(3)
    marks = ["".join(draw.choice("++-?") for _ in range(500)) for _ in range(3)]
    names = [write(tmp_path / name, rows_of(one, 200)) for name, one in zip("abc", marks, strict=True)]
    comparisons = compared(*names)["benchmarks"]["pope"]["comparisons"]
    for one, (first, other) in zip(comparisons, [(marks[0], marks[1]), (marks[0], marks[2])], strict=True):
        pairs = Counter(zip(first, other, strict=True))
        counted = {
            "fixed": pairs["-", "+"], "broken": pairs["+", "-"], "became unparsed": pairs["+", "?"] + pairs["-", "?"],
            "became parsed": pairs["?", "+"] + pairs["?", "-"], "still unparsed": pairs["?", "?"],
            "still wrong": pairs["-", "-"], "still right": pairs["+", "+"],
        }  # fmt: skip
        kinds, changes = one["changes"]["kinds"], one["changes"]
        assert {name: kinds[name]["questions"] for name in KINDS} == counted and sum(counted.values()) == 500
        assert kinds["became unparsed"]["right_before"] == pairs["+", "?"]
        assert kinds["became parsed"]["right_now"] == pairs["?", "+"]
        gained = sum(Fraction(kind["right_now"]) - Fraction(kind["right_before"]) for kind in kinds.values())
        assert gained == other.count("+") - first.count("+")  # to the question
        assert changes["knowledge"] == pytest.approx((pairs["-", "+"] - pairs["+", "-"]) / 500, abs=1e-12)
        assert changes["format"] == pytest.approx((pairs["?", "+"] - pairs["+", "?"]) / 500, abs=1e-12)
        assert changes["knowledge"] + changes["format"] == pytest.approx(one["difference"]["value"], abs=1e-12)


def test_a_guess_of_the_official_rule_is_unparsed(tmp_path):
    first, second = write(tmp_path / "a", rows_of("++-")), write(tmp_path / "b", rows_of("?+?"))
    official = compared(first, second, policy="official")["benchmarks"]["pope"]
    (one,) = official["comparisons"]
    # POPE takes "Perhaps." for a yes: both are right, and yet neither says so.
    assert official["models"][1]["accuracy"]["value"] == 1 and official["models"][1]["unparsed"] == 2
    assert one["changes"]["kinds"]["became unparsed"]["questions"] == 2
    assert one["changes"]["format"] == pytest.approx(1 / 3) and one["changes"]["knowledge"] == 0


def test_rules_that_draw_at_random_count_as_fractions(tmp_path, monkeypatch):
    pope = BENCHMARKS["pope"]
    chance = replace(
        pope, headline="accuracy",
        read_answer=lambda prediction, policy: Reading("yes", guessed=prediction.prediction == "Perhaps."),
        right=lambda prediction, gold, reading: 0.25 if reading.guessed else float(prediction.prediction == "Yes"),
    )  # fmt: skip
    monkeypatch.setitem(BENCHMARKS, "pope", chance)
    (one,) = compared(write(tmp_path / "a", rows_of("++?-")), write(tmp_path / "b", rows_of("+??-")))["benchmarks"][
        "pope"
    ]["comparisons"]
    assert one["difference"]["value"] == pytest.approx(-0.75 / 4) == one["changes"]["format"]
    assert (one["mcnemar"]["only_a"], one["mcnemar"]["only_b"]) == (1, 0)


def test_yes_bias_side_by_side(tmp_path):
    truths = ["yes", "no"] * 30
    often = ["Yes", "Yes", "Yes", "No"] * 15
    seldom = ["No", "No", "Yes", "No"] * 15
    rows = [[row(n, said, truth) for n, (said, truth) in enumerate(zip(column, truths, strict=True))]
            for column in (often, seldom)]  # fmt: skip
    part = compared(write(tmp_path / "a", rows[0]), write(tmp_path / "b", rows[1]))["benchmarks"]["pope"]
    assert [model["yes_bias"]["yes_rate"]["value"] for model in part["models"]] == [0.75, 0.25]
    bias = part["comparisons"][0]["yes_bias"]
    values = {name: bias[name]["value"] for name in ("yes_rate", "gap", "fpr", "fnr", "balanced_accuracy")}
    assert values == pytest.approx({"yes_rate": -0.5, "gap": -0.5, "fpr": -0.5, "fnr": 0.5, "balanced_accuracy": -0.0})
    assert bias["criterion"]["value"] > 1 and bias["criterion"]["interval"][0] > 0
    assert bias["fpr"]["interval"][0] < -0.5 < bias["fpr"]["interval"][1] < 0
    alike = write(tmp_path / "c", rows[0])
    (same,) = compared(tmp_path / "a", alike)["benchmarks"]["pope"]["comparisons"]
    assert same["yes_bias"]["fpr"] == {"value": 0.0, "interval": None, "count": 60}
    assert same["p"] == 1 and same["difference"]["value"] == 0 and same["difference"]["interval"][0] < 0


def test_splits_are_compared_too(tmp_path):
    def rows(marks):
        return [one | {"meta": {**one["meta"], "split": "random" if n < 6 else "popular"}}
                for n, one in enumerate(rows_of(marks))]  # fmt: skip

    part = compared(write(tmp_path / "a", rows("++++++++--")), write(tmp_path / "b", rows("+++---++++")))
    splits = part["benchmarks"]["pope"]["splits"]
    assert {name: one["questions"] for name, one in splits.items()} == {"random": 6, "popular": 4}
    assert splits["random"]["comparisons"][0]["difference"]["value"] == -0.5
    assert splits["popular"]["comparisons"][0]["difference"]["value"] == 0.5
    assert splits["popular"]["models"][1]["accuracy"]["value"] == 1
    assert "p_holm" not in splits["random"]["comparisons"][0]


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_several_tests_are_corrected_together_and_blind_answers_are_a_benchmark_of_their_own(tmp_path):
    for name, marks, blind in (
        ("a", "+" * 30, "+-" * 5),
        ("b", "+" * 20 + "-" * 10, "-+" * 5),
        ("c", "+" * 30, "++" * 5),
    ):
        write(tmp_path / name, rows_of(marks))
        write(tmp_path / name, rows_of(blind), "predictions.blind.jsonl")
    result = compared(*(tmp_path / name for name in "abc"))
    assert list(result["benchmarks"]) == ["pope", "pope (blind)"] and result["tests"] == 4
    p = [one["p"] for part in result["benchmarks"].values() for one in part["comparisons"]]
    assert p == pytest.approx([2 / 2**10, 1, 1, 2 / 2**5])
    corrected = [one["p_holm"] for part in result["benchmarks"].values() for one in part["comparisons"]]
    assert corrected == pytest.approx([8 / 2**10, 1, 1, 6 / 2**5])
    assert "over the 4 comparisons" in show(result)


def test_order_of_lines_changes_nothing(tmp_path):
    marks = ["".join(random.Random(seed).choice("+-?") for _ in range(120)) for seed in (1, 2)]
    names = [write(tmp_path / name, rows_of(one, 40)) for name, one in zip("ab", marks, strict=True)]
    before = json.dumps(compared(*names))
    for seed, (name, one) in enumerate(zip("ab", marks, strict=True)):
        rows = rows_of(one, 40)
        random.Random(seed).shuffle(rows)
        write(tmp_path / name, rows)
    assert json.dumps(compared(*names)) == before


def test_what_only_some_have_is_counted_and_said(tmp_path):
    first, second = rows_of("++-++"), rows_of("+++++--")
    other = [{**row(n, "Yes"), "benchmark": "some-judge-set"} for n in range(3)]
    result = compared(write(tmp_path / "a", first[1:]), write(tmp_path / "b", second + other))
    assert result["benchmarks"]["pope"]["questions"] == 4
    assert result["notes"] == [
        "some-judge-set is not compared: only b has answers to it",
        "pope: 4 questions that all have; left out, because another has no answer: 3 of b",
    ]


def test_a_judge_set_is_not_scored_and_stored_scores_are_shown(tmp_path, monkeypatch):
    judged = replace(BENCHMARKS["pope"], name="llava-x", title="LLaVA-X", scored="a judge is needed")
    monkeypatch.setitem(BENCHMARKS, "llava-x", judged)
    rows = [{**row(n, "It is."), "benchmark": "llava-x", "answer": None} for n in range(3)]
    own = [{**one, "benchmark": "own"} for one in rows]
    names = [write(tmp_path / name, rows + own) for name in "ab"]
    stored = {
        "scored": True,
        "headline": "relative",
        "questions": 3,
        "figures": {"relative": {"value": 72.8, "interval": [60, 80], "count": 3}},
    }
    (names[1] / "scores.json").write_text(json.dumps({"llava-x": {**stored, "judge": {"name": "gpt-4"}}}))
    result = compared(*names)
    part = result["benchmarks"]["llava-x"]
    assert not part["scored"] and part["why"] == "a judge is needed" and part["comparisons"] == []
    assert [model["stored"] and model["stored"]["value"] for model in part["models"]] == [None, 72.8]
    (names[0] / "scores.json").write_text(json.dumps({"llava-x": stored}))
    assert compared(*names)["notes"] == [
        "llava-x: stored scores of several judges do not compare: a by an unnamed one, b by gpt-4"
    ]
    assert "no benchmark of this name" in result["benchmarks"]["own"]["why"] and result["tests"] == 0
    shown = show(result)
    assert shown.count("not scored: ") == 4 and "relative 72.80 [60.00, 80.00] (scores.json, 3 questions)" in shown


def test_other_settings_and_unfinished_runs_are_said(tmp_path):
    names = [write(tmp_path / name, rows_of("+-")) for name in "ab"]
    for name, tokens in zip(names, (16, 32), strict=True):
        (name / "evaluation.json").write_text(
            json.dumps(
                {
                    "settings": {"max_new_tokens": tokens, "seed": 0, "batch_size": tokens},
                    "model": {"given": f"runs/{tokens}"},
                    "questions": {"pope": {"sha256": str(tokens)}},
                }
            )
        )
    write(names[1], rows_of("+"), "predictions.partial.jsonl")
    result = compared(*names)
    assert [folder["model"] for folder in result["folders"]] == ["runs/16", "runs/32"]
    unfinished, other, files = result["notes"]
    assert files.startswith("pope: questions and truths are the same, but not its files")
    assert unfinished.startswith("b is not finished: what predictions.partial.jsonl holds is not compared")
    assert other == "generated with another max_new_tokens: a 16, b 32"
