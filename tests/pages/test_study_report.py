"""The page of a study: what stands in its table and where its whiskers are drawn."""

import re

from tests.pages.test_run_report import ATTACK, Parser
from vapr.pages.chart import Series, line_chart
from vapr.pages.study_report import table, write_study_report


def figure(value, low=None, high=None) -> dict:
    return {"value": value, "interval": None if low is None else [low, high], "count": 40}


def figures(accuracy, yes_rate=None, **more) -> dict:
    nothing = figure(None)
    return {
        "accuracy": accuracy, "yes_rate": yes_rate or nothing, "gold_yes_rate": figure(0.5) if yes_rate else nothing,
        "unparsed_rate": figure(0.025), **more,
    }  # fmt: skip


def group(data: str, size: int, values: dict) -> dict:
    return {"data": data, "loss": "dpo", "size": size, "seeds": [0, 1], "figures": values}


RESULT = {
    "parsing": "strict",
    "cells": [
        {"data": data, "loss": "dpo", "size": size, "seed": seed, "state": "trained", "why": None}
        for data in ("edited", ATTACK) for size in (250, 500) for seed in (0, 1)
    ],
    "measures": {
        "pope": {
            "questions": 40,
            "base": figures(figure(0.6, 0.5, 0.7), figure(0.8, 0.7, 0.9)),
            "groups": [
                group("edited", 250, figures(figure(0.65, 0.55, 0.75), figure(0.7, 0.6, 0.8), difference=figure(0.05, -0.01, 0.11))),
                group("edited", 500, figures(figure(0.75, 0.65, 0.85), figure(0.55, 0.45, 0.65), difference=figure(0.15, 0.05, 0.25))),
                group(ATTACK, 250, figures(figure(0.5, 0.4, 0.6), figure(0.9, 0.8, 1.0), difference=figure(-0.1, -0.2, -0.01))),
            ],
        }
    },
}  # fmt: skip


def test_the_table_says_what_was_measured():
    heads, rows = table(RESULT["measures"]["pope"])
    assert heads == [
        "data",
        "loss",
        "pairs",
        "runs",
        "accuracy",
        "less the base's",
        "says yes",
        "truth is yes",
        "unparsed",
    ]
    assert rows[0] == ["base", "–", "0", "–", "60.0% [50.0, 70.0]", "–", "80.0% [70.0, 90.0]", "50.0%", "2.5%"]
    assert rows[1][5] == "+5.0 [−1.0, +11.0] not told apart"
    assert rows[2][5] == "+15.0 [+5.0, +25.0]"
    assert rows[3][5] == "−10.0 [−20.0, −1.0]"
    heads, rows = table({"base": figures(figure(0.6)), "groups": []})
    assert heads == ["data", "loss", "pairs", "runs", "accuracy", "unparsed"]


def test_the_page(tmp_path):
    cells = [*RESULT["cells"][:-1], {**RESULT["cells"][-1], "state": "failed", "why": ATTACK}]
    write_study_report(tmp_path / "study.html", {**RESULT, "cells": cells})
    page = (tmp_path / "study.html").read_text()
    parsed = Parser(page)
    assert "script" not in parsed.tags and not re.search(r"https?:|url\(|@import|<link|<script", page)
    assert "8 runs: 7 trained, 1 failed." in parsed.text and f"{ATTACK} dpo 500 seed 1 failed: {ATTACK}" in parsed.text
    assert "what differs from seed to seed" in " ".join(parsed.text.split())
    assert page.count('class="spread"') == 2 * (2 + 3)  # two charts; each line begins at the base


def test_one_seed_is_said(tmp_path):
    cells = [cell for cell in RESULT["cells"] if cell["seed"] == 0]
    write_study_report(tmp_path / "study.html", {**RESULT, "cells": cells})
    assert "There is one seed" in (tmp_path / "study.html").read_text()


def test_whiskers_end_where_the_interval_does():
    line = Series("a", "after", [(0.0, 0.5), (100.0, 0.6)], intervals=[(0.25, 0.75), None])
    svg = str(line_chart([line], label="", include=(0.0, 1.0), axis="pairs"))
    [place] = re.findall(r'class="spread" d="M([\d.]+) ([\d.]+)V([\d.]+)', svg)
    ticks = {text: float(y) for y, text in re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', svg)}
    height = (ticks["0"] - ticks["1.0"]) if "1.0" in ticks else ticks["0"] - ticks["1.00"]
    bottom = ticks["0"] - 4  # labels stand 4 below their line
    assert [float(y) for y in place[1:]] == [round(bottom - 0.25 * height, 1), round(bottom - 0.75 * height, 1)]
    assert svg.count('class="mark"') == 2 and ">pairs</text>" in svg


def test_an_interval_beyond_the_points_fits_the_chart():
    line = Series("a", "after", [(0.0, 0.5), (100.0, 0.5)], intervals=[(0.1, 0.9), (0.4, 0.6)])
    svg = str(line_chart([line], label=""))
    ends = [float(y) for pair in re.findall(r'class="spread" d="M[\d.]+ ([\d.]+)V([\d.]+)', svg) for y in pair]
    assert min(ends) >= 10 and max(ends) <= 160
