"""Send tensors to a GPU from pinned memory: from there alone copies run beside the kernels, and the host goes on."""

from typing import TypeVar

import torch
from torch import Tensor

from vapr.batches.shared_memory import in_one_buffer

Value = TypeVar("Value")


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on ``device``, for whose arrival there the host does not wait; one that is there stays."""
    if tensor.device.type == device.type:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)  # what is pinned already stays where it is


def pinned(value: Value) -> Value:
    """Return a value of dataclasses, tuples and lists with its arrays in one buffer of pinned memory."""
    copy: Value = in_one_buffer(value, lambda size: torch.empty(size, dtype=torch.uint8, pin_memory=True)).open()
    return copy
