"""The arms of the generation benchmark answer alike."""

import argparse

import pytest
import torch

pytest.importorskip("trl", reason="the benchmarks' processors come from bench.arms, which needs TRL")

from bench.generation import MODELS, compare


@pytest.mark.parametrize("model", MODELS)
def test_all_arms_say_the_same(model, tmp_path):
    options = argparse.Namespace(questions=3, batch_size=2, max_new_tokens=3, rounds=1)
    rows = compare(model, tmp_path, torch.device("cpu"), options)
    assert [row["arm"] for row in rows] == ["vapr", "generate", "generate, inputs ready"]
    assert [row["same_answers"] for row in rows] == [3, 3, 3]
    assert all(row["questions_per_second"] > 0 and row["cpu_seconds_p50"] > 0 for row in rows)
    assert rows[1]["to_generate"] == rows[1]["cpu_to_generate"] == 1
