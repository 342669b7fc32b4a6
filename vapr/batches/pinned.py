"""Pin what is to be sent to a GPU: from pinned memory alone copies run beside the kernels."""

from typing import TypeVar

import torch

from vapr.batches.shared_memory import in_one_buffer

Value = TypeVar("Value")


def pinned(value: Value) -> Value:
    """Return a value of dataclasses, tuples and lists with its arrays in one buffer of pinned memory."""
    copy: Value = in_one_buffer(value, lambda size: torch.empty(size, dtype=torch.uint8, pin_memory=True)).open()
    return copy
