"""FLOPs by formula against PyTorch's counter over a real training step, to the last one."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import EVERY_FAMILY, FAMILIES
from vapr.batches.loader import open_loaders
from vapr.config import LEVELS, LoraConfig, PackingConfig, TrainConfig
from vapr.model.policy import load_policy
from vapr.plan.counted import COUNTED
from vapr.plan.flops import Flops, pack_flops, useful_flops
from vapr.plan.packs import PackSizes
from vapr.plan.shapes import read_shapes
from vapr.training import metrics
from vapr.training.engine import Engine
from vapr.training.fill_caches import open_reference
from vapr.training.out_of_memory import FittingPacks
from vapr.training.ranks import Ranks
from vapr.training.step import train_step

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
    compare(make_config, family, tuning, checkpointing)


@pytest.mark.parametrize("family", sorted({*EVERY_FAMILY} - {*FAMILIES}))
@pytest.mark.parametrize(("tuning", "checkpointing"), [("lora on everything", "full"), ("full with tower", "none")])
def test_so_it_does_in_every_family(make_config, family, tuning, checkpointing):
    compare(make_config, family, tuning, checkpointing)


def compare(make_config, family, tuning, checkpointing):
    lora, train = TUNINGS[tuning]
    config = make_config(family=family, packing={"max_tokens": 400})
    policy_config = dataclasses.replace(
        config.policy, lora=lora, train=train, checkpointing=checkpointing
    )  # fmt: skip
    config = dataclasses.replace(config, policy=policy_config, packing=PackingConfig(max_tokens=400))
    shapes = read_shapes(config.policy)
    with open_loaders(config, say=lambda line: None) as loaders:
        policy = load_policy(config.policy, torch.device("cpu"))
        reference = open_reference(config, policy, None, [loaders["train"]], Ranks(), FittingPacks())
        engine = Engine(policy, config.optim, 3)
        (step,) = loaders["train"].steps(0, 1)
        packs = [PackSizes.of(batch) for batch in step.batches]
        assert len(packs) > 1
        for _ in ("reference computed", "reference found"):
            before = reference.misses
            with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
                train_step(policy, engine, reference, step, config.loss, None)
            with_reference = reference.misses > before
            predicted = sum(
                (
                    pack_flops(
                        shapes, pack, checkpointing=checkpointing, reference=with_reference, cached_features=False
                    )
                    for pack in packs
                ),
                Flops(),
            )
            assert predicted.total == counter.get_total_flops()
    assert useful_flops(shapes, packs) == metrics.UsefulFlops(policy).of(step)
    assert sum(weight.numel for weight in shapes.weights) == sum(
        weight.numel() for name, weight in policy.base.named_parameters() if "lora_" not in name
    )
    assert shapes.num_trained == sum(weight.numel() for weight in policy.trained_parameters().values())
