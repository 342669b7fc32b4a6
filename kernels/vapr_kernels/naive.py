"""The slow, obvious version of every operation: the specification, and the truth in tests.

T = packed tokens, K = gathered rows, L = predictions, M = predictions counted once per completion, P = pairs,
D = hidden, V = vocabulary, I = intermediate size, H = heads, G = key heads, E = head dim.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from vapr_kernels.losses import Completions, PairLogps, Term, preference_losses

if TYPE_CHECKING:
    from vapr_kernels.adapted_linears import Linears
    from vapr_kernels.gather_rows import RowIndex


def linear_logps(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Compute the log-prob of each label under ``softmax(hidden @ head.T)``, shape (L,), at least fp32.

    Through the log-odds of all other columns: near p = 1 the gradient of a log-softmax is 1 - exp(logp), rounded to
    nothing or to noise.
    """
    hidden, head = hidden.to(_accumulate(hidden)), head.to(_accumulate(head))
    logits = hidden @ head.T  # (L, V)
    # All of the sum is relative to this one logit; in fp64 it is exact.
    target = (hidden.double() * head[labels].double()).sum(-1)
    log_odds = logits.scatter(-1, labels[:, None], -torch.inf).logsumexp(-1) - target
    return F.logsigmoid(-log_odds.to(logits.dtype))


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """``x[rows]``, shape (K, ...)."""
    return x[rows]


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths_q: Sequence[int], lengths_k: Sequence[int], *, scale: float,
    both_ways: Sequence[bool] | None = None, window: int | None = None, forks: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """Attention inside each sequence, (T, H, E): a query sees the keys up to its own, the last query all of them.

    Where a sequence looks ``both_ways`` a query sees later keys, too; and no key ``window`` or more before its own.
    Before the keys of a sequence with a fork come the first so many of the last one without, where that is -1.
    """
    outs = []
    splits = (q.split(lengths_q), k.split(lengths_k), v.split(lengths_k))
    see = (both_ways or [False] * len(lengths_q), forks or [-1] * len(lengths_q))
    for q_n, k_n, v_n, later, fork in zip(*splits, *see, strict=True):
        if fork == -1:
            trunk = k_n, v_n
        else:
            k_n, v_n = torch.cat([trunk[0][:fork], k_n]), torch.cat([trunk[1][:fork], v_n])
        num_q, num_k, group = len(q_n), len(k_n), q.shape[1] // k.shape[1]
        scores = torch.einsum("qhe,khe->hqk", q_n, k_n.repeat_interleave(group, 1)) * scale
        keys = torch.arange(num_k, device=q.device)
        own = keys[num_k - num_q :, None]
        hidden = (keys > own) & (not later)
        if window is not None:
            hidden = hidden | (keys <= own - window)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        outs.append(torch.einsum("hqk,khe->qhe", weights, v_n.repeat_interleave(group, 1)))
    return torch.cat(outs)


def preference_loss(
    token_logps: Tensor, reference_logps: Tensor | None, completions: Completions, terms: Sequence[Term], *,
    mean_chosen_length: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute losses (P,), rewards and completion log-probs (P, 2) from token log-probs (L,).

    Rewards are (P, 2); where a term compares images (P, 5), with those of OTHER_PATHS.
    """
    c = completions
    logps = c.sums(token_logps[c.counted.rows] * c.token_weights)
    reference = torch.zeros_like(logps) if reference_logps is None else c.sums(reference_logps * c.token_weights)
    num_tokens = c.sums(c.token_weights)
    num_tokens = torch.where(num_tokens > 0, num_tokens, 1.0)  # all tokens masked: the log-prob is 0 / whatever
    others = {}
    if c.others is not None:
        index = c.others.clamp(min=0)
        others = {"others": logps[index], "reference_others": reference[index], "other_lengths": num_tokens[index]}
        others["has_others"] = c.others >= 0
    pairs = PairLogps(
        chosen=logps[c.chosen],
        rejected=logps[c.rejected],
        reference_chosen=reference[c.chosen],
        reference_rejected=reference[c.rejected],
        chosen_lengths=num_tokens[c.chosen],
        rejected_lengths=num_tokens[c.rejected],
        mean_chosen_length=mean_chosen_length,
        betas=c.betas,
        **others,
    )
    losses, *rewards = preference_losses(pairs, terms)
    both = torch.stack([pairs.chosen, pairs.rejected], dim=1).detach()
    return losses * c.pair_weights, torch.stack(rewards, dim=1), both


def _accumulate(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Compute ``x W^T + bias + scale (x A^T) B^T`` as peft does, shape (T, O)."""
    return F.linear(x, weight, bias) + F.linear(F.linear(x, a), b) * scale


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, shape (T, I), rounded once."""
    return (F.silu(gate.to(_accumulate(gate))) * up.to(_accumulate(gate))).to(gate.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x`` (T, D) over its root mean square, times ``weight``, rounded once."""
    wide = x.to(_accumulate(x))
    mean_square = wide.square().mean(-1, keepdim=True)
    return (wide * (mean_square + eps).rsqrt() * weight.to(wide.dtype)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the norm of ``x + residual``, and that sum, shape (T, D) each."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def linears(x: Tensor, layers: "Linears", *, adapted: bool = True) -> list[Tensor]:
    """Run linear layers with their adapters on x (T, D), one by one as peft does; (T, O_i) each."""
    outs = []
    for weight, bias, a, b, scale in zip(
        layers.weights, layers.biases, layers.downs, layers.ups, layers.scales, strict=True
    ):
        assert weight is not None
        if adapted and a is not None and b is not None:
            outs.append(lora_linear(x, weight, bias, a, b, scale))
        else:
            outs.append(F.linear(x, weight, bias))
    return outs


def normed_linears(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, layers: "Linears", *, adapted: bool = True
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the sum with the residual, and linear layers of its norm."""
    total = x if residual is None else x + residual
    return total, tuple(linears(rms_norm(total, weight, eps), layers, adapted=adapted))


def normed_attention(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, qkv: "Linears", output: "Linears",
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], learned: tuple[Tensor, ...] = (), *, adapted: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the projection of what ``attend`` makes of queries, keys and values of the norm of a sum, and the sum."""
    total, (q, k, v) = normed_linears(x, residual, weight, eps, qkv, adapted=adapted)
    (out,) = linears(attend(q, k, v), output, adapted=adapted)
    return out, total


def gated_mlp(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, gate_up: "Linears", down: "Linears", *,
    adapted: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return ``down(silu(gate(n)) * up(n))`` of the norm of a sum, and the sum."""
    total = x + residual
    gate, up = linears(rms_norm(total, weight, eps), gate_up, adapted=adapted)
    (out,) = linears(swiglu(gate, up), down, adapted=adapted)
    return out, total


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x * cos + rotate_half(x) * sin``, shape (T, H, E), rounded once."""
    wide = x.to(_accumulate(x))
    x1, x2 = wide.chunk(2, dim=-1)
    cos, sin = cos[:, None].to(wide.dtype), sin[:, None].to(wide.dtype)
    return (wide * cos + torch.cat((-x2, x1), dim=-1) * sin).to(x.dtype)


def gather_keys_values(k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, index: "RowIndex") -> tuple[Tensor, Tensor]:
    """Return rotated keys and values of the gathered rows, (K, G, E)."""
    return rotary(k, cos, sin)[index.rows], v[index.rows]
