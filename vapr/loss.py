"""Preference losses by name. The formulas stand beside the kernel that fuses them, in ``vapr_kernels.losses``."""

from vapr_kernels.losses import (
    PairLogps,
    apo_down_loss,
    apo_zero_loss,
    bco_pair_loss,
    dpop_loss,
    hinge_loss,
    ipo_loss,
    orpo_loss,
    preference_losses,
    robust_loss,
    sft_loss,
    sigmoid_loss,
    simpo_loss,
)

__all__ = [
    "PairLogps",
    "apo_down_loss",
    "apo_zero_loss",
    "bco_pair_loss",
    "dpop_loss",
    "hinge_loss",
    "ipo_loss",
    "orpo_loss",
    "preference_losses",
    "robust_loss",
    "sft_loss",
    "sigmoid_loss",
    "simpo_loss",
]
