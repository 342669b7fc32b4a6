"""policy.checkpointing: auto, decided before a run begins."""

import dataclasses
from collections.abc import Callable

import torch

from vapr.config import LEVELS, Checkpointing, Config
from vapr.model.policy import Policy, load_policy
from vapr.plan.gpus import GIB, gpu_here
from vapr.plan.needs import Needs, least_checkpointing
from vapr.plan.packs import read_packs
from vapr.plan.plan import variant_of
from vapr.plan.shapes import read_shapes

FEW_ROWS = 256
"""Rows that are read to see how pairs fill packs."""


def resolve(config: Config, device: torch.device, world_size: int = 1) -> tuple[Config, str | None]:
    """Put a level in the place of ``checkpointing: auto``: the first of none, attention, mlp and full that fits.

    Args:
        config: the run's.
        device: where it trains; on a CPU nothing is computed again.
        world_size: GPUs that train together.

    Returns:
        The config, and a line that says what was chosen and why; None where there was nothing to choose.

    Raises:
        UserError: for a mistake in config, data or model.
    """
    if config.policy.checkpointing != "auto":
        return config, None
    card = gpu_here() if device.type == "cuda" else None
    if card is None:
        return _with(config, "none"), f"{'memory':<10} checkpointing: auto is none on a CPU"
    needs = Needs(config, read_shapes(config.policy), read_packs(config, FEW_ROWS), config.kernels == "auto")
    variant, gpu_bytes = variant_of(config, needs, world_size, card), int(card.gib * GIB)
    chosen = least_checkpointing(needs, variant, gpu_bytes, card.usable_gib * GIB)
    tried = LEVELS[: LEVELS.index(chosen.checkpointing) + 1]
    peaks = {
        level: sum(needs.peak(dataclasses.replace(variant, checkpointing=level), gpu_bytes).values()) for level in tried
    }
    predicted = ", ".join(f"{level} {peak / GIB:.1f}" for level, peak in peaks.items())
    return _with(config, chosen.checkpointing), (
        f"{'memory':<10} checkpointing: auto is {chosen.checkpointing}: predicted peak in GiB: {predicted}; "
        f"{card.usable_gib:.1f} can be used here"
    )


def load_policy_to_train(config: Config, world_size: int, say: Callable[[str], None] = print) -> Policy:
    """Load the policy, and decide first what its backward pass computes again, if that is left to vapr.

    By that level scores are computed, too, with gradients and without.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    resolved, line = resolve(config, device, world_size)
    if line is not None:
        say(line)
    return load_policy(resolved.policy, kernels=config.kernels)


def _with(config: Config, level: Checkpointing) -> Config:
    return dataclasses.replace(config, policy=dataclasses.replace(config.policy, checkpointing=level))
