"""Which engine a run of several processes takes, and what DeepSpeed cannot do: one rule for the plan and the run."""

from typing import Literal

from vapr.config import Config
from vapr.errors import UserError

EngineKind = Literal["all-reduce", "deepspeed"]
ZeroStage = Literal[1, 2, 3]

FROZEN_SHARE = 0.6
"""Share of a GPU's memory that frozen weights may take, so that activations and the adapters' state fit beside them."""


def engine_of(
    config: Config, world_size: int, frozen_gib: float, memory_gib: float
) -> tuple[EngineKind, ZeroStage, str]:  # fmt: skip
    """Return the engine's name, the stage of ZeRO, and what decided where ``parallel.engine`` is ``auto`` on GPUs.

    Args:
        config: the run's.
        world_size: processes that train together, one for each GPU.
        frozen_gib: size of the frozen weights as they are stored, in GiB.
        memory_gib: of the smallest GPU, as PyTorch shows it.
    """
    kind, zero = config.parallel.engine, config.parallel.zero
    if kind != "auto":
        return kind, zero, ""
    if world_size == 1:
        return "all-reduce", zero, ""
    if config.policy.lora is None:
        return "deepspeed", zero, f"auto: DeepSpeed ZeRO {zero}, because all weights are trained"
    beside = f"frozen weights take {frozen_gib:.1f} GiB of each GPU's {memory_gib:.1f}"
    if memory_gib * FROZEN_SHARE >= frozen_gib:
        return "all-reduce", zero, f"auto: all-reduce, because {beside}"
    if config.policy.base_weights != "bfloat16":
        stored = f"and ZeRO 3 cannot spread weights stored as {config.policy.base_weights}"
        return "all-reduce", zero, f"auto: all-reduce, although {beside}, {stored}"
    return "deepspeed", 3, f"auto: DeepSpeed ZeRO 3, because {beside}"


def check_deepspeed(config: Config, zero: int) -> None:
    """Raise UserError for what DeepSpeed cannot do at a stage of ZeRO."""
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
