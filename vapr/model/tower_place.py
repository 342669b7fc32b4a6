"""Keep a frozen tower and projector in host memory while cached features serve, and on the GPU while needed."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vapr.families import FAMILIES

HOST = torch.device("cpu")


class TowerPlace:
    """A context in which tower and projector are on the policy's device.

    They are there at all times until :meth:`rest` is called. From then on they wait in host memory, and come to the
    device for the duration of the context. Nothing is copied back, because frozen weights do not change.

    Args:
        modules: tower and projector.
        device: the policy's.
    """

    def __init__(self, modules: Iterable[nn.Module], device: torch.device) -> None:
        self.device = device
        self.rests = False
        self.num_moves = 0
        """Times that they came to the device."""
        self._modules = list(modules)
        self._waiting: list[tuple[Tensor, Tensor]] = []  # a parameter or buffer, and its values in host memory
        self._depth = 0

    @classmethod
    def of(cls, base: Any, family: str, device: torch.device) -> "TowerPlace":
        """Return the place of a model's tower and projector, which are on ``device``."""
        family_of = FAMILIES[family]
        return cls(family_of.modules(base, (*family_of.tower, *family_of.projector)), device)

    def rest(self) -> None:
        """Let tower and projector wait in host memory from now on; where the policy is there, nothing happens."""
        if self.rests or self.device == HOST:
            return
        tensors = {id(t): t for m in self._modules for t in (*m.parameters(), *m.buffers())}
        self._waiting = list(zip(tensors.values(), _copies(list(tensors.values()), HOST), strict=True))
        self.rests = True
        self._leave()

    def __enter__(self) -> None:
        self._depth += 1
        if self.rests and self._depth == 1:
            self.num_moves += 1
            arrived = _copies([values for _, values in self._waiting], self.device)
            for (tensor, _), values in zip(self._waiting, arrived, strict=True):
                tensor.data = values

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if self.rests and self._depth == 0:
            self._leave()

    def _leave(self) -> None:
        for tensor, values in self._waiting:
            tensor.data = values


def _copies(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Return tensors on another device; those that are parts of one memory are parts of one there, too."""
    memories: dict[int, Tensor] = {}
    copies = []
    for tensor in tensors:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in memories:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(memory)
            copied = whole.to(device, copy=True, non_blocking=device != HOST)
            memories[memory.data_ptr()] = copied.pin_memory() if device == HOST and whole.is_cuda else copied
        target = memories[memory.data_ptr()].untyped_storage()
        copy = torch.empty(0, dtype=tensor.dtype, device=device)
        copies.append(copy.set_(target, tensor.storage_offset(), tensor.size(), tensor.stride()))
    return copies
