"""Several processes train as one does: the same gradients, the same run folder, and one line where something is wrong."""

from pathlib import Path

import pytest

from tests import several_ranks
from tests.runs import losses, metrics
from vapr.training import checkpoint, trainer


def weights_of(config):
    return checkpoint.SavedTensors(checkpoint.list_checkpoints(Path(config.run_dir))[-1], "weights")


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_several_processes_train_as_one(make_config, tmp_path, size, lora):
    """An epoch of 24 pairs in steps of 5: the last rank gets fewer, and in the last step of four, three ranks one or two."""
    optim = {"lr": 1e-3, "pairs_per_step": 5, "epochs": 2, "eps": 1e-5}
    one, several = (
        make_config(name, lora=lora, optim=optim, packing={"max_tokens": 1200}) for name in ("one", "several")
    )
    trainer.train(one)
    ranks = several_ranks.run(
        size, tmp_path / "out", several_ranks.vapr, "train", several_ranks.config_file(several, tmp_path / "run.yaml")
    )
    assert [rank.code for rank in ranks] == [0] * size, ranks[0].err + ranks[1].err
    assert losses(several) == pytest.approx(losses(one), rel=2e-6, abs=2e-6)
    for key in ("grad_norm", "rewards/margins", "pairs", "logps/chosen"):
        assert [row[key] for row in metrics(several)] == pytest.approx(
            [row[key] for row in metrics(one)], rel=1e-5, abs=1e-5
        )
    expected, found = weights_of(one), weights_of(several)
    assert set(expected) == set(found)
    for name in expected:
        assert (found[name] - expected[name]).abs().max() <= 2e-6 * expected[name].abs().max().clamp(min=1), name
    assert ranks[1].out == "" and ranks[1].err == ""
    assert f"processes  {size}" in ranks[0].out
