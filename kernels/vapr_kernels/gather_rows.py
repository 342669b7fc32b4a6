"""gather_rows: copy rows of a tensor, some of them several times; the backward sums the copies in a fixed order.

Autograd's own backward of ``x[rows]`` adds duplicates with atomics (GPU) or from several threads (CPU), so two runs
differ. Here the copies of a row are added one after another, in fp32, in the order in which they appear.

T = rows of x, K = gathered rows.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class RowIndex:
    """Which rows to gather, and the inverse: for every round, at most one copy of each row.

    ``rounds[j]`` = (rows of x, gathered rows): the j-th copy of every row that has one.
    """

    rows: Tensor  # (K,) int64
    num_rows: int  # T
    rounds: tuple[tuple[Tensor, Tensor], ...] = field(repr=False)

    @classmethod
    def build(cls, rows: Tensor, num_rows: int) -> "RowIndex":
        """Sort the copies of each row by appearance. ``rows`` (K,) int64 on the CPU, values in [0, num_rows)."""
        order = rows.argsort(stable=True)
        by_row = rows[order]
        first = torch.searchsorted(by_row, by_row)  # where this row's copies begin
        nth_copy = torch.arange(len(rows)) - first
        num_rounds = int(nth_copy.max()) + 1 if len(rows) else 0
        rounds = tuple((by_row[nth_copy == j], order[nth_copy == j]) for j in range(num_rounds))
        return cls(rows, num_rows, rounds)

    def to(self, device: torch.device | str) -> "RowIndex":
        move = lambda x: x.to(device, non_blocking=True)
        return RowIndex(move(self.rows), self.num_rows, tuple((move(a), move(b)) for a, b in self.rounds))


def gather_rows_bwd(dout: Tensor, index: RowIndex) -> Tensor:
    """Sum ``dout`` (K, ...) into the rows it was copied from, (T, ...)."""
    accumulate = torch.promote_types(dout.dtype, torch.float32)
    dx = dout.new_zeros((index.num_rows, *dout.shape[1:]), dtype=accumulate)
    for rows, copies in index.rounds:
        # Rows are distinct within a round, so the addition has one order only.
        dx.index_add_(0, rows, dout.index_select(0, copies).to(accumulate))
    return dx.to(dout.dtype)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index):
        ctx.index = index
        return x.index_select(0, index.rows)

    @staticmethod
    def backward(ctx, dout):
        return gather_rows_bwd(dout, ctx.index), None


def gather_rows(x: Tensor, index: RowIndex) -> Tensor:
    """Rows ``index.rows`` of ``x``, shape (K, ...); the backward sums copies of a row in a fixed order, in fp32.

    Args:
        x: any tensor of ``index.num_rows`` rows, shape (T, ...).
        index: built once for all layers with :meth:`RowIndex.build`.

    Raises:
        ValueError: if ``x`` has another number of rows than the index was built for.
    """
    if x.shape[0] != index.num_rows:
        raise ValueError(f"x has {x.shape[0]} rows but the index was built for {index.num_rows}")
    return _GatherRows.apply(x, index)
