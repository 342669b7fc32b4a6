"""Hidden states + PackedBatch -> log-probs of tokens and of completions.

T = packed tokens, L = predictions, M = predictions counted once per completion, C = completions, P = pairs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vapr.batches.packing import PackedBatch
from vapr.families.processed_image import ProcessedImage
from vapr.model.policy import Policy, hidden_states
from vapr_kernels import gather_rows, linear_logps
from vapr_kernels.linear_logps import Mode


def token_logps(
    policy: Policy, batch: PackedBatch, features: Tensor | None = None, reference_logps: Tensor | None = None
) -> Tensor:
    """Compute the log-prob of every predicted token, shape (L,), fp32, in nats.

    Only rows that predict reach the LM head.

    Args:
        features: the batch's image features, if known already.
        reference_logps: the reference's log-probs, laid out as :func:`per_completion`, (M,), if known. They tell the
            kernel where to expect the logits and change nothing else.
    """
    images = batch.images if features is None else ()
    return policy.passes.logps(lambda spare: _token_logps(policy, batch, features, reference_logps, spare), images)


def _token_logps(
    policy: Policy, batch: PackedBatch, features: Tensor | None, reference_logps: Tensor | None,
    spare: Sequence[ProcessedImage],
) -> Tensor:  # fmt: skip
    rows = gather_rows(hidden_states(policy, batch, features, spare), batch.predict_from)  # (L, D)
    if reference_logps is not None:
        first_copy = batch.sum_prediction.order[batch.sum_prediction.starts[:-1]]
        reference_logps = reference_logps[first_copy]  # (L,)
    mode: Mode = "auto" if policy.kernels else "torch"
    return linear_logps(rows, policy.head, batch.labels, reference_logps=reference_logps, mode=mode)


def per_completion(logps: Tensor, batch: PackedBatch) -> Tensor:
    """Lay token log-probs (L,) out completion by completion, shape (M,); shared tokens appear once in each."""
    return gather_rows(logps, batch.sum_prediction)


def completion_logps(counted: Tensor, batch: PackedBatch) -> Tensor:
    """Sum token log-probs (M,), weighted, over each completion: (P, 2), chosen first, fp32.

    Shared tokens count in both sums, so in a loss of the difference their gradients cancel exactly.
    """
    sums = completion_sums(counted * batch.token_weights, batch)
    return torch.stack([sums.index_select(0, batch.chosen), sums.index_select(0, batch.rejected)], dim=1)


def completion_sums(counted: Tensor, batch: PackedBatch) -> Tensor:
    """Sum token values (M,) over every completion: (C,), fp32."""
    return batch.completions.sums(counted)
