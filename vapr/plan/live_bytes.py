"""Count the bytes of live tensors by storage, operation by operation, on real tensors and on fake ones."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

Inside = Callable[[str, Sequence[Any], Mapping[str, Any]], int]
"""From an operation's name and arguments to the bytes that it allocates and frees inside itself."""


@dataclass(slots=True)
class Peak:
    """The most that was alive in a phase, in bytes."""

    alive: int = 0  # activations: everything made since counting began, but gradients
    with_gradients: int = 0  # the same with the gradients that existed at that moment
    gradients: int = 0  # those that existed when the phase ended


class LiveBytes(TorchDispatchMode):
    """Count what operations make while the mode is on. What existed before, and views of it, counts nothing.

    A storage counts from the operation that made it until nothing refers to it, autograd included.

    Args:
        inside: what an operation allocates besides its outputs; None: nothing.
        rounded_to: bytes that each storage is rounded up to; PyTorch's allocator on a GPU hands out blocks of 512.
    """

    def __init__(self, inside: Inside | None = None, rounded_to: int = 1) -> None:
        super().__init__()
        self.alive = 0
        self.gradients = 0
        self.peaks: dict[str, Peak] = {}
        self._inside = inside
        self._rounded_to = rounded_to
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._made: weakref.WeakKeyDictionary[Any, tuple[int, Any]] = weakref.WeakKeyDictionary()
        self._phase = ""
        self.enter("start")

    def enter(self, phase: str) -> None:
        """Begin another phase, or go on with one."""
        self._phase = phase
        self.peaks.setdefault(phase, Peak())
        self.note()

    def add_gradient(self, num_bytes: int) -> None:
        """Count bytes that stay until the end of the step."""
        self.gradients += num_bytes
        self.note()

    def forget(self, tensor: Tensor) -> None:
        """Count a live tensor no longer, because it is counted elsewhere; nor what lies in the same memory."""
        num_bytes, finalizer = self._made.pop(tensor.untyped_storage(), (0, None))
        if finalizer is not None:
            finalizer.detach()
        self.alive -= num_bytes

    def note(self, besides: int = 0) -> None:
        """Compare what is alive now, and ``besides`` bytes, with the phase's peak."""
        peak, now = self.peaks[self._phase], self.alive + besides
        peak.alive = max(peak.alive, now)
        peak.with_gradients = max(peak.with_gradients, now + self.gradients)
        peak.gradients = self.gradients

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in tree_iter((args, kwargs)):
            if isinstance(value, Tensor):
                self._known.add(value.untyped_storage())
        out = func(*args, **kwargs)
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._add(value)
        self.note(self._inside(func._schema.name, args, kwargs) if self._inside else 0)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        num_bytes = -(-storage.nbytes() // self._rounded_to) * self._rounded_to
        self.alive += num_bytes
        self._made[storage] = num_bytes, weakref.finalize(storage, self._free, num_bytes)

    def _free(self, num_bytes: int) -> None:
        self.alive -= num_bytes
