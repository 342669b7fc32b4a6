"""row_stats: log-prob and odds of a row from its sum of exponentials (see exp_logits).

With total and o of exp_logits, t = log total + o log 2 and p the probability of the target:

    logp = -softplus(t)     1 - p = sigmoid(t)     p_v = (1 - p) / total * e_v  for v != y

Where e is stored in bf16, p_v divides by the sum of e as stored: rounding then moves probability between the other
columns, but the p_v still add up to 1 - p, and where one column has nearly all of it nothing is lost.

L = rows (predictions).
"""

import math
from dataclasses import dataclass

from torch import Tensor

from vapr_kernels.launch import tl, triton

LOG2E = tl.constexpr(1 / math.log(2))
LN2_HIGH = tl.constexpr(0.693145751953125)
"""The first bits of log 2: whole numbers of octaves times this are exact in fp32."""
LN2_LOW = tl.constexpr(math.log(2) - 0.693145751953125)
SAFE = tl.constexpr(2.0**100)
"""e @ W must not overflow either; weights are far below 2^27."""

OFFSET = 29.0
"""Octaves of a row whose log-prob is unknown: total is safe for t in [-49, 89]."""


@dataclass(frozen=True, slots=True, eq=False)
class RowStats:
    """What one pass over the logits gives for each row. All (L,) fp32, fp64 where the inputs are."""

    logps: Tensor
    log_odds: Tensor  # t
    scale: Tensor  # (1 - p) / total: e * scale are the probabilities of the other columns
    target: Tensor  # l_y, fp64
    offset: Tensor  # o


@triton.jit
def wrong_probability(t):
    """1 - p of the target: sigmoid(t), to full relative accuracy at both ends."""
    small = tl.exp(-tl.abs(t))
    return tl.where(t < 0.0, small, 1.0) / (1.0 + small)


@triton.jit
def base_of(target, offset):
    """Return the logit whose e is 1, as a sum of two fp32 numbers. ``target`` is fp64.

    Subtracting it from a logit loses nothing that counts: what is left is small where e matters, however far the target
    lies from the other columns.
    """
    octaves = offset.to(tl.float64)
    base = target + (octaves * LN2_HIGH + octaves * LN2_LOW)
    high = base.to(tl.float32)
    return high, (base - high.to(tl.float64)).to(tl.float32)


@triton.jit
def store_row_stats(total, stored, offset, rows, live, out_ptr, L):
    """Store logp, t and scale into ``out`` (3, L); ``stored`` is total as stored."""
    # log2 total is split into exponent and mantissa, so that exponent and offset cancel exactly.
    bits = total.to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) & 0xFF) - 127
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    octaves = exponent.to(tl.float32) + offset
    t = octaves * LN2_HIGH + (octaves * LN2_LOW + tl.log(mantissa))
    t = tl.where(
        (total > 0.0) & (float("inf") > total), t, tl.where(total == 0.0, float("-inf"), total)
    )  # inf and NaN show
    small = tl.exp(-tl.abs(t))
    one_plus = 1.0 + small
    # log1p, accurate where 1 + small rounds (Kahan's way)
    log1p = tl.where(one_plus == 1.0, small, tl.log(one_plus) * (small / (one_plus - 1.0)))
    logp = tl.where(t == t, -tl.where(t > 0.0, t, 0.0) - log1p, t)
    scale = tl.where(stored == 0.0, 0.0, wrong_probability(t) / stored)
    tl.store(out_ptr + rows, logp, mask=live)
    tl.store(out_ptr + L + rows, t, mask=live)
    tl.store(out_ptr + 2 * L + rows, scale, mask=live)


@triton.jit
def is_unsafe(total):
    """Whether a sum left the range in which nothing is lost. NaN is."""
    return ~((total > 1.0 / SAFE) & (total < SAFE))


@triton.jit
def safe_offset(largest, target):
    """Octaves that bring the largest e just below 1; 0 where there is no other column to speak of."""
    return tl.where(tl.abs(largest) < 1e30, tl.ceil((largest - target.to(tl.float32)) * LOG2E), 0.0)
