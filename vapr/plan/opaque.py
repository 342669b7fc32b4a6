"""Formulas for the bytes that single operations allocate and free inside themselves, which no dispatch mode sees.

L = predictions, D = hidden, V = vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vapr_kernels.linear_logps import rows_at_a_time

COLUMNS = 128
"""Columns of a tile of the fused head; larger tiles need fewer partial sums."""

FLASH_ROWS = 128
"""Rows that FlashAttention's backward pass pads each sequence to."""

FLASH_HEAD = 32
"""It rounds the size of a head up to a multiple of this."""


def head_budget(gpu_bytes: int) -> int:
    """Return the bytes of exponentials that linear_logps holds at a time on a GPU of so much memory."""
    return gpu_bytes // 96


@dataclass(frozen=True, slots=True)
class HeadCall:
    """One call of linear_logps, or its backward pass, and what was alive then."""

    backward: bool
    product: str
    gradient: str
    L: int
    V: int
    D: int
    with_dx: bool
    alive: int  # bytes, its outputs included
    gradients: int

    def inside(self, budget: int) -> int:
        """Return the bytes that it holds inside itself where exponentials may take ``budget`` bytes at a time."""
        fused = self.product == "fused"
        wide = 2 if fused else 4  # bytes of an exponential
        if self.backward:
            rows_of_hidden = self.L * self.D * (4 + 4 + 2)  # the scaled rows: in fp32, negated, rounded
            if self.gradient == "keep":
                return rows_of_hidden
            columns = max(256, budget // (max(self.L, 1) * wide) // 256 * 256)
            again = self.L * min(columns, self.V) * wide
            return rows_of_hidden + again + (self.L * self.D * 8 if self.with_dx else 0)
        rows = self.L
        if not fused or self.gradient not in ("none", "recompute"):
            rows = min(rows, rows_at_a_time(self.L, budget // (self.V * wide), fused=fused))
        sums = (3 if self.gradient != "none" else 2) * -(-self.V // COLUMNS) * rows * 4 if fused else 0
        exponentials = rows * self.V * wide if self.gradient == "dx" or not fused else 0
        if self.product == "library":
            exponentials += rows * self.V * 4  # the logits beside them
        narrowed = rows * self.V * 2 if self.product == "torch" and self.gradient in ("dx", "keep") else 0
        product = rows * self.D * 4 if self.gradient in ("dx", "keep") else 0
        target = rows * self.D * 8 * 3 if self.product == "torch" else 0  # the label's logit, in fp64
        return sums + exponentials + max(narrowed + product, target)


def inside(name: str, arguments: Sequence[Any], options: Mapping[str, Any]) -> int:
    """Return the bytes inside an operation of which no more than its arguments need be known."""
    if name == "torch_attn::_varlen_attn_backward":
        q, k = arguments[1], arguments[2]
        num_sequences = len(arguments[6]) - 1
        rows, heads = q.shape[0] + FLASH_ROWS * num_sequences, q.shape[1]
        width = -(-q.shape[2] // FLASH_HEAD) * FLASH_HEAD
        sums = rows * heads * width * 4 + rows * heads * 4  # the gradient of q in fp32, and a sum for each row
        grouped = 2 * k.shape[0] * heads * q.shape[2] * k.dtype.itemsize if k.shape[1] != heads else 0
        return int(sums + grouped)
    return 0
