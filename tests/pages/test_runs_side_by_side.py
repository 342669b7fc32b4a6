"""vapr compare: held-out figures of several runs side by side, in the terminal, as JSON and as a page."""

import json
import math
import re

import pytest

from tests.pages.test_run_report import ATTACK, CONFIG, Parser, cells, chromium, make_run, needs_chromium, row
from tests.test_cli import assert_one_line_error, vapr
from vapr.errors import UserError
from vapr.pages.chart import MINUS
from vapr.pages.compare import write_compare_page
from vapr.pages.runs_side_by_side import compare, read_runs, show


def scored(step: int, loss: float | None, accuracy: float, chosen: float = 0.0) -> dict:
    return {
        "step": step,
        "eval/loss": loss,
        "eval/rewards/accuracies": accuracy,
        "eval/rewards/margins": 1.0,
        "eval/rewards/chosen": chosen,
        "eval/rewards/rejected": -0.5,
    }


@pytest.fixture
def runs(tmp_path):
    """Run ``a`` is best in the middle and has beta 0.1; ``b`` is best at its end and has beta 0.5."""
    first = [row(1), scored(1, 0.6, 0.5), row(2), scored(2, 0.5, 0.75, 0.2), row(3), scored(3, 0.9, 0.7, -0.2)]
    second = [row(1), scored(1, 0.6, 0.5), row(2), scored(2, 0.4, 0.8, -0.2)]
    config = {**CONFIG, "run_dir": "runs/b", "loss": [{"kind": "sigmoid", "beta": 0.5}], "seed": 1}
    return [make_run(tmp_path / "a", first), make_run(tmp_path / "b", second, config=config)]


def test_last_and_best_stand_side_by_side(runs, tmp_path, capsys):
    opened = read_runs(runs)
    result = compare(opened)
    assert [(run["name"], run["last"]["step"], run["best"]["step"]) for run in result["runs"]] == [
        ("a", 3, 2),
        ("b", 2, 2),
    ]
    assert result["differences"] == {"loss.0.beta": [0.1, 0.5], "seed": [None, 1]}
    write_compare_page(tmp_path / "page.html", opened, result)
    page = (tmp_path / "page.html").read_text()
    assert cells(page) == [
        [
            "run",
            "step",
            "accuracy",
            "margin",
            "loss",
            "chosen log-prob minus reference",
            "rejected log-prob minus reference",
        ],
        ["a", "3 (last)", "70.0%", "1", "0.9", f"{MINUS}2", f"{MINUS}5"],
        ["a", "2 (lowest loss)", "75.0%", "1", "0.5", "+2", f"{MINUS}5"],
        ["b", "2 (last, lowest loss)", "80.0%", "1", "0.4", f"{MINUS}0.4", f"{MINUS}1"],
    ]
    text = Parser(page).text
    assert "values of loss and margin do not compare" in text and "loss.0.beta0.10.5seednone1" in text
    charts = re.findall(r'<svg viewBox="0 0 340.*?</svg>', page)
    assert len(charts) == 5 and all(chart.count('<polyline class="mean"') == 2 for chart in charts)
    show(opened, result)
    printed = capsys.readouterr().out
    assert re.search(r"^b +2 \(last, lowest loss\) +80\.0% ", printed, re.MULTILINE)
    assert re.search(r"^seed +none +1 *$", printed, re.MULTILINE)


def test_runs_scored_on_other_pairs_are_said_not_to_compare(runs, tmp_path):
    config = {**CONFIG, "data": {"train": "a", "eval": {"path": "other.jsonl", "weight": 1.0}}}
    make_run(tmp_path / "c", [row(1), scored(1, 0.6, 0.5)], config=config)
    (note,) = compare(read_runs([runs[0], tmp_path / "c"]))["notes"]
    assert note == "The runs were not scored on the same held-out pairs (data.eval): their figures do not compare."
    assert compare(read_runs([runs[0], make_run(tmp_path / "d", [row(1), scored(1, 0.6, 0.5)])]))["notes"] == []


def test_runs_of_one_name_are_told_apart_by_their_folders(runs, tmp_path):
    other = tmp_path / "elsewhere"
    other.mkdir()
    make_run(other / "a", [row(1), scored(1, None, math.pi / 4)])
    opened = read_runs([runs[0], other / "a"])
    assert [run.name for run in opened] == [str(runs[0]), str(other / "a")]
    assert [what for what, _ in opened[1].points] == ["last"]  # a loss that was not finite is no best one


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["a"], r"a: one run alone; give two or more"),
        (["a", "b", "a"], r"a: given twice; name each run once"),
        (["a", "gone"], r"gone: no such folder; runs beside it: .*/a, .*/b"),
        (["a", "bare"], r"bare: no held-out figures; set data\.eval"),
    ],
)
def test_what_cannot_be_compared_is_said(runs, tmp_path, folders, message):
    if "bare" in folders:
        make_run(tmp_path / "bare", [row(1)])
    with pytest.raises(UserError, match=message):
        read_runs([tmp_path / folder for folder in folders])


def test_the_command(runs, tmp_path):
    ran = vapr("compare", "a", "b", "--out", "page.html", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "wrote page.html" and (tmp_path / "page.html").is_file()
    result = json.loads(vapr("compare", "a", "b", "--json", cwd=tmp_path).stdout)
    assert result["runs"][0]["best"]["eval/rewards/accuracies"] == 0.75
    assert_one_line_error(
        vapr("compare", "a", "b", "--out", "page.txt", cwd=tmp_path), "--out page.txt: the page is HTML"
    )
    assert_one_line_error(vapr("compare", "a", "none", cwd=tmp_path), "none: no such folder")


@needs_chromium
def test_a_browser_shows_the_page_without_a_complaint(runs, tmp_path):
    opened = read_runs([*runs, make_run(tmp_path / f"{ATTACK[1:7]}{'x' * 80}", [row(1), scored(1, 0.6, 0.5)])])
    write_compare_page(tmp_path / "page.html", opened, compare(opened))
    ran = chromium(tmp_path / "profile", tmp_path / "page.html", f"--screenshot={tmp_path / 'shot.png'}")
    assert [line for line in ran.stderr.splitlines() if "CONSOLE" in line] == []
    assert "script" not in Parser((tmp_path / "page.html").read_text()).tags
