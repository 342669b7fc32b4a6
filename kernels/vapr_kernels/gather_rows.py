"""gather_rows: copy rows of a tensor, some of them several times; the backward sums the copies in a fixed order.

Autograd's own backward of ``x[rows]`` adds duplicates with atomics (GPU) or from several threads (CPU), so two runs
differ. Here the copies of a row are added one after another, in fp32, in the order in which they appear.

T = rows of x, K = gathered rows, D = elements of a row.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vapr_kernels import launch
from vapr_kernels.launch import rounded, tl, triton

TILE = 1024
"""Elements of a program's tile: 8 per thread, one 16-byte access of bf16."""

NUM_WARPS = 4


@dataclass(frozen=True, slots=True, eq=False)
class RowIndex:
    """Rows to gather, and where the copies of each row are, in the order in which they appear.

    The copies of row t are the gathered rows ``order[starts[t] : starts[t + 1]]``.
    """

    rows: Tensor  # (K,) int64
    num_rows: int  # T
    order: Tensor  # (K,) int64
    starts: Tensor  # (T + 1,) int64

    @classmethod
    def build(cls, rows: Tensor, num_rows: int) -> "RowIndex":
        """Sort the copies of each row by appearance. ``rows`` (K,) int64 on the CPU, values in [0, num_rows).

        Raises:
            ValueError: if a row does not exist; kernels would read past the tensor.
        """
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < num_rows:
            raise ValueError(f"rows must lie in [0, {num_rows}), got {int(rows.min())} to {int(rows.max())}")
        rows = rows.contiguous()  # kernels step through it
        order = rows.argsort(stable=True)
        return cls(rows, num_rows, order, torch.searchsorted(rows[order], torch.arange(num_rows + 1)))

    def to(self, device: torch.device | str) -> "RowIndex":
        move = lambda x: x.to(device, non_blocking=True)
        return RowIndex(move(self.rows), self.num_rows, move(self.order), move(self.starts))

    def check(self, name: str, x: Tensor) -> None:
        """Check that ``x`` (T, ...), the argument ``name``, has the rows that the index was built for, on its device.

        Raises:
            ValueError: naming the argument.
        """
        if x.shape[0] != self.num_rows:
            raise ValueError(f"{name} has {x.shape[0]} rows but the index was built for {self.num_rows}")
        if x.device != self.rows.device:
            raise ValueError(f"index must lie on {x.device}, got {self.rows.device}")


@launch.Kernel
def _gather_rows_bwd_kernel(
    dout_ptr,  # (K, D)
    order_ptr,  # (K,) int64
    starts_ptr,  # (T + 1,) int64
    dx_ptr,  # (T, D)
    T,
    D,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    num_blocks = tl.cdiv(D, BLOCK_D)
    rows = (tl.program_id(0) // num_blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = (tl.program_id(0) % num_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    exists = rows < T
    start = tl.load(starts_ptr + rows, mask=exists, other=0)
    num_copies = tl.load(starts_ptr + rows + 1, mask=exists, other=0) - start
    dx = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for nth in range(tl.max(num_copies, 0)):
        has = nth < num_copies
        copy = tl.load(order_ptr + start + nth, mask=has, other=0)[:, None]
        dx += tl.load(dout_ptr + copy * D + cols, mask=has[:, None] & (cols < D), other=0.0).to(tl.float32)
    at = dx_ptr + rows.to(tl.int64)[:, None] * D + cols
    tl.store(at, rounded(dx, dx_ptr.dtype.element_ty), mask=exists[:, None] & (cols < D))


def gather_rows_bwd(dout: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """Launch the backward kernel; return dx (T, ...)."""
    dout = launch.contiguous(dout)
    num_rows, width = len(starts) - 1, math.prod(dout.shape[1:])
    dx = dout.new_empty((num_rows, *dout.shape[1:]))
    block_w = min(TILE, triton.next_power_of_2(max(1, width)))
    block_t = TILE // block_w
    grid = (triton.cdiv(num_rows, block_t) * triton.cdiv(width, block_w),)
    _gather_rows_bwd_kernel[grid](
        dout, order, starts, dx, num_rows, width, BLOCK_T=block_t, BLOCK_D=block_w, num_warps=NUM_WARPS
    )
    return dx


def sum_copies(dout: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """The naive backward: ``dout`` (K, ...) summed into the rows it was copied from, (T, ...), at least fp32."""
    accumulate = torch.promote_types(dout.dtype, torch.float32)
    num_copies = starts.diff()
    if bool((num_copies > 0).all()):  # as of keys: every token is one of its own
        dx, nth = dout.index_select(0, order[starts[:-1]]).to(accumulate), 1
    else:
        dx, nth = dout.new_zeros((len(num_copies), *dout.shape[1:]), dtype=accumulate), 0
    rows = (num_copies > nth).nonzero()[:, 0]
    while len(rows):
        # The n-th copy of every row that has one: rows are distinct, so the addition has one order only.
        copies = order[starts[rows] + nth]
        dx.index_add_(0, rows, dout.index_select(0, copies).to(accumulate))
        nth += 1
        rows = rows[num_copies[rows] > nth]
    return dx


@torch.library.custom_op("vapr::gather_rows", mutates_args=())
def _gather_rows(x: Tensor, rows: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    return x.index_select(0, rows)


@_gather_rows.register_fake
def _(x: Tensor, rows: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    return x.new_empty((rows.shape[0], *x.shape[1:]))


@torch.library.custom_op("vapr::gather_rows_bwd", mutates_args=())
def _gather_rows_bwd(dout: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    if launch.runs_triton(dout):
        return gather_rows_bwd(dout, order, starts)
    return sum_copies(dout, order, starts).to(dout.dtype)


@_gather_rows_bwd.register_fake
def _(dout: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    return dout.new_empty((starts.shape[0] - 1, *dout.shape[1:]))


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[2:])


def _backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
    return _gather_rows_bwd(dout, *ctx.saved_tensors), None, None, None


_gather_rows.register_autograd(_backward, setup_context=_setup_context)


def gather_rows(x: Tensor, index: RowIndex) -> Tensor:
    """Rows ``index.rows`` of ``x``, shape (K, ...); the backward sums copies of a row in a fixed order, in fp32.

    Args:
        x: any tensor of ``index.num_rows`` rows, shape (T, ...).
        index: built once for all layers with :meth:`RowIndex.build`, on the device of ``x``.

    Raises:
        ValueError: if ``x`` has another number of rows than the index was built for, or lies elsewhere.
    """
    index.check("x", x)
    return _gather_rows(x, index.rows, index.order, index.starts)
