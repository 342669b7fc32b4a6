"""Finished demos as rows and tables."""

from bench.demo import COMPARED, mean_text, row_of, tables


def result(seed: int, after: float) -> dict:
    figure = {"value": 0.7, "interval": [0.6, 0.8]}
    policies = {
        name: {
            "accuracy": {"overall": {"value": value}, "side": {"value": 0.5}},
            "yes": {"yes_rate": {"value": 0.9}, "gold_yes_rate": {"value": 0.5}},
            "garbled": {"answers": 2},
        }
        for name, value in (("sft", 0.7), ("dpo", after))
    }
    return {
        "seed": seed, "answers": [{}] * 10, "policies": policies, "editing": {"accepted": 5}, "seconds": {"total": 99.6},
        "compared": {name: {"overall": {"difference": figure}} for name in COMPARED},
    }  # fmt: skip


def test_rows_and_tables_hold_the_figures_of_every_seed():
    rows = [row_of(result(0, 0.8), "nothing"), row_of(result(1, 0.9), "nothing")]
    assert rows[0]["policies"]["dpo"] == {
        "accuracy": {"overall": 80.0, "side": 50.0}, "yes": 90.0, "truth": 50.0, "garbled": 2,
    }  # fmt: skip
    assert rows[1]["points"]["sft -> dpo"] == [70.0, 60.0, 80.0] and rows[0]["seconds"] == 100
    text = tables(rows)
    # Two values 10 apart: Student's t with one degree of freedom, 12.706 x 7.071 / sqrt(2), cut off at 100.
    assert mean_text([80.0, 90.0], high=200) == "85.0 [21.5, 148.5]"
    assert "| dpo | 85.0 [21.5, 100.0] | 50.0 [50.0, 50.0] | 90.0 [90.0, 90.0] | 40.0 [40.0, 40.0] | 4 |" in text
    assert text.count("| 0 |") == 1 and "+70.0 [60.0, 80.0]" in text
