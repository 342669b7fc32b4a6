"""Time steps from the end of one update to the end of the next, on the device's own clock where it has one."""

import time
from collections.abc import Callable

import torch


class StepClock:
    """A clock that is asked after each update was given to the device, and tells later what time that took.

    A GPU is behind the host; events in its queue note when it comes to them.

    Args:
        device: the policy's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.start()

    def start(self) -> None:
        """Begin anew, after something that is no part of a step."""
        self._began = self._now()

    def lap(self) -> Callable[[], float]:
        """Note that a step was given to the device; what is returned waits for its end and tells its seconds."""
        began, ended = self._began, self._now()
        self._began = ended
        return lambda: _seconds(began, ended)

    def _now(self) -> "float | torch.cuda.Event":
        if self._device.type != "cuda":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(began: "float | torch.cuda.Event", ended: "float | torch.cuda.Event") -> float:
    if isinstance(began, float) and isinstance(ended, float):
        return ended - began
    assert not isinstance(began, float) and not isinstance(ended, float)
    ended.synchronize()
    milliseconds: float = began.elapsed_time(ended)
    return milliseconds / 1e3
