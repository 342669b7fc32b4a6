"""DeepSpeed's ZeRO trains as one process does."""

from pathlib import Path

import pytest

from tests import several_ranks
from tests.runs import losses, metrics
from vapr.config import ParallelConfig
from vapr.training import checkpoint, trainer
import dataclasses


def weights_of(config):
    return checkpoint.SavedTensors(checkpoint.list_checkpoints(Path(config.run_dir))[-1], "weights")


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_zero_trains_as_one_process(make_config, tmp_path, size, lora, zero):
    optim = {"lr": 1e-3, "pairs_per_step": 5, "epochs": 2, "eps": 1e-5}
    one, several = (
        make_config(name, lora=lora, optim=optim, packing={"max_tokens": 1200}) for name in ("one", "several")
    )
    several = dataclasses.replace(several, parallel=ParallelConfig(engine="deepspeed", zero=zero, timeout=60))
    trainer.train(one)
    ranks = several_ranks.run(
        size, tmp_path / "out", several_ranks.vapr, "train", several_ranks.config_file(several, tmp_path / "run.yaml")
    )
    assert [rank.code for rank in ranks] == [0] * size, ranks[0].err + ranks[1].err
    print(ranks[0].out, ranks[1].out, ranks[1].err)
    a, b = losses(several), losses(one)
    print(max(abs(x - y) for x, y in zip(a, b)))
    x, y = ([row["grad_norm"] for row in metrics(c)] for c in (one, several))
    print("norm", max(abs(p - q) / p for p, q in zip(x, y)))
    expected, found = weights_of(one), weights_of(several)
    assert set(expected) == set(found)
    print(
        "weights",
        max(
            float((found[name] - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1))
            for name in expected
        ),
    )
