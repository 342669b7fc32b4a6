"""exp_rows: logits that a matrix product has stored, turned into exponentials relative to the target (see exp_logits).

For a library's matrix product in fp32, or where the fused one is not wanted. One program reads a row once; if its sum
left the safe range, it reads the row again with a better offset.

L = rows (predictions), V = vocabulary.
"""

from torch import Tensor

from vapr_kernels import launch
from vapr_kernels.launch import rounded, tl, triton
from vapr_kernels.row_stats import LOG2E, RowStats, base_of, is_unsafe, safe_offset, store_row_stats

BLOCK_V = 2048


@triton.jit
def _one_pass(row_ptr, e_row_ptr, V, label, high, low, STORE_EXPS: tl.constexpr, BLOCK_V: tl.constexpr):
    """Return total, total as stored and largest of one row, whose base is ``high + low``."""
    total = tl.zeros((BLOCK_V,), tl.float32)
    as_stored = tl.zeros((BLOCK_V,), tl.float32)
    largest = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        logits = tl.load(row_ptr + v, mask=v < V, other=float("-inf"))
        # The target is left out by its column, never by its value: ties must survive.
        logits = tl.where(v != label, logits, float("-inf"))
        exps = tl.exp2(((logits - high) - low) * LOG2E)
        total += exps
        largest = tl.maximum(largest, logits)
        if STORE_EXPS:
            stored = rounded(exps, e_row_ptr.dtype.element_ty)
            as_stored += stored.to(tl.float32)
            tl.store(e_row_ptr + v, stored, mask=v < V)
    return tl.sum(total, 0), tl.sum(as_stored, 0), tl.max(largest, 0)


@launch.Kernel
def _exp_rows_kernel(
    logits_ptr,  # (L, V) fp32
    labels_ptr,  # (L,)
    target_ptr,  # (L,) fp64
    offsets_ptr,  # (L,), replaced in unsafe rows
    e_ptr,  # (L, V), rows stride_e apart
    out_ptr,  # (3, L)
    L,
    V,
    stride_e,
    STORE_EXPS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr, e_row_ptr = logits_ptr + row * V, e_ptr + row * stride_e
    label = tl.load(labels_ptr + row)
    target = tl.load(target_ptr + row)
    offset = tl.load(offsets_ptr + row)
    high, low = base_of(target, offset)
    total, stored, largest = _one_pass(row_ptr, e_row_ptr, V, label, high, low, STORE_EXPS, BLOCK_V)
    if is_unsafe(total):
        offset = safe_offset(largest, target)
        high, low = base_of(target, offset)
        total, stored, largest = _one_pass(row_ptr, e_row_ptr, V, label, high, low, STORE_EXPS, BLOCK_V)
    tl.store(offsets_ptr + row, offset)
    store_row_stats(total, stored if STORE_EXPS else total, offset, row, True, out_ptr, L)


def exp_rows(logits: Tensor, labels: Tensor, target: Tensor, offsets: Tensor, exps: Tensor | None) -> RowStats:
    """Compute log-prob, odds and scale of each row of logits.

    Args:
        logits: fp32, shape (L, V), contiguous.
        labels: target columns, int64, shape (L,).
        target: their logits, fp64, shape (L,).
        offsets: octaves, whole numbers in fp32, shape (L,).
        exps: where the exponentials are stored if wanted, shape (L, V).
    """
    L, V = logits.shape
    offsets = offsets.clone()
    out = logits.new_empty(3, L)
    if L:
        block = min(BLOCK_V, triton.next_power_of_2(V))
        _exp_rows_kernel[(L,)](
            logits, labels, target, offsets, logits if exps is None else exps, out, L, V,
            0 if exps is None else exps.stride(0), STORE_EXPS=exps is not None, BLOCK_V=block, num_warps=8,
        )  # fmt: skip
    logps, log_odds, scale = out
    return RowStats(logps, log_odds, scale, target, offsets)
