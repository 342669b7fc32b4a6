"""Choose how the processes of a run train together, by ``parallel.engine``."""

import dataclasses
from typing import Literal

import torch

from vapr.config import Config
from vapr.errors import UserError
from vapr.model.policy import Policy
from vapr.training.engine import Engine
from vapr.training.engine_deepspeed import AnyEngine, DeepSpeedEngine
from vapr.training.ranks import Ranks

ZeroStage = Literal[1, 2, 3]

FROZEN_SHARE = 0.6
"""Share of a GPU's memory that frozen weights may take, so that activations and the adapters' state fit beside them."""


def make_engine(config: Config, policy: Policy, num_steps: int, ranks: Ranks) -> tuple[Policy, AnyEngine]:
    """Make the engine that ``parallel`` asks for, and say why where it leaves the choice open.

    Every rank calls it.

    Returns:
        The policy as it is to be used from now on, and the engine.

    Raises:
        UserError: if deepspeed is not installed, or something of the config does not go with it.
    """
    kind, zero, why = choose_engine(config, policy, ranks)
    if why:
        print(f"engine     {why}")
    if kind == "all-reduce":
        return policy, ranks.agree(lambda: Engine(policy, config.optim, num_steps, ranks))
    parallel = dataclasses.replace(config.parallel, engine="deepspeed", zero=zero)
    config = dataclasses.replace(config, parallel=parallel)
    ranks.agree(lambda: check_deepspeed(config))
    engine = DeepSpeedEngine(config, policy, num_steps, ranks)
    return engine.policy, engine


def choose_engine(config: Config, policy: Policy, ranks: Ranks) -> tuple[str, ZeroStage, str]:
    """Return the engine's name, the stage of ZeRO, and what decided where ``parallel.engine`` is ``auto``."""
    kind, zero = config.parallel.engine, config.parallel.zero
    if kind != "auto":
        return kind, zero, ""
    if ranks.size == 1:
        return "all-reduce", zero, ""
    if policy.device.type == "cpu":
        return "all-reduce", zero, "auto: all-reduce, because host memory holds the whole model"
    frozen = sum(weight.nbytes for weight in policy.base.parameters() if not weight.requires_grad) / 2**30
    memory = torch.cuda.get_device_properties(policy.device).total_memory / 2**30
    fits = min(ranks.gather([memory])[:, 0]) * FROZEN_SHARE >= frozen
    beside = f"frozen weights take {frozen:.1f} GiB of each GPU's {memory:.1f}"
    if policy.adapters is None:
        return "deepspeed", zero, f"auto: DeepSpeed ZeRO {zero}, because all weights are trained"
    if fits:
        return "all-reduce", zero, f"auto: all-reduce, because {beside}"
    return "deepspeed", 3, f"auto: DeepSpeed ZeRO 3, because {beside}"


def check_deepspeed(config: Config) -> None:
    """Raise UserError for what DeepSpeed cannot do."""
    zero = config.parallel.zero
    if config.optim.kind != "adamw":
        raise UserError(
            f"optim.kind: {config.optim.kind} does not go with parallel.engine: deepspeed, whose AdamW is in "
            "float32; leave it out, or set parallel.engine: all-reduce"
        )
    if zero == 3 and config.probe.every is not None:
        raise UserError(
            "probe.every: a probe runs on one rank, which holds a part of each weight under parallel.zero: 3; set "
            "zero: 2, or leave the probe out and run vapr eval on checkpoints"
        )
    if zero == 3 and config.policy.base_weights != "bfloat16":
        raise UserError(
            f"policy.base_weights: {config.policy.base_weights} cannot be spread by parallel.zero: 3; set zero: 2, or "
            "parallel.engine: all-reduce"
        )
