"""preference_loss: token log-probs -> losses of pairs, in one launch.

One program takes one pair: it sums the token log-probs of both completions and of the reference, forms the log-ratios,
and evaluates every term of the loss together with its derivative by the two sums. Formulas and sources: losses.py; the
derivatives are worked out there by autograd and here by hand.

L = predictions, M = predictions counted once per completion, C = completions, P = pairs.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vapr_kernels import launch, naive
from vapr_kernels.launch import runs_triton, tl, triton
from vapr_kernels.losses import NO_REFERENCE, Completions, Term, rewarded_term

KINDS = (
    "sigmoid", "robust", "hinge", "ipo", "bco_pair", "apo_zero", "apo_down", "simpo", "orpo", "dpop", "sft",
)  # fmt: skip
"""The kernel knows a kind by its place here."""
PARAMETERS = 7
"""Of each term: kind, weight, beta, gamma, label smoothing, lambda of DPO-positive, weight of the added SFT."""
BLOCK_M = 128


class PairLosses(NamedTuple):
    """Losses, rewards and log-probs of P pairs."""

    losses: Tensor  # (P,), times the pair weights; the only one with a gradient
    rewards: Tensor  # (P, 2), chosen and rejected
    logps: Tensor  # (P, 2), of the completions


@triton.jit
def _sigmoid(x):
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, small) / (1.0 + small)


@triton.jit
def _log1p(x):
    one_plus = 1.0 + x
    # Accurate where 1 + x rounds (Kahan's way)
    return tl.where(one_plus == 1.0, x, tl.log(one_plus) * (x / tl.where(one_plus == 1.0, 1.0, one_plus - 1.0)))


@triton.jit
def _log_sigmoid(x):
    return tl.where(x < 0.0, x, 0.0) - _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _expm1(x):
    """e^x - 1 for x <= 0, accurate at both ends (Kahan's way)."""
    power = tl.exp(x)
    inside = (power != 1.0) & (power - 1.0 != -1.0)
    corrected = (power - 1.0) * (x / tl.where(inside, tl.log(power), 1.0))
    return tl.where(power == 1.0, x, tl.where(inside, corrected, -1.0))


@triton.jit
def _log1mexp(x):
    """log(1 - e^x) for x < 0 (losses.py)."""
    return tl.where(x > -0.693, tl.log(-_expm1(tl.where(x > -1e-12, -1e-12, x))), _log1p(-tl.exp(x)))


@triton.jit
def _smoothed(z, e):
    """-(1 - e) log s(z) - e log s(-z), and its derivative."""
    return -(1.0 - e) * _log_sigmoid(z) - e * _log_sigmoid(-z), e * _sigmoid(z) - (1.0 - e) * _sigmoid(-z)


@triton.jit
def _term(kind, w, r, reference_w, reference_r, length_w, length_r, mean_length, beta, gamma, e, penalty):
    """One loss of one pair, and its derivatives by the log-probs w and r of chosen and rejected."""
    a, b = w - reference_w, r - reference_r  # log-ratios
    z = beta * (a - b)
    loss, dw, dr = z, z, z  # one type in every branch
    if kind == 0:  # sigmoid
        loss, dz = _smoothed(z, e)
        dw, dr = beta * dz, -beta * dz
    elif kind == 1:  # robust
        loss = (-(1.0 - e) * _log_sigmoid(z) + e * _log_sigmoid(-z)) / (1.0 - 2.0 * e)
        dz = -((1.0 - e) * _sigmoid(-z) + e * _sigmoid(z)) / (1.0 - 2.0 * e)
        dw, dr = beta * dz, -beta * dz
    elif kind == 2:  # hinge
        loss = tl.where(z < 1.0, 1.0 - z, 0.0)
        dw = tl.where(z < 1.0, -beta, 0.0)
        dr = -dw
    elif kind == 3:  # ipo
        gap = a / length_w - b / length_r - 1.0 / (2.0 * beta)
        loss, dw, dr = gap * gap, 2.0 * gap / length_w, -2.0 * gap / length_r
    elif kind == 4:  # bco_pair
        loss = -_log_sigmoid(beta * a) - _log_sigmoid(-beta * b)
        dw, dr = -beta * _sigmoid(-beta * a), beta * _sigmoid(beta * b)
    elif kind == 5:  # apo_zero
        loss = 1.0 - _sigmoid(beta * a) + _sigmoid(beta * b)
        dw = -beta * _sigmoid(beta * a) * _sigmoid(-beta * a)
        dr = beta * _sigmoid(beta * b) * _sigmoid(-beta * b)
    elif kind == 6:  # apo_down
        loss = _sigmoid(beta * a) + 1.0 - _sigmoid(z)
        dr = beta * _sigmoid(z) * _sigmoid(-z)
        dw = beta * _sigmoid(beta * a) * _sigmoid(-beta * a) - dr
    elif kind == 7:  # simpo
        loss, dz = _smoothed(beta * (w / length_w - r / length_r) - gamma, e)
        dw, dr = beta * dz / length_w, -beta * dz / length_r
    elif kind == 8:  # orpo
        p, q = w / length_w, r / length_r
        log_odds = (p - q) - (_log1mexp(p) - _log1mexp(q))
        loss = -w / mean_length - beta * _log_sigmoid(log_odds)
        down = -beta * _sigmoid(-log_odds)
        dw = down * tl.where(p > -1e-12, 1.0, -1.0 / _expm1(tl.minimum(p, -1e-12))) / length_w - 1.0 / mean_length
        dr = -down * tl.where(q > -1e-12, 1.0, -1.0 / _expm1(tl.minimum(q, -1e-12))) / length_r
    elif kind == 9:  # dpop
        z = beta * (a - b - penalty * tl.where(a < 0.0, -a, 0.0))
        loss, dz = -_log_sigmoid(z), -_sigmoid(-z)
        dw, dr = beta * dz * tl.where(a < 0.0, 1.0 + penalty, 1.0), -beta * dz
    else:  # sft
        loss, dw, dr = -w / mean_length, -1.0 / mean_length + 0.0 * w, 0.0 * w
    return loss, dw, dr


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
    terms_ptr,  # (K, PARAMETERS)
    losses_ptr,  # (P,)
    rest_ptr,  # (6, P): rewards (2), logps (2), derivatives by logps (2)
    P,
    K,
    mean_length,
    reward_beta,
    NORMALISED: tl.constexpr,  # whether rewards are length-normalised log-probs
    HAS_REFERENCE: tl.constexpr,
    PARAMETERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    pair = tl.program_id(0)
    chosen, rejected = tl.load(chosen_ptr + pair), tl.load(rejected_ptr + pair)
    start, end = tl.load(ends_ptr + chosen - 1, mask=chosen > 0, other=0), tl.load(ends_ptr + chosen)
    w, reference_w, length_w = _sums(
        start, end, logps_ptr, counted_ptr, reference_ptr, weights_ptr, HAS_REFERENCE, BLOCK_M
    )
    start, end = tl.load(ends_ptr + rejected - 1, mask=rejected > 0, other=0), tl.load(ends_ptr + rejected)
    r, reference_r, length_r = _sums(
        start, end, logps_ptr, counted_ptr, reference_ptr, weights_ptr, HAS_REFERENCE, BLOCK_M
    )
    total, total_dw, total_dr = w * 0.0, w * 0.0, w * 0.0
    for k in range(K):
        term_ptr = terms_ptr + k * PARAMETERS
        loss, dw, dr = _term(
            tl.load(term_ptr).to(tl.int32), w, r, reference_w, reference_r, length_w, length_r, mean_length,
            tl.load(term_ptr + 2), tl.load(term_ptr + 3), tl.load(term_ptr + 4), tl.load(term_ptr + 5),
        )  # fmt: skip
        weight, sft_weight = tl.load(term_ptr + 1), tl.load(term_ptr + 6)
        total += weight * (loss - sft_weight * w / mean_length)
        total_dw += weight * (dw - sft_weight / mean_length)
        total_dr += weight * dr
    pair_weight = tl.load(pair_weights_ptr + pair)
    tl.store(losses_ptr + pair, total * pair_weight)
    tl.store(rest_ptr + pair, reward_beta * (w / length_w if NORMALISED else w - reference_w))
    tl.store(rest_ptr + P + pair, reward_beta * (r / length_r if NORMALISED else r - reference_r))
    tl.store(rest_ptr + 2 * P + pair, w)
    tl.store(rest_ptr + 3 * P + pair, r)
    tl.store(rest_ptr + 4 * P + pair, total_dw * pair_weight)
    tl.store(rest_ptr + 5 * P + pair, total_dr * pair_weight)


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
    terms: list[float], mean_chosen_length: float, reward_beta: float, normalised: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Losses (P,), and (6, P): rewards (2), completion log-probs (2), derivatives of the losses by these (2)."""
    P = len(chosen)
    losses, rest = token_logps.new_empty(P), token_logps.new_empty(6, P)
    reference = token_logps if reference_logps is None else reference_logps.contiguous()
    if P:
        _preference_loss_kernel[(P,)](
            token_logps.contiguous(), counted.contiguous(), reference, token_weights.contiguous(), ends.contiguous(),
            chosen.contiguous(), rejected.contiguous(), pair_weights.contiguous(),
            _terms_tensor(tuple(terms), losses.device), losses, rest, P, len(terms) // PARAMETERS, mean_chosen_length,
            reward_beta, NORMALISED=normalised, HAS_REFERENCE=reference_logps is not None, PARAMETERS=PARAMETERS,
            BLOCK_M=BLOCK_M,
        )  # fmt: skip
    return losses, rest


@_preference_loss.register_fake
def _(token_logps, *arguments):
    P = len(arguments[7])
    return token_logps.new_empty(P), token_logps.new_empty(6, P)


@torch.library.custom_op("vapr::preference_loss_backward", mutates_args=())
def _preference_loss_backward(
    dlosses: Tensor, derivatives: Tensor, order: Tensor, starts: Tensor, token_weights: Tensor, completion: Tensor,
    num_completions: int, chosen: Tensor, rejected: Tensor,
) -> Tensor:  # fmt: skip
    """(L,): the gradient of every token's log-prob."""
    by_logps = dlosses * derivatives
    gradient = by_logps.new_zeros(num_completions)
    gradient.index_add_(0, chosen, by_logps[0]).index_add_(0, rejected, by_logps[1])
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
    _, _, _, order, starts, token_weights, completion, ends, chosen, rejected, *_ = inputs
    ctx.set_materialize_grads(False)
    ctx.num_completions = len(ends)
    ctx.save_for_backward(output[1], order, starts, token_weights, completion, chosen, rejected)


def _backward(ctx, dlosses, *_):
    if dlosses is None:
        return (None,) * 15
    rest, order, starts, token_weights, completion, chosen, rejected = ctx.saved_tensors
    dtokens = _preference_loss_backward(
        dlosses, rest[4:], order, starts, token_weights, completion, ctx.num_completions, chosen, rejected
    )
    return dtokens, *(None,) * 14


_preference_loss.register_autograd(_backward, setup_context=_setup_context)


def _parameters(term: Term) -> list[float]:
    kind = float(KINDS.index(term.kind))
    return [
        kind, term.weight, term.beta, term.gamma, term.label_smoothing, term.dpop_lambda, term.sft_weight,
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
        terms: at least one, summed with their weights; rewards are those of the first that prefers.
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
    parts = (c.counted.rows, c.token_weights, c.completion, c.ends, c.chosen, c.rejected, c.pair_weights)
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
    rewarded = rewarded_term(terms)
    losses, rest = _preference_loss(
        token_logps, reference_logps, completions.counted.rows, completions.counted.order, completions.counted.starts,
        completions.token_weights, completions.completion, completions.ends, completions.chosen, completions.rejected,
        completions.pair_weights, [value for term in terms for value in _parameters(term)], mean_chosen_length,
        rewarded.beta, rewarded.kind in NO_REFERENCE,
    )  # fmt: skip
    rest = rest.detach()
    return PairLosses(losses, rest[:2].T, rest[2:4].T)
