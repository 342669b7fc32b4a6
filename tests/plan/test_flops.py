"""FLOPs by formula against PyTorch's counter over a real training step, to the last one."""

import pytest

from tests.conftest import EVERY_FAMILY, FAMILIES
from tests.plan.counted_step import assert_counted
from vapr.config import LEVELS, LoraConfig, TrainConfig
from vapr.model import patches
from vapr.training import step
from vapr_kernels import naive

ALL = LoraConfig(rank=4, alpha=8)
SOME = LoraConfig(rank=4, alpha=8, targets=["q_proj", "up_proj"])
EVERYTHING = TrainConfig(vision_tower=True, projector=True)
PROJECTOR = TrainConfig(language_model=False, projector=True)
TUNINGS = {
    "lora": (ALL, TrainConfig()),
    "lora on some layers": (SOME, TrainConfig()),
    "lora on everything": (ALL, EVERYTHING),
    "full": (None, TrainConfig()),
    "full with tower": (None, EVERYTHING),
    "projector": (None, PROJECTOR),
    "lora on the projector": (ALL, PROJECTOR),
}


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("checkpointing", LEVELS)
def test_a_step_takes_what_is_predicted(make_config, family, tuning, checkpointing):
    if family == "qwen2_vl" and tuning not in ("lora", "full with tower"):
        pytest.skip("two tunings of Qwen2-VL are enough, the others are covered by Qwen2.5-VL")
    assert_counted(make_config(family=family), *TUNINGS[tuning], checkpointing)


@pytest.mark.parametrize("family", sorted({*EVERY_FAMILY} - {*FAMILIES}))
@pytest.mark.parametrize(("tuning", "checkpointing"), [("lora on everything", "full"), ("full with tower", "none")])
def test_so_it_does_in_every_family(make_config, family, tuning, checkpointing):
    assert_counted(make_config(family=family), *TUNINGS[tuning], checkpointing)


@pytest.mark.parametrize("tuning", ["lora", "lora on everything", "full", "full with tower"])
@pytest.mark.parametrize("checkpointing", LEVELS)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl_moe"])
def test_so_it_does_where_attention_is_one_function(make_config, family, tuning, checkpointing, monkeypatch):
    """As on a GPU, by PyTorch's operations."""
    monkeypatch.setattr(patches, "kernels_run", lambda device, dtype: True)
    monkeypatch.setattr(step, "preference_loss", naive.preference_loss)
    assert_counted(make_config(family=family), *TUNINGS[tuning], checkpointing, kernels=True)


@pytest.mark.parametrize("tuning", ["lora", "lora on some layers", "full"])
@pytest.mark.parametrize("checkpointing", LEVELS)
def test_so_it_does_where_layers_run_module_by_module(make_config, tuning, checkpointing):
    """As under ZeRO 3."""
    assert_counted(make_config(family="qwen2_5_vl"), *TUNINGS[tuning], checkpointing, module_by_module=True)
