"""preference_loss: token log-probs -> losses of pairs, in one launch.

One program takes one pair: it sums the token log-probs of both completions and of the reference, forms the log-ratios,
and evaluates every term of the loss together with its derivative by the sums. Where a term compares images there are
five sums, not two (OTHER_PATHS of losses.py). Formulas and sources: losses.py and image_losses.py; the derivatives are
worked out there by autograd and here by hand.

L = predictions, M = predictions counted once per completion, C = completions, P = pairs.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vapr_kernels import launch, naive
from vapr_kernels.image_losses import OTHER_PATHS, compares_images
from vapr_kernels.launch import runs_triton, tl, triton
from vapr_kernels.loss_terms import image_term, pair_term
from vapr_kernels.losses import NO_REFERENCE, Completions, Term, rewarded_term

KINDS = (
    "sigmoid", "robust", "hinge", "ipo", "bco_pair", "apo_zero", "apo_down", "simpo", "orpo", "dpop", "sft",
    "anchor", "image", "symmetric",
)  # fmt: skip
"""The kernel knows a kind by its place here."""
PARAMETERS = 10
"""Parameters of a term: kind, weight, beta, gamma, label smoothing, lambda of DPO-positive, weight of the added SFT,
delta of the anchors, weight of the symmetric loss's consistency, weight of a pair's margin."""
BLOCK_M = 128


class PairLosses(NamedTuple):
    """Losses, rewards and log-probs of P pairs."""

    losses: Tensor  # (P,), times the pair weights; the only one with a gradient
    rewards: Tensor  # (P, 2), chosen and rejected; where a term compares images (P, 5), with those of OTHER_PATHS
    logps: Tensor  # (P, 2), of the completions


@triton.jit
def _sums(
    start, end, logps_ptr, counted_ptr, reference_ptr, weights_ptr, HAS_REFERENCE: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Weighted log-prob, the reference's, and the length of one completion."""
    total = tl.zeros((BLOCK_M,), tl.float32)
    reference = tl.zeros((BLOCK_M,), tl.float32)
    length = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(start, end, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        live = m < end
        weight = tl.load(weights_ptr + m, mask=live, other=0.0)
        counted = tl.load(counted_ptr + m, mask=live, other=0)
        total += tl.load(logps_ptr + counted, mask=live, other=0.0) * weight
        length += weight
        if HAS_REFERENCE:
            reference += tl.load(reference_ptr + m, mask=live, other=0.0) * weight
    length_sum = tl.sum(length, 0)
    # All tokens masked: the log-prob is 0 whatever it is divided by.
    return tl.sum(total, 0), tl.sum(reference, 0), tl.where(length_sum > 0.0, length_sum, 1.0)


@triton.jit
def _completion(
    number,
    ends_ptr,
    logps_ptr,
    counted_ptr,
    reference_ptr,
    weights_ptr,
    HAS_REFERENCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """``_sums`` of a completion; of none, for number -1, zeros."""
    start = tl.load(ends_ptr + number - 1, mask=number > 0, other=0)
    end = tl.load(ends_ptr + number, mask=number >= 0, other=0)
    return _sums(start, end, logps_ptr, counted_ptr, reference_ptr, weights_ptr, HAS_REFERENCE, BLOCK_M)


@triton.jit
def _pair_beta(pair, term_ptr, betas_ptr, HAS_BETAS: tl.constexpr):
    """The pair's own beta or the term's, scaled by the pair's margin."""
    beta = tl.load(term_ptr + 2)
    if HAS_BETAS:
        own, margin = tl.load(betas_ptr + 2 * pair), tl.load(betas_ptr + 2 * pair + 1)
        beta = tl.where(own == own, own, beta) * (1.0 + tl.load(term_ptr + 9) * margin)  # NaN: it has none
    return beta


@launch.Kernel
def _preference_loss_kernel(
    logps_ptr,  # (L,)
    counted_ptr,  # (M,)
    reference_ptr,  # (M,), if HAS_REFERENCE
    weights_ptr,  # (M,)
    ends_ptr,  # (C,) where each completion ends in M
    chosen_ptr,  # (P,)
    rejected_ptr,  # (P,)
    pair_weights_ptr,  # (P,)
    others_ptr,  # (P, 3), if HAS_OTHERS
    betas_ptr,  # (P, 2), if HAS_BETAS
    terms_ptr,  # (K, PARAMETERS)
    losses_ptr,  # (P,)
    rest_ptr,  # (6, P): rewards (2), logps (2), derivatives by logps (2); (12, P) with 5 of the first and the last
    P,
    K,
    mean_length,
    reward_beta,
    HAS_OTHERS: tl.constexpr,
    HAS_BETAS: tl.constexpr,
    NORMALISED: tl.constexpr,  # whether rewards are length-normalised log-probs
    HAS_REFERENCE: tl.constexpr,
    PARAMETERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    pair = tl.program_id(0)
    w, reference_w, length_w = _completion(
        tl.load(chosen_ptr + pair), ends_ptr, logps_ptr, counted_ptr, reference_ptr, weights_ptr, HAS_REFERENCE, BLOCK_M
    )
    r, reference_r, length_r = _completion(
        tl.load(rejected_ptr + pair), ends_ptr, logps_ptr, counted_ptr, reference_ptr, weights_ptr, HAS_REFERENCE,
        BLOCK_M,
    )  # fmt: skip
    total, total_dw, total_dr = w * 0.0, w * 0.0, w * 0.0
    if HAS_OTHERS:
        # Written out one by one: the compiler knows no lists.
        n0, n1, n2 = (
            tl.load(others_ptr + 3 * pair), tl.load(others_ptr + 3 * pair + 1), tl.load(others_ptr + 3 * pair + 2)
        )  # fmt: skip
        x0, reference_0, length_0 = _completion(
            n0, ends_ptr, logps_ptr, counted_ptr, reference_ptr, weights_ptr, HAS_REFERENCE, BLOCK_M
        )
        x1, reference_1, length_1 = _completion(
            n1, ends_ptr, logps_ptr, counted_ptr, reference_ptr, weights_ptr, HAS_REFERENCE, BLOCK_M
        )
        x2, reference_2, length_2 = _completion(
            n2, ends_ptr, logps_ptr, counted_ptr, reference_ptr, weights_ptr, HAS_REFERENCE, BLOCK_M
        )
        total_d0, total_d1, total_d2 = w * 0.0, w * 0.0, w * 0.0
    for k in range(K):
        term_ptr = terms_ptr + k * PARAMETERS
        kind, weight, sft_weight = tl.load(term_ptr).to(tl.int32), tl.load(term_ptr + 1), tl.load(term_ptr + 6)
        beta, delta = _pair_beta(pair, term_ptr, betas_ptr, HAS_BETAS), tl.load(term_ptr + 7)
        if kind < 12:
            loss, dw, dr = pair_term(
                kind, w, r, reference_w, reference_r, length_w, length_r, mean_length, beta, tl.load(term_ptr + 3),
                tl.load(term_ptr + 4), tl.load(term_ptr + 5), delta,
            )  # fmt: skip
            total += weight * loss
            total_dw += weight * dw
            total_dr += weight * dr
        elif HAS_OTHERS:
            loss, dw, dr, d0, d1, d2 = image_term(
                kind, w - reference_w, r - reference_r, x0 - reference_0, x1 - reference_1, x2 - reference_2, beta,
                delta, tl.load(term_ptr + 8),
            )  # fmt: skip
            complete = tl.where(kind == 12, n0 >= 0, (n1 >= 0) & (n2 >= 0))  # else the pair lacks a path
            total += tl.where(complete, weight * loss, 0.0)
            total_dw += tl.where(complete, weight * dw, 0.0)
            total_dr += tl.where(complete, weight * dr, 0.0)
            total_d0 += tl.where(complete, weight * d0, 0.0)
            total_d1 += tl.where(complete, weight * d1, 0.0)
            total_d2 += tl.where(complete, weight * d2, 0.0)
        total -= weight * sft_weight * w / mean_length
        total_dw -= weight * sft_weight / mean_length
    pair_weight = tl.load(pair_weights_ptr + pair)
    tl.store(losses_ptr + pair, total * pair_weight)
    paths = 5 if HAS_OTHERS else 2
    tl.store(rest_ptr + pair, reward_beta * (w / length_w if NORMALISED else w - reference_w))
    tl.store(rest_ptr + P + pair, reward_beta * (r / length_r if NORMALISED else r - reference_r))
    tl.store(rest_ptr + paths * P + pair, w)
    tl.store(rest_ptr + (paths + 1) * P + pair, r)
    tl.store(rest_ptr + (paths + 2) * P + pair, total_dw * pair_weight)
    tl.store(rest_ptr + (paths + 3) * P + pair, total_dr * pair_weight)
    if HAS_OTHERS:
        reward_0 = reward_beta * (x0 / length_0 if NORMALISED else x0 - reference_0)
        reward_1 = reward_beta * (x1 / length_1 if NORMALISED else x1 - reference_1)
        reward_2 = reward_beta * (x2 / length_2 if NORMALISED else x2 - reference_2)
        tl.store(rest_ptr + 2 * P + pair, tl.where(n0 >= 0, reward_0, float("nan")))
        tl.store(rest_ptr + 3 * P + pair, tl.where(n1 >= 0, reward_1, float("nan")))
        tl.store(rest_ptr + 4 * P + pair, tl.where(n2 >= 0, reward_2, float("nan")))
        tl.store(rest_ptr + 9 * P + pair, total_d0 * pair_weight)
        tl.store(rest_ptr + 10 * P + pair, total_d1 * pair_weight)
        tl.store(rest_ptr + 11 * P + pair, total_d2 * pair_weight)


@launch.Kernel
def _token_gradient_kernel(
    out_ptr,  # (L,)
    starts_ptr,  # (L + 1,) where the copies of each token begin in ``order``
    order_ptr,  # (M,) the copies, token by token
    completion_ptr,  # (M,)
    weights_ptr,  # (M,)
    gradient_ptr,  # (C,) of each completion's log-prob
    L,
    BLOCK_L: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    live = token < L
    start = tl.load(starts_ptr + token, mask=live, other=0)
    count = tl.load(starts_ptr + token + 1, mask=live, other=0) - start
    total = tl.zeros((BLOCK_L,), tl.float32)
    for copy in range(tl.max(count, 0)):  # the copies of a token are added in order: the same sum on every run
        m = tl.load(order_ptr + start + copy, mask=copy < count, other=0)
        completion = tl.load(completion_ptr + m, mask=copy < count, other=0)
        gradient = tl.load(gradient_ptr + completion, mask=copy < count, other=0.0)
        total += gradient * tl.load(weights_ptr + m, mask=copy < count, other=0.0)
    tl.store(out_ptr + token, total, mask=live)


@functools.lru_cache(maxsize=8)  # a run has one or two; copying it to the GPU each step would make the host wait
def _terms_tensor(terms: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(terms, device=device, dtype=torch.float32)


@torch.library.custom_op("vapr::preference_loss", mutates_args=())
def _preference_loss(
    token_logps: Tensor, reference_logps: Tensor | None, counted: Tensor, order: Tensor, starts: Tensor,
    token_weights: Tensor, completion: Tensor, ends: Tensor, chosen: Tensor, rejected: Tensor, pair_weights: Tensor,
    others: Tensor | None, betas: Tensor | None, terms: list[float], mean_chosen_length: float, reward_beta: float,
    normalised: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Losses (P,), and (6, P): rewards (2), completion log-probs (2), derivatives of the losses by these (2).

    With ``others`` it is (12, P): five rewards and five derivatives.
    """
    P = len(chosen)
    losses, rest = token_logps.new_empty(P), token_logps.new_empty(_num_rows(others), P)
    reference = token_logps if reference_logps is None else reference_logps.contiguous()
    if P:
        _preference_loss_kernel[(P,)](
            token_logps.contiguous(), counted.contiguous(), reference, token_weights.contiguous(), ends.contiguous(),
            chosen.contiguous(), rejected.contiguous(), pair_weights.contiguous(),
            chosen if others is None else others.contiguous(), token_logps if betas is None else betas.contiguous(),
            _terms_tensor(tuple(terms), losses.device), losses, rest, P, len(terms) // PARAMETERS, mean_chosen_length,
            reward_beta, HAS_OTHERS=others is not None, HAS_BETAS=betas is not None, NORMALISED=normalised,
            HAS_REFERENCE=reference_logps is not None, PARAMETERS=PARAMETERS, BLOCK_M=BLOCK_M,
        )  # fmt: skip
    return losses, rest


def _num_rows(others: Tensor | None) -> int:
    return 6 if others is None else 12


@_preference_loss.register_fake
def _(token_logps, *arguments):
    P = len(arguments[7])
    return token_logps.new_empty(P), token_logps.new_empty(_num_rows(arguments[10]), P)


@torch.library.custom_op("vapr::preference_loss_backward", mutates_args=())
def _preference_loss_backward(
    dlosses: Tensor, derivatives: Tensor, order: Tensor, starts: Tensor, token_weights: Tensor, completion: Tensor,
    num_completions: int, chosen: Tensor, rejected: Tensor, others: Tensor | None,
) -> Tensor:  # fmt: skip
    """(L,): the gradient of every token's log-prob."""
    by_logps = dlosses * derivatives
    gradient = by_logps.new_zeros(num_completions)
    gradient.index_add_(0, chosen, by_logps[0]).index_add_(0, rejected, by_logps[1])
    if others is not None:  # the derivative by a path that a pair lacks is 0, wherever it is added
        gradient.index_add_(0, others.T.clamp(min=0).flatten(), by_logps[2:].flatten())
    num_tokens = len(starts) - 1
    out = torch.empty(num_tokens, dtype=torch.float32, device=starts.device)
    if num_tokens:
        block = 128
        _token_gradient_kernel[(triton.cdiv(num_tokens, block),)](
            out,
            starts.contiguous(),
            order.contiguous(),
            completion.contiguous(),
            token_weights.contiguous(),
            gradient,
            num_tokens,
            BLOCK_L=block,
        )
    return out


@_preference_loss_backward.register_fake
def _(dlosses, derivatives, order, starts, *arguments):
    return dlosses.new_empty(len(starts) - 1)


def _setup_context(ctx, inputs, output) -> None:
    _, _, _, order, starts, token_weights, completion, ends, chosen, rejected, _, others, *_ = inputs
    ctx.set_materialize_grads(False)
    ctx.num_completions = len(ends)
    ctx.save_for_backward(output[1], order, starts, token_weights, completion, chosen, rejected, others)


def _backward(ctx, dlosses, *_):
    if dlosses is None:
        return (None,) * 17
    rest, order, starts, token_weights, completion, chosen, rejected, others = ctx.saved_tensors
    derivatives = rest[4:] if others is None else rest[7:]
    dtokens = _preference_loss_backward(
        dlosses, derivatives, order, starts, token_weights, completion, ctx.num_completions, chosen, rejected, others
    )
    return dtokens, *(None,) * 16


_preference_loss.register_autograd(_backward, setup_context=_setup_context)


def _parameters(term: Term) -> list[float]:
    kind = float(KINDS.index(term.kind))
    return [
        kind, term.weight, term.beta, term.gamma, term.label_smoothing, term.dpop_lambda, term.sft_weight, term.delta,
        term.consistency, term.margin_weight,
    ]  # fmt: skip


def preference_loss(
    token_logps: Tensor, reference_logps: Tensor | None, completions: Completions, terms: Sequence[Term], *,
    mean_chosen_length: float,
) -> PairLosses:  # fmt: skip
    """Weighted preference losses of pairs; see :mod:`vapr_kernels.losses` for the formulas.

    Args:
        token_logps: log-probs of the predicted tokens, fp32, shape (L,).
        reference_logps: those of the reference, completion by completion, fp32, shape (M,); None where no loss needs
            one.
        completions: which tokens each completion sums, and which completions make a pair.
        terms: at least one, summed with their weights; rewards are those of the first that prefers. A pair without the
            paths that a term compares has no loss of that term.
        mean_chosen_length: chosen tokens of the whole step divided by its pairs, over all ranks.

    Raises:
        ValueError: naming the argument with a wrong shape, dtype, device or value.
    """
    if token_logps.shape != (completions.counted.num_rows,) or token_logps.dtype != torch.float32:
        raise ValueError(
            f"token_logps must be fp32 of shape ({completions.counted.num_rows},), "
            f"got {token_logps.dtype} {tuple(token_logps.shape)}"
        )
    counted = completions.token_weights.shape
    if reference_logps is not None and (reference_logps.shape != counted or reference_logps.dtype != torch.float32):
        raise ValueError(
            f"reference_logps must be fp32 of shape {tuple(counted)}, "
            f"got {reference_logps.dtype} {tuple(reference_logps.shape)}"
        )
    c = completions
    parts = (
        c.counted.rows, c.token_weights, c.completion, c.ends, c.chosen, c.rejected, c.pair_weights, c.others, c.betas
    )  # fmt: skip
    devices = {x.device for x in (token_logps, reference_logps, *parts) if x is not None}
    if len(devices) > 1:
        raise ValueError(
            f"token_logps, reference_logps and completions lie on {' and '.join(sorted(map(str, devices)))}"
        )
    if unknown := [term.kind for term in terms if term.kind not in KINDS]:
        raise ValueError(f"terms: no loss is called {unknown[0]!r}; there are {', '.join(KINDS)}")
    if not terms:
        raise ValueError("terms must name at least one loss")
    if not runs_triton(token_logps):
        return PairLosses(
            *naive.preference_loss(
                token_logps, reference_logps, completions, terms, mean_chosen_length=mean_chosen_length
            )
        )
    rewarded, others = rewarded_term(terms), None
    if compares_images(terms):
        others = c.chosen.new_full((len(c.chosen), len(OTHER_PATHS)), -1) if c.others is None else c.others
    losses, rest = _preference_loss(
        token_logps, reference_logps, c.counted.rows, c.counted.order, c.counted.starts, c.token_weights, c.completion,
        c.ends, c.chosen, c.rejected, c.pair_weights, others, c.betas,
        [value for term in terms for value in _parameters(term)], mean_chosen_length, rewarded.beta,
        rewarded.kind in NO_REFERENCE,
    )  # fmt: skip
    rest = rest.detach()
    paths = 2 if others is None else 5
    return PairLosses(losses, rest[:paths].T, rest[paths : paths + 2].T)
