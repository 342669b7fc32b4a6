"""Choose how the processes of a run train together, by ``parallel.engine``."""

import dataclasses

import torch

from vapr.config import Config
from vapr.model.policy import Policy
from vapr.plan.engines import ZeroStage, check_deepspeed, engine_of
from vapr.training.engine import Engine
from vapr.training.engine_deepspeed import AnyEngine, DeepSpeedEngine
from vapr.training.ranks import Ranks


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
    ranks.agree(lambda: check_deepspeed(config, zero))
    parallel = dataclasses.replace(config.parallel, engine="deepspeed", zero=zero)
    config = dataclasses.replace(config, parallel=parallel)
    engine = DeepSpeedEngine(config, policy, num_steps, ranks)
    return engine.policy, engine


def choose_engine(config: Config, policy: Policy, ranks: Ranks) -> tuple[str, ZeroStage, str]:
    """Return the engine's name, the stage of ZeRO, and what decided where ``parallel.engine`` is ``auto``."""
    kind, zero = config.parallel.engine, config.parallel.zero
    if kind != "auto" or ranks.size == 1:
        return engine_of(config, ranks.size, 0, 0)
    if policy.device.type == "cpu":
        return "all-reduce", zero, "auto: all-reduce, because host memory holds the whole model"
    frozen = sum(weight.nbytes for weight in policy.base.parameters() if not weight.requires_grad)
    frozen += sum(buffer.nbytes for buffer in policy.base.buffers())  # a quantised base is stored in them
    memory = torch.cuda.get_device_properties(policy.device).total_memory / 2**30
    smallest = min(ranks.gather([memory])[:, 0])
    return engine_of(config, ranks.size, frozen / 2**30, smallest)
