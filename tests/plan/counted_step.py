"""A real training step under PyTorch's counter of FLOPs, against what is predicted of it."""

import dataclasses
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from vapr.batches.loader import open_loaders
from vapr.config import PackingConfig
from vapr.model.joint_layers import part
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
from vapr_kernels import matmul


@mock.patch.object(matmul, "_onednn", lambda: None)  # which some CPUs give more rows than there are
def assert_counted(config, lora, train, checkpointing, *, kernels=False, module_by_module=False):
    """Run a step of several packs twice, with the reference's log-probs computed and found; count each."""
    policy_config = dataclasses.replace(
        config.policy, lora=lora, train=train, checkpointing=checkpointing
    )  # fmt: skip
    config = dataclasses.replace(config, policy=policy_config, packing=PackingConfig(max_tokens=400))
    shapes = read_shapes(config.policy)
    with open_loaders(config, say=lambda line: None) as loaders:
        policy = load_policy(config.policy, torch.device("cpu"))
        if module_by_module:
            part(policy.decoder.layers)
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
                        shapes,
                        pack,
                        checkpointing=checkpointing,
                        reference=with_reference,
                        cached_features=False,
                        kernels=kernels,
                        module_by_module=module_by_module,
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
