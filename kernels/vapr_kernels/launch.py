"""Where an operation runs: Triton on a GPU, Triton's interpreter under TRITON_INTERPRET=1, its naive twin elsewhere."""

import functools
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # everything below imports and takes the naive twins
    tl = SimpleNamespace(constexpr=lambda value: value)
    triton = SimpleNamespace(jit=lambda function: function)
    installed = False
else:
    installed = True

interpret = installed and os.environ.get("TRITON_INTERPRET") == "1"
"""Whether CPU tensors take the kernels, too. Triton reads the variable when it is imported."""

INTERPRETED = tl.constexpr(interpret)
"""For kernels: the interpreter multiplies the bit patterns of bf16 operands and truncates where it should round."""


def runs_triton(x: Tensor) -> bool:
    """Tell whether operations on ``x`` (any shape) run a Triton kernel. fp64 does not: kernels compute in fp32."""
    return installed and (x.is_cuda or interpret) and x.dtype != torch.float64


def contiguous(x: Tensor) -> Tensor:
    """Return ``x`` (any shape), copied only if its rows have gaps or 16-byte accesses would be misaligned."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def unit_stride(x: Tensor) -> Tensor:
    """Return ``x`` (any shape), copied only if neighbours along its last dimension do not lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


@functools.cache
def capability(device: torch.device) -> int:
    """Return the compute capability as one number, 90 for Hopper; 0 for the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def num_sms(device: torch.device) -> int:
    """Return the number of streaming multiprocessors; 2 for the interpreter, so that programs take several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


class Kernel:
    """A Triton kernel that launches on the device of its first tensor, whichever device is current."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.jitted = triton.jit(function)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def run(first: Any, *arguments: Any, **options: Any) -> Any:
            with torch.cuda.device_of(getattr(first, "base", first)):  # a descriptor has its tensor as base
                return self.jitted[grid](first, *arguments, **options)

        return run


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 ``x`` in ``dtype``, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits & 0xFFFF0000).to(tl.float32, bitcast=True).to(dtype)
    return x.to(dtype)


@triton.jit
def operand(x):
    """``x`` as an operand of ``tl.dot``."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return x.to(tl.float32)
    return x
