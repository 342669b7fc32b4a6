"""target_logits: one logit a row, that of its label, in fp64.

L = rows (predictions), D = hidden, V = vocabulary.
"""

import torch
from torch import Tensor

from vapr_kernels import launch
from vapr_kernels.launch import tl, triton


@launch.Kernel
def _target_logits_kernel(
    x_ptr,  # (L, D)
    w_ptr,  # (V, D)
    labels_ptr,  # (L,)
    out_ptr,  # (L,)
    V,
    D,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    exists = (label >= 0) & (label < V)
    w_row_ptr = w_ptr + tl.where(exists, label, 0) * D
    # All of exps hangs on this one logit, and for one dot product a row exactness costs nothing.
    acc = tl.zeros((BLOCK_D,), tl.float64)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float64)
        w = tl.load(w_row_ptr + d, mask=d < D, other=0.0).to(tl.float64)
        acc += x * w
    # A label that is none makes its row NaN; refusing it here would make the host wait.
    tl.store(out_ptr + row, tl.where(exists, tl.sum(acc, 0), float("nan")))


def target_logits(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """Return x_r . W[labels_r], shape (L,), fp64; NaN for a label that is no row of W."""
    out = x.new_empty(len(x), dtype=torch.float64)
    if len(x):
        block = min(1024, triton.next_power_of_2(x.shape[1]))
        _target_logits_kernel[(len(x),)](x, w, labels, out, len(w), x.shape[1], BLOCK_D=block)
    return out
