"""policy.gradient_checkpointing: auto, decided before a run begins."""

import dataclasses

import torch

from vapr.config import Config
from vapr.plan.gpus import GIB, gpu_here
from vapr.plan.needs import Needs
from vapr.plan.packs import read_packs
from vapr.plan.plan import variant_of
from vapr.plan.shapes import read_shapes

FEW_ROWS = 256
"""Rows that are read to see how pairs fill packs."""


def resolve(config: Config, device: torch.device, world_size: int = 1) -> tuple[Config, str | None]:
    """Put true or false in the place of ``gradient_checkpointing: auto``: true where a step does not fit without it.

    Args:
        config: the run's.
        device: where it trains; on a CPU nothing is computed again.
        world_size: GPUs that train together.

    Returns:
        The config, and a line that says what was chosen and why; None where there was nothing to choose.

    Raises:
        UserError: for a mistake in config, data or model.
    """
    if config.policy.gradient_checkpointing != "auto":
        return config, None
    card = gpu_here() if device.type == "cuda" else None
    if card is None:
        return _with(config, False), f"{'memory':<10} gradient_checkpointing: auto is false on a CPU"
    needs = Needs(config, read_shapes(config.policy), read_packs(config, FEW_ROWS), config.kernels == "auto")
    variant = variant_of(config, needs, world_size, card)
    peak = sum(needs.peak(variant, int(card.gib * GIB)).values()) / GIB
    fits = peak <= card.usable_gib
    return _with(config, not fits), (
        f"{'memory':<10} gradient_checkpointing: auto is {str(not fits).lower()}: without it a step is predicted to "
        f"take {peak:.1f} GiB, and {card.usable_gib:.1f} GiB can be used here"
    )


def _with(config: Config, recompute: bool) -> Config:
    return dataclasses.replace(config, policy=dataclasses.replace(config.policy, gradient_checkpointing=recompute))
