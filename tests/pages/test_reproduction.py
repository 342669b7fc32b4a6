"""The page of scripts/reproduce.sh: figures worked out by hand, what is missing, and what the paper says."""

import pytest

from vapr.pages.reproduction import Reproduction, write_reproduction_page


def figure(value, interval=None) -> dict:
    return {"value": value, "interval": interval}


def measured(title: str, before: float, now: float, interval=None, yes=(None, None, None), blind=False) -> dict:
    models = [
        {"name": name, "accuracy": figure(share, [share - 0.02, share + 0.02]), "yes_rate": figure(said), "gold_yes_rate": figure(yes[2]), "unparsed_rate": figure(0.0)}
        for name, share, said in (("base", before, yes[0]), ("aligned", now, yes[1]))
    ]  # fmt: skip
    difference = figure(now - before, interval)
    return {"title": title, "blind": blind, "scored": True, "questions": 1200, "models": models, "comparisons": [{"difference": difference}]}  # fmt: skip


COMPARISON = {
    "policy": "strict",
    "benchmarks": {
        "pope": measured("POPE", 0.84, 0.87, [0.01, 0.05], yes=(0.61, 0.52, 0.5)),
        "pope (blind)": measured("POPE, without pictures", 0.5, 0.9, blind=True),
        "mmstar": measured("MMStar <b>", 0.35, 0.34, [-0.02, 0.01]),
        "mmhal": {"title": "MMHal", "blind": False, "scored": False, "why": "it needs a judge"},
    },
}


def write(tmp_path, **changes) -> tuple[str, str]:
    """The headline and the page."""
    read = Reproduction(**{
        "name": "qwen2_vl_7b",
        "model": "Qwen/Qwen2-VL-7B-Instruct",
        "family": "qwen2_vl",
        "config": {
            "policy": {"model": "Qwen/Qwen2-VL-7B-Instruct", "lora": {"rank": 128}},
            "loss": [{"kind": "sigmoid", "beta": 0.1, "weight": 1.0}],
            "optim": {"lr": 5e-6, "pairs_per_step": 64, "epochs": 1, "max_steps": None},
        },
        "metrics": [
            {"step": step, "loss": 0.6, "rewards/accuracies": step / 20, "rewards/margins": 0.5, "pairs_per_second": 20.0 + step, "peak_memory_mib": 1024.0 * step, "tokens": 100, "tokens_saved": 100}
            for step in range(1, 21)
        ],
        "ledger": {
            "accepted": 29_000, "editor": {"name": "Qwen/Qwen2.5-32B-Instruct"}, "turns": {"done": 40_000},
            "categories": {"count": {"accepted": 29_000, "turns": 40_000}, "text": {"accepted": 0, "turns": 0}},
        },
        "audit": {"sets": {"pairs": {"gates": [{"name": "surface probe", "status": "fail", "value": 61.0, "interval": [58.3, 63.6], "why": "style gives it away"}]}}},
        "comparison": COMPARISON,
        "known": ["mmhal", "mmstar", "mmmu", "pope"],
        "seconds": {"edit": 7200.0, "train": 90.0},
        "links": [("the training", "aligned/report.html")],
        **changes,
    })  # fmt: skip
    page = tmp_path / "reproduction.html"
    return write_reproduction_page(page, read), page.read_text(encoding="utf-8")


def test_the_measured_gain_stands_beside_the_papers(tmp_path):
    """(3 - 1) / 2 points: what was asked without pictures, and what no judge has seen, is no part of the mean."""
    headline, page = write(tmp_path)
    assert headline == "qwen2_vl_7b: +1.0 points in accuracy on 2 benchmarks"
    assert "+4.0 % for Qwen2-VL" in page and "+1.0 points in accuracy, mean of pope, mmstar" in page
    assert "+3.0 [+1.0, +5.0]<" in page and "−1.0 [−2.0, +1.0] not told apart" in page
    assert "POPE 61.0% → 52.0% (true: 50.0%)" in page
    assert "without pictures" not in page and "MMStar &lt;b&gt;" in page
    assert "Not measured: mmhal (it needs a judge), mmmu." in page


def test_pairs_gates_and_the_run_are_told(tmp_path):
    _, page = write(tmp_path)
    for said in (
        "29,000 edited by Qwen/Qwen2.5-32B-Instruct", "it is what was used", "61.0 % [58.3, 63.6]", "style gives it away",
        "20 of 64 pairs; 50% of the tokens", "30.5 pairs a second", "20.0 GiB", "2.0 hours", "90 s",
        "97.5%",  # of the last tenth of the steps: 19 / 20 and 20 / 20
    ):  # fmt: skip
        assert said in page, said
    assert ">text<" not in page  # a category without answers


@pytest.mark.parametrize(("family", "stated"), [("llava", "+6.5 %"), ("qwen2_5_vl", "+1.5 %")])
def test_without_benchmarks_nothing_is_claimed(tmp_path, family, stated):
    headline, page = write(tmp_path, comparison=None, audit=None, family=family)
    assert "nothing was measured" in headline
    assert stated in page and page.count("not measured") >= 2
    assert "Not measured: mmhal, mmstar, mmmu, pope." in page
