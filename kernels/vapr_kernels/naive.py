"""The slow, obvious version of every operation: the specification, and the truth in tests.

T = packed tokens, K = gathered rows, L = predictions, D = hidden, V = vocabulary.
"""

import torch
from torch import Tensor


def linear_logps(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Log-prob of each label under ``softmax(hidden @ head.T)``, shape (L,), at least fp32."""
    logits = hidden.to(_accumulate(hidden)) @ head.to(_accumulate(hidden)).T  # (L, V)
    return logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """``x[rows]``, shape (K, ...)."""
    return x[rows]


def _accumulate(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
