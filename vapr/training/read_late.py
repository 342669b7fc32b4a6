"""Read numbers from the device once it has them, without keeping it waiting meanwhile."""

import torch
from torch import Tensor


class ReadLate:
    """Numbers on their way to the host.

    The copy is begun at once and stands behind what the device was given so far. What it is given afterwards does not
    hold the numbers up.

    Args:
        numbers: one-dimensional, float64.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._event = None
        self._numbers = numbers
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.current_stream().record_event()

    def read(self) -> list[float]:
        """Wait until the numbers are there, and return them."""
        if self._event is not None:
            self._event.synchronize()
        numbers: list[float] = self._numbers.tolist()
        return numbers
