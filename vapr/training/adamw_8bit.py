"""AdamW as ``optim.kind`` asks for it: PyTorch's, or bitsandbytes' with moments in 8 bits (arXiv 2110.02861).

Moments of tensors below 4,096 numbers stay in fp32, as the library has it. Paged moments are taken from memory that the
GPU's driver moves to the host when the GPU's is full.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from vapr.config import OptimConfig
from vapr.model.quantized import import_bitsandbytes

FULL_BELOW, BLOCK = 4096, 256
"""Tensors of fewer numbers keep moments in fp32; so many numbers of the others share a scale."""
KEPT = ("step", "exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2")
"""Entries of a parameter's state that are saved; the library's tables (qmap1, qmap2) are always the same."""


def new_optimizer(groups: list[dict[str, Any]], config: OptimConfig, device: torch.device) -> torch.optim.Optimizer:
    """Make AdamW over groups of fp32 parameters.

    Raises:
        UserError: if it needs bitsandbytes, and that is not here.
    """
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    library = import_bitsandbytes(f"optim.kind: {config.kind}", "take adamw")
    paged = config.kind == "paged-adamw-8bit" and device.type == "cuda"
    if config.kind == "paged-adamw-8bit" and not paged:
        print(f"optim.kind: {device} has no memory to page moments out of; they stay where they are, in 8 bits")
    made: torch.optim.Optimizer = library.optim.AdamW8bit(groups, is_paged=paged, **options)
    return made


def update(optimizer: torch.optim.Optimizer, spoiled: Tensor) -> None:
    """Update weights and moments, or leave every byte of them as it is where ``spoiled``, on their device, is 1, not 0.

    PyTorch's AdamW reads it on the device. bitsandbytes has no such thing, but waits for the device after every
    parameter anyway, so that the host may as well look.
    """
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.found_inf = spoiled  # type: ignore[attr-defined]
        optimizer.step()
    elif not spoiled:
        optimizer.step()


def moments_bytes(optimizer: torch.optim.Optimizer, size: int) -> int:
    """Return the bytes of the moments of a parameter with so many numbers, before they are made."""
    if isinstance(optimizer, torch.optim.AdamW) or size < FULL_BELOW:
        return 8 * size
    return 2 * size + 8 * -(-size // BLOCK)


def state_tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """Return a parameter's state as tensors: fp32, bytes, and the number of steps."""
    return {key: torch.as_tensor(state[key]) for key in KEPT if key in state}


@torch.no_grad()
def restore_state(optimizer: Any, parameter: torch.nn.Parameter, saved: dict[str, Tensor]) -> None:
    """Put back what :func:`state_tensors` returned; the tensors may lie on any device.

    Raises:
        ValueError: if it was saved by another kind of AdamW.
    """
    if not isinstance(optimizer, torch.optim.AdamW):
        [(number, place, group)] = [
            (number, place, group)
            for number, group in enumerate(optimizer.param_groups)
            for place, other in enumerate(group["params"])
            if other is parameter
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.init_state(group, parameter, number, place)  # in paged memory, if it is to be there
        state = optimizer.state[parameter]
        if saved.keys() != state_tensors(state).keys():
            raise ValueError(f"its optimizer state is {', '.join(saved)}, which is no 8-bit AdamW's")
        for key, value in saved.items():
            state[key] = int(value) if key == "step" else state[key].copy_(value)
        return
    if "state1" in saved:
        raise ValueError("its optimizer state is in 8 bits, and optim.kind is adamw")
    optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in saved.items()}
