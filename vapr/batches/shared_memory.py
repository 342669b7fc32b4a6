"""Hand what a worker made to the training process: every array of it in one buffer of shared memory.

torch's own way passes a file descriptor for each tensor, and a step has hundreds of them.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

ALIGNMENT = 16
"""Bytes. Pixels of a patch are a multiple of it, so that images end to end leave no gap."""


@dataclass(frozen=True, slots=True)
class _Place:
    """The place of an array in the buffer."""

    start: int  # bytes
    dtype: torch.dtype
    shape: tuple[int, ...]
    is_numpy: bool

    def view(self, buffer: Tensor) -> Tensor:
        stop = self.start + math.prod(self.shape) * self.dtype.itemsize
        return buffer[self.start : stop].view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Shared:
    """A value whose arrays lie in a buffer; an ndarray as buffer goes through the pipe, byte by byte."""

    content: Any
    buffer: Tensor | np.ndarray  # (bytes,) uint8

    @property
    def in_pipe(self) -> bool:
        return isinstance(self.buffer, np.ndarray)

    def pin_memory(self) -> "Shared":
        """Return the same in pinned memory; the DataLoader calls this where there is a GPU."""
        return Shared(self.content, torch.as_tensor(self.buffer).pin_memory())

    def open(self) -> Any:
        """Return the value; its arrays are views of the buffer, which lives as long as one of them."""
        buffer = torch.as_tensor(self.buffer)

        def view(place: _Place) -> Tensor | np.ndarray:
            tensor = place.view(buffer)
            return tensor.numpy() if place.is_numpy else tensor

        return _rebuild(self.content, _Place, view, {})


def share(value: Any) -> Shared:
    """Copy the arrays of a value of dataclasses, tuples and lists into shared memory, in the order of their fields.

    Writing more than ``/dev/shm`` holds would kill the process, so where not every worker has room for as much, the
    buffer is left to the pipe.
    """
    info = get_worker_info()
    fits = True

    def new_buffer(size: int) -> Tensor:
        nonlocal fits
        fits = size * (info.num_workers if info else 1) <= free_shared_memory()
        buffer = torch.empty(0, dtype=torch.uint8)
        # As torch's own collate function does it; share_memory_() would copy the buffer once more.
        return buffer.set_(torch.UntypedStorage._new_shared(size)) if fits else buffer.new_empty(size)

    shared = in_one_buffer(value, new_buffer)
    return shared if fits else Shared(shared.content, torch.as_tensor(shared.buffer).numpy())


def in_one_buffer(value: Any, new_buffer: Callable[[int], Tensor]) -> Shared:
    """Copy the arrays of a value into the buffer, (bytes,) uint8, that ``new_buffer`` makes for so many bytes."""
    places: list[tuple[_Place, Tensor]] = []
    size = 0

    def place(array: Tensor | np.ndarray) -> _Place:
        nonlocal size
        tensor = torch.as_tensor(array)
        start = -(-size // ALIGNMENT) * ALIGNMENT
        size = start + tensor.nbytes
        places.append((_Place(start, tensor.dtype, tuple(tensor.shape), isinstance(array, np.ndarray)), tensor))
        return places[-1][0]

    content = _rebuild(value, (Tensor, np.ndarray), place, {})
    buffer = new_buffer(size)
    for where, tensor in places:
        where.view(buffer).copy_(tensor)
    return Shared(content, buffer)


def free_shared_memory() -> int:
    """Return the bytes that ``/dev/shm`` has room for; 0 where there is none."""
    try:
        stat = os.statvfs("/dev/shm")
    except OSError:
        return 0
    return stat.f_bavail * stat.f_frsize


PLAIN = frozenset({str, bytes, int, float, bool, type(None)})


def _rebuild(value: Any, kinds: type | tuple[type, ...], change: Callable[[Any], Any], known: dict[int, Any]) -> Any:
    """Rebuild a value with everything of ``kinds`` in it changed. What occurs in two places stays one object."""
    if type(value) in PLAIN:
        return value
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, kinds):
        new = change(value)
    elif isinstance(value, tuple | list):
        new = type(value)([_rebuild(item, kinds, change, known) for item in value])
    elif names := _field_names(type(value)):  # type: ignore[arg-type] # mypy takes a class for not hashable
        new = type(value)(**{name: _rebuild(getattr(value, name), kinds, change, known) for name in names})
    else:
        return value
    known[id(value)] = new
    return new


@functools.cache
def _field_names(kind: Any) -> tuple[str, ...]:
    """Return the names of a dataclass's fields; none of what is no dataclass."""
    return tuple(field.name for field in dataclasses.fields(kind)) if dataclasses.is_dataclass(kind) else ()
