"""Preference losses: pure functions of completion log-probs, one loss per pair.

Notation of the docstrings: w, l = chosen, rejected; D(y) = log pi(y|x) - log ref(y|x), the log-ratio; s = sigmoid;
|y| = number of completion tokens. m = the image that the completion is about, m' = a second image; D(y|m) names the
image that is shown. Log-probs are in nats. P = pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from vapr_kernels.image_losses import OTHER_PATHS, anchor_loss, compares_images, image_loss, symmetric_loss

if TYPE_CHECKING:
    from vapr_kernels.gather_rows import RowIndex


class Term(Protocol):
    """One term of a weighted sum of losses; a kind reads what its formula names."""

    @property
    def kind(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def beta(self) -> float: ...
    @property
    def gamma(self) -> float: ...
    @property
    def label_smoothing(self) -> float: ...
    @property
    def dpop_lambda(self) -> float: ...
    @property
    def sft_weight(self) -> float: ...
    @property
    def delta(self) -> float: ...
    @property
    def consistency(self) -> float: ...
    @property
    def margin_weight(self) -> float: ...


NO_REFERENCE = ("simpo", "orpo")
"""Kinds whose rewards are length-normalised log-probs."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairLogps:
    """Everything the losses are functions of, for P pairs. (P,), where nothing else is said."""

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor  # zeros where no loss needs a reference
    reference_rejected: Tensor
    chosen_lengths: Tensor  # completion tokens, each counted with its token weight
    rejected_lengths: Tensor
    mean_chosen_length: float  # chosen tokens of the whole step divided by its pairs, over all ranks
    others: Tensor | None = None  # (P, 3), of OTHER_PATHS; anything where a pair lacks the path
    reference_others: Tensor | None = None  # (P, 3)
    other_lengths: Tensor | None = None  # (P, 3)
    has_others: Tensor | None = None  # (P, 3) bool
    betas: Tensor | None = None  # (P, 2): a pair's own beta, NaN where it has none, and its margin


@dataclass(frozen=True, slots=True, eq=False)
class Completions:
    """Which token log-probs each completion sums, and which completions make a pair.

    L = predictions, M = predictions counted once per completion, C = completions.
    """

    counted: "RowIndex"  # (M,) into L, completion by completion
    token_weights: Tensor  # (M,) fp32
    completion: Tensor  # (M,) into C, ascending
    ends: Tensor  # (C,) int64, where each completion ends in M
    chosen: Tensor  # (P,) into C
    rejected: Tensor  # (P,) into C
    pair_weights: Tensor  # (P,) fp32
    others: Tensor | None = None  # (P, 3) into C, of OTHER_PATHS; -1 where a pair lacks the path; None: all lack all
    betas: Tensor | None = None  # (P, 2) fp32: a pair's own beta, NaN where it has none, and its margin

    @property
    def lengths(self) -> Tensor:
        """Tokens of each completion, (C,) int64."""
        return self.ends.diff(prepend=self.ends.new_zeros(1))

    def sums(self, counted: Tensor) -> Tensor:
        """Sum over the tokens of every completion, (M,) -> (C,)."""
        # Segment by segment, in a fixed order: the same on every run, unlike scatter_add.
        return torch.segment_reduce(counted, "sum", lengths=self.lengths, unsafe=True)


def preference_losses(logps: PairLogps, terms: Sequence[Term]) -> tuple[Tensor, ...]:
    """Return losses, chosen rewards and rejected rewards, each (P,) fp32; losses are the weighted sum of the terms.

    Where a term compares images, the rewards of OTHER_PATHS follow, NaN where a pair lacks the path.

    Rewards are detached. They are those of the first term that prefers a completion (``sft`` does not): beta times the
    log-ratio, or beta times the length-normalised log-prob for simpo and orpo, which have no reference. Beta is the
    term's, also where a pair has its own, so that rewards compare between pairs.
    """
    losses = sum(term.weight * _term_losses(logps, term) for term in terms)
    assert isinstance(losses, Tensor)
    rewarded = rewarded_term(terms)
    paths = [
        (logps.chosen, logps.reference_chosen, logps.chosen_lengths),
        (logps.rejected, logps.reference_rejected, logps.rejected_lengths),
    ]
    if compares_images(terms):
        others = (logps.others, logps.reference_others, logps.other_lengths)
        paths += zip(*(_columns(logps, values) for values in others), strict=True)
    with torch.no_grad():
        by_length = rewarded.kind in NO_REFERENCE
        rewards = (policy / length if by_length else policy - reference for policy, reference, length in paths)
        return losses, *(rewarded.beta * reward for reward in rewards)


def _columns(logps: PairLogps, values: Tensor | None) -> tuple[Tensor, ...]:
    """Return the values of OTHER_PATHS, each (P,), NaN where a pair lacks the path."""
    if values is None or logps.has_others is None:
        return (torch.full_like(logps.chosen, torch.nan),) * len(OTHER_PATHS)
    return torch.where(logps.has_others, values, torch.nan).unbind(1)


