"""matmul: a product of two matrices, in fp32 on a CPU by the faster of the two libraries that PyTorch has for it.

PyTorch multiplies fp32 by MKL, which takes AVX-512 on Intel's CPUs only. oneDNN, by which PyTorch multiplies narrower
dtypes, takes it on any: on a Zen 5 it is more than twice as fast.

oneDNN compiles a kernel for every new shape, in about a millisecond. Hardly two packs have as many tokens, so rows are
multiplied in numbers that come again (_round_up), what is behind the last one along with them.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LARGE = 70_000
"""Values of the second matrix from which on oneDNN takes a product. Rows do not count: the two libraries round
differently, and what a token gets must not depend on how many others are packed with it."""

STEP = 16
"""Rows come in multiples of it. A single one, as where an answer is written token by token, is MKL's."""

MANY = 128
"""Rows from which on there is memory for more behind them; fewer are copied."""


@functools.cache
def _onednn() -> Callable[..., Tensor] | None:
    """Return oneDNN's product where MKL would leave AVX-512 unused."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return None
    cpus = Path("/proc/cpuinfo")
    if cpus.exists() and "GenuineIntel" in cpus.read_text():
        return None
    product: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return product


def _round_up(num_rows: int) -> int:
    """Return the next multiple of 16, or of the 32nd part of a power of two: at most 3 % more from 512 rows on."""
    step = max(STEP, 1 << max(num_rows.bit_length() - 6, 0))
    return -(-num_rows // step) * step


def new_rows(like: Tensor, num_rows: int, width: int) -> Tensor:
    """Return memory for (N, K) of the dtype and device of ``like`` that :func:`matmul` multiplies where it lies."""
    with_room = num_rows >= MANY and _may_take_onednn(like)
    return like.new_empty(_round_up(num_rows) if with_room else num_rows, width)[:num_rows]


def _may_take_onednn(a: Tensor) -> bool:
    return a.device.type == "cpu" and a.dtype == torch.float32 and _onednn() is not None


def _with_rows(a: Tensor, num_rows: int) -> Tensor:
    """Return ``a`` (N, K) with more rows, of any values: those behind it, if there is memory, or else a copy."""
    if num_rows == len(a):
        return a
    memory = a.untyped_storage().nbytes() // a.itemsize - a.storage_offset()
    if (num_rows - 1) * a.stride(0) + a.shape[1] <= memory:
        return a.as_strided((num_rows, a.shape[1]), a.stride())
    longer = a.new_zeros(num_rows, a.shape[1])
    longer[: len(a)] = a
    return longer


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """Multiply two matrices where autograd does not look: in a function that is differentiated by hand.

    Args:
        a: shape (N, K). b: shape (K, M), of the dtype and device of ``a``.
        bias: shape (M,), added to every row; None: nothing.
        out: where to write the result; None: into memory of its own, contiguous.

    Returns:
        ``a @ b + bias``, (N, M).
    """
    # For other layouts oneDNN has loops that nobody tuned.
    suits = a.stride(1) == 1 and (b.is_contiguous() or b.T.is_contiguous())
    if suits and len(a) > 1 and b.numel() >= LARGE and _may_take_onednn(a):
        onednn = _onednn()
        assert onednn is not None
        product = onednn(_with_rows(a, _round_up(len(a))), b.T, bias, "none", [], "")[: len(a)]
        return product if out is None else out.copy_(product)
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer (O, D) to (..., D): by :func:`matmul`, but where autograd looks as PyTorch does.

    Returns:
        ``x @ weight.T + bias``, (..., O), differentiable in all three.
    """
    if torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in (x, weight, bias)):
        return F.linear(x, weight, bias)
    return matmul(x.reshape(-1, x.shape[-1]), weight.T, bias).view(*x.shape[:-1], len(weight))
