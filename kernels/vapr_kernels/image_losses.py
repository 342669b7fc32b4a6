"""Losses of one answer to several images, and the anchor that goes with them: pure functions of log-ratios.

Notation as in losses.py: w, l = chosen, rejected; D(y|m) = log-ratio of y shown image m, in nats; s = sigmoid; m' = a
second image. Each function takes and returns fp32 tensors of shape (P,).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from vapr_kernels.losses import Term

IMAGE_KINDS = ("image", "symmetric")
"""Kinds that compare images. A pair without the paths that one needs has no loss of that kind."""

OTHER_PATHS = ("second", "chosen swapped", "rejected swapped")
"""Paths of a pair beside chosen and rejected: w with a second image made for it; w with the images of l; l with those
of w."""


def compares_images(terms: "Sequence[Term]") -> bool:
    """Tell whether a term needs paths beside chosen and rejected."""
    return any(term.kind in IMAGE_KINDS for term in terms)


def anchor_loss(chosen: Tensor, *, beta: float | Tensor, delta: float = 0.0) -> Tensor:
    """Anchor of mDPO: ``-log s(beta D(w) - delta)`` (arXiv 2406.11839): chosen above the reference."""
    return -F.logsigmoid(beta * chosen - delta)


def image_loss(chosen: Tensor, second: Tensor, *, beta: float | Tensor) -> Tensor:
    """Image term of mDPO: ``-log s(beta (D(w|m) - D(w|m')))`` (arXiv 2406.11839).

    The two sides have different prompts, so their partition functions do not cancel as in DPO (arXiv 2506.11712).

    Args:
        chosen: ``D(w|m)``.
        second: ``D(w|m')``.
    """
    return -F.logsigmoid(beta * (chosen - second))


def symmetric_loss(
    chosen: Tensor,
    rejected: Tensor,
    chosen_swapped: Tensor,
    rejected_swapped: Tensor,
    *,
    beta: float | Tensor,
    delta: float = 0.0,
    consistency: float = 1e-4,
) -> Tensor:
    """SymMPO (arXiv 2506.11712): each of two images prefers its own answer; w is that of m, l that of m'.

    With ``a = D(w|m) - D(l|m)`` and ``b = D(l|m') - D(w|m')``::

        -(log s(beta a) + log s(beta b)) / 2
        - log s(beta D(w|m) - delta) - log s(beta D(l|m') - delta)
        + consistency (a - b)^2

    Args:
        chosen: ``D(w|m)``.
        rejected: ``D(l|m')``.
        chosen_swapped: ``D(w|m')``.
        rejected_swapped: ``D(l|m)``.
        beta: strength of the pull towards the reference.
        delta: what both anchors ask for.
        consistency: weight of the squared difference of the two margins.
    """
    a, b = chosen - rejected_swapped, rejected - chosen_swapped
    preferred = (F.logsigmoid(beta * a) + F.logsigmoid(beta * b)) / 2
    anchored = anchor_loss(chosen, beta=beta, delta=delta) + anchor_loss(rejected, beta=beta, delta=delta)
    return anchored - preferred + consistency * (a - b) ** 2