def rewarded_term(terms: Sequence[Term]) -> Term:
    """Return the term whose rewards are shown: the first that prefers one completion to another."""
    prefers = [term for term in terms if term.kind not in ("sft", "anchor", "image")]
    return [*prefers, *(term for term in terms if term.kind != "sft"), terms[0]][0]


def pair_betas(logps: PairLogps, term: Term) -> float | Tensor:
    """Return beta of each pair, (P,) where pairs differ: ``beta (1 + margin_weight margin)``.

    Beta is the pair's own or the term's; the factor is that of MM-DPO (arXiv 2502.10391).
    """
    if logps.betas is None:
        return term.beta
    own, margin = logps.betas.unbind(1)
    return torch.where(own.isnan(), term.beta, own) * (1 + term.margin_weight * margin)


def _term_losses(logps: PairLogps, term: Term) -> Tensor:
    both = (logps.chosen, logps.rejected)
    reference = (logps.reference_chosen, logps.reference_rejected)
    lengths = (logps.chosen_lengths, logps.rejected_lengths)
    beta, smoothing = pair_betas(logps, term), term.label_smoothing
    match term.kind:
        case "sigmoid":
            losses = sigmoid_loss(*both, *reference, beta=beta, label_smoothing=smoothing)
        case "robust":
            losses = robust_loss(*both, *reference, beta=beta, label_smoothing=smoothing)
        case "hinge":
            losses = hinge_loss(*both, *reference, beta=beta)
        case "ipo":
            losses = ipo_loss(*both, *reference, *lengths, beta=beta)
        case "bco_pair":
            losses = bco_pair_loss(*both, *reference, beta=beta)
        case "apo_zero":
            losses = apo_zero_loss(*both, *reference, beta=beta)
        case "apo_down":
            losses = apo_down_loss(*both, *reference, beta=beta)
        case "simpo":
            losses = simpo_loss(*both, *lengths, beta=beta, gamma=term.gamma, label_smoothing=smoothing)
        case "orpo":
            losses = orpo_loss(*both, *lengths, mean_chosen_length=logps.mean_chosen_length, beta=beta)
        case "dpop":
            losses = dpop_loss(*both, *reference, beta=beta, dpop_lambda=term.dpop_lambda)
        case "sft":
            losses = sft_loss(logps.chosen, mean_chosen_length=logps.mean_chosen_length)
        case "anchor":
            losses = anchor_loss(logps.chosen - logps.reference_chosen, beta=beta, delta=term.delta)
        case "image" | "symmetric":
            losses = _image_losses(logps, term, beta)
        case unknown:
            raise ValueError(f"kind must be a preference loss, got {unknown!r}")
    if term.sft_weight:
        losses = losses + term.sft_weight * sft_loss(logps.chosen, mean_chosen_length=logps.mean_chosen_length)
    return losses


def _image_losses(logps: PairLogps, term: Term, beta: float | Tensor) -> Tensor:
    """Return the losses of a term that compares images, (P,): 0 for a pair that lacks a path."""
    if logps.others is None:
        return 0.0 * logps.chosen
    assert logps.reference_others is not None and logps.has_others is not None
    chosen, rejected = logps.chosen - logps.reference_chosen, logps.rejected - logps.reference_rejected
    second, *swapped = (logps.others - logps.reference_others).unbind(1)
    if term.kind == "image":
        return torch.where(logps.has_others[:, 0], image_loss(chosen, second, beta=beta), 0.0)
    losses = symmetric_loss(chosen, rejected, *swapped, beta=beta, delta=term.delta, consistency=term.consistency)
    return torch.where(logps.has_others[:, 1:].all(1), losses, 0.0)


def sigmoid_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float | Tensor,
    label_smoothing: float = 0.0,
) -> Tensor:
    """DPO: ``-log s(beta (D(w) - D(l)))`` (arXiv 2305.18290, equation 7).

    With ``label_smoothing`` e, the conservative form ``-(1-e) log s(z) - e log s(-z)`` (Mitchell 2023, "A note on DPO
    with noisy preferences and relationship to IPO").

    Takes and returns fp32 tensors of shape (P,).
    """
    z = beta * ((chosen_logps - reference_chosen_logps) - (rejected_logps - reference_rejected_logps))
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def robust_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float | Tensor,
    label_smoothing: float = 0.0,
) -> Tensor:
    """rDPO: ``(-(1-e) log s(z) + e log s(-z)) / (1 - 2e)``, unbiased if a share e of the pairs is swapped.

    Source: arXiv 2403.00409.

    Takes and returns fp32 tensors of shape (P,).
    """
    z = beta * ((chosen_logps - reference_chosen_logps) - (rejected_logps - reference_rejected_logps))
    e = label_smoothing
    return (-(1 - e) * F.logsigmoid(z) + e * F.logsigmoid(-z)) / (1 - 2 * e)


