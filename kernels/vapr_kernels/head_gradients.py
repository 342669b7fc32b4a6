"""head_gradients: what the target column adds to the gradients of an LM head and of its input.

L = rows (predictions), D = hidden, V = vocabulary.
"""

import torch
from torch import Tensor

from vapr_kernels import launch
from vapr_kernels.launch import rounded, tl, triton

BLOCK_D = 1024


@launch.Kernel
def _hidden_gradient_kernel(
    expected_ptr,  # (L, D) fp32
    head_ptr,  # (V, D)
    labels_ptr,  # (L,)
    up_ptr,  # (L,)
    down_ptr,  # (L,)
    out_ptr,  # (L, D)
    V,
    D,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    label, up, down = tl.load(labels_ptr + row), tl.load(up_ptr + row), tl.load(down_ptr + row)
    label = tl.where((label >= 0) & (label < V), label, 0)  # else up is NaN
    expected = tl.load(expected_ptr + row * D + d, mask=d < D, other=0.0)
    target = tl.load(head_ptr + label * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * D + d, rounded(up * target - down * expected, out_ptr.dtype.element_ty), mask=d < D)


def hidden_gradient(
    expected: Tensor, head: Tensor, labels: Tensor, up: Tensor, down: Tensor, out: Tensor, *, kernels: bool
) -> None:
    """Write ``up * head[labels] - down * expected`` row by row into ``out`` (L, D), which may be ``expected``.

    Args:
        expected: exps @ head, shape (L, D).
        head: shape (V, D).
        labels: int64, shape (L,).
        up: factor of the target's row of the head, shape (L,).
        down: factor of the other columns', shape (L,).
        kernels: whether Triton runs.
    """
    L, D = expected.shape
    if not kernels:
        out.copy_(up[:, None] * head[labels].to(expected.dtype) - down[:, None] * expected)
    elif L:
        block = min(BLOCK_D, triton.next_power_of_2(D))
        grid = (L, triton.cdiv(D, block))
        _hidden_gradient_kernel[grid](expected, head, labels, up, down, out, len(head), D, BLOCK_D=block)


@launch.Kernel
def _add_target_rows_kernel(
    dhead_ptr,  # (V, D), added to
    x_ptr,  # (L, D)
    factors_ptr,  # (L,)
    labels_ptr,  # (L,) ascending
    order_ptr,  # (L,) row of x of each of them
    ends_ptr,  # (L,) where the run of equal labels ends
    V,
    D,
    BLOCK_D: tl.constexpr,
):
    """One program adds all rows of one label, in order: the same sum on every run."""
    first = tl.program_id(0)
    label = tl.load(labels_ptr + first)
    before = tl.load(labels_ptr + first - 1, mask=first > 0, other=-1)
    if (label != before) & (label >= 0) & (label < V):
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        at = dhead_ptr + label * D + d
        total = tl.load(at, mask=d < D, other=0.0).to(tl.float32)
        for n in range(first, tl.load(ends_ptr + first)):
            row = tl.load(order_ptr + n)
            x = tl.load(x_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
            total += tl.load(factors_ptr + row) * x
        tl.store(at, rounded(total, dhead_ptr.dtype.element_ty), mask=d < D)


def add_target_rows(dhead: Tensor, x: Tensor, labels: Tensor, factors: Tensor, *, kernels: bool) -> None:
    """Add ``factors * x`` to ``dhead[labels]``; labels may repeat.

    Args:
        dhead: shape (V, D), changed.
        x: shape (L, D).
        labels: int64, shape (L,).
        factors: shape (L,).
        kernels: whether Triton runs; its sums are the same on every run, those of PyTorch on a GPU are not.
    """
    L, D = x.shape
    if not kernels:
        dhead.index_add_(0, labels, (factors[:, None] * x.to(factors.dtype)).to(dhead.dtype))
        return
    if L:
        ordered, order = labels.sort(stable=True)
        ends = torch.searchsorted(ordered, ordered, right=True)
        block = min(BLOCK_D, triton.next_power_of_2(D))
        grid = (L, triton.cdiv(D, block))
        _add_target_rows_kernel[grid](dhead, x, factors, ordered, order, ends, len(dhead), D, BLOCK_D=block)