def hinge_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float | Tensor,
) -> Tensor:
    """``max(0, 1 - beta (D(w) - D(l)))``: the "hinge-norm" of RSO (arXiv 2309.06657).

    Takes and returns fp32 tensors of shape (P,).
    """
    z = beta * ((chosen_logps - reference_chosen_logps) - (rejected_logps - reference_rejected_logps))
    return torch.relu(1 - z)


def ipo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float | Tensor,
) -> Tensor:
    """IPO: ``(D(w)/|w| - D(l)/|l| - 1/(2 beta))^2`` (arXiv 2310.12036, equation 17; beta is its tau).

    Log-ratios are averaged over tokens, as the authors do and TRL does, so that long answers are not asked for more.

    Takes and returns fp32 tensors of shape (P,).
    """
    chosen = (chosen_logps - reference_chosen_logps) / chosen_lengths
    rejected = (rejected_logps - reference_rejected_logps) / rejected_lengths
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def bco_pair_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float | Tensor,
) -> Tensor:
    """``-log s(beta D(w)) - log s(-beta D(l))``: BCO on pairs with reward shift 0 (arXiv 2404.04656).

    MPO's second term (arXiv 2411.10442).

    Takes and returns fp32 tensors of shape (P,).
    """
    chosen = beta * (chosen_logps - reference_chosen_logps)
    rejected = beta * (rejected_logps - reference_rejected_logps)
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def apo_zero_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float | Tensor,
) -> Tensor:
    """APO-zero: ``1 - s(beta D(w)) + s(beta D(l))`` (arXiv 2408.06266, equation 7): chosen up, rejected down.

    Takes and returns fp32 tensors of shape (P,).
    """
    chosen = beta * (chosen_logps - reference_chosen_logps)
    rejected = beta * (rejected_logps - reference_rejected_logps)
    return 1 - chosen.sigmoid() + rejected.sigmoid()


def apo_down_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float | Tensor,
) -> Tensor:
    """APO-down: ``s(beta D(w)) + 1 - s(beta (D(w) - D(l)))`` (arXiv 2408.06266, equation 8): rejected falls more.

    Takes and returns fp32 tensors of shape (P,).
    """
    chosen = beta * (chosen_logps - reference_chosen_logps)
    rejected = beta * (rejected_logps - reference_rejected_logps)
    return chosen.sigmoid() + 1 - (chosen - rejected).sigmoid()


def simpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float | Tensor,
    gamma: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """SimPO: ``-log s(beta log pi(w)/|w| - beta log pi(l)/|l| - gamma)``, no reference (arXiv 2405.14734, eq. 6).

    Takes and returns fp32 tensors of shape (P,).
    """
    z = beta * (chosen_logps / chosen_lengths - rejected_logps / rejected_lengths) - gamma
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def orpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    mean_chosen_length: float,
    beta: float | Tensor,
) -> Tensor:
    """ORPO: ``NLL(w) - beta log s(log odds(w) - log odds(l))``, odds = p / (1 - p), p = exp(log pi(y) / |y|).

    Source: arXiv 2403.07691, equations 4, 6 and 7 (beta is its lambda). NLL is :func:`sft_loss` of the completion.

    Takes and returns fp32 tensors of shape (P,).
    """
    chosen, rejected = chosen_logps / chosen_lengths, rejected_logps / rejected_lengths
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return sft_loss(chosen_logps, mean_chosen_length=mean_chosen_length) - beta * F.logsigmoid(log_odds)


def dpop_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float | Tensor,
    dpop_lambda: float,
) -> Tensor:
    """DPO-Positive: ``-log s(beta (D(w) - D(l) - lambda max(0, -D(w))))`` (arXiv 2402.13228).

    Keeps the chosen log-prob of low-edit-distance pairs from falling below the reference's.

    Takes and returns fp32 tensors of shape (P,).
    """
    chosen, rejected = chosen_logps - reference_chosen_logps, rejected_logps - reference_rejected_logps
    return -F.logsigmoid(beta * (chosen - rejected - dpop_lambda * torch.relu(-chosen)))


def sft_loss(chosen_logps: Tensor, *, mean_chosen_length: float) -> Tensor:
    """Negative log-likelihood of the chosen completion, ``-log pi(w)`` over the step's mean chosen length.

    Its mean over a step's pairs is the mean over the step's chosen tokens, whatever the packing.

    Takes and returns fp32 tensors of shape (P,).
    """
    return -chosen_logps / mean_chosen_length


def _log1mexp(x: Tensor) -> Tensor:
    """``log(1 - exp(x))`` for x < 0, accurate at both ends (Maechler 2012)."""
    # Where the other branch is taken, its input is replaced: infinities would turn gradients into NaN.
    near_zero = x > -0.693
    small = torch.log(-torch.expm1(torch.where(near_zero, x, -1.0).clamp(max=-1e-12)))
    return torch.where(near_zero, small, torch.log1p(-torch.exp(torch.where(near_zero, -1.0, x))))
