"""Losses of one pair and their derivatives, inside a kernel; a kind is its place in ``KINDS`` of preference_loss.py.

Formulas and sources: losses.py and image_losses.py. The derivatives are worked out by hand.
"""

from vapr_kernels.launch import tl, triton


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
def pair_term(kind, w, r, reference_w, reference_r, length_w, length_r, mean_length, beta, gamma, e, penalty, delta):
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
    elif kind == 10:  # sft
        loss, dw, dr = -w / mean_length, -1.0 / mean_length + 0.0 * w, 0.0 * w
    else:  # anchor; those that compare images are in image_term
        loss, dw, dr = -_log_sigmoid(beta * a - delta), -beta * _sigmoid(delta - beta * a), 0.0 * w
    return loss, dw, dr


@triton.jit
def image_term(kind, chosen, rejected, second, chosen_swapped, rejected_swapped, beta, delta, consistency):
    """One loss of one pair that compares images, and its derivatives by the five log-ratios."""
    a, b = chosen - rejected_swapped, rejected - chosen_swapped
    loss, dw, dr, dsecond, da, db = a * 0.0, a * 0.0, a * 0.0, a * 0.0, a * 0.0, a * 0.0
    if kind == 12:  # image
        loss = -_log_sigmoid(beta * (chosen - second))
        dw = -beta * _sigmoid(-beta * (chosen - second))
        dsecond = -dw
    else:  # symmetric
        loss = -0.5 * (_log_sigmoid(beta * a) + _log_sigmoid(beta * b)) + consistency * (a - b) * (a - b)
        loss -= _log_sigmoid(beta * chosen - delta) + _log_sigmoid(beta * rejected - delta)
        da = -0.5 * beta * _sigmoid(-beta * a) + 2.0 * consistency * (a - b)
        db = -0.5 * beta * _sigmoid(-beta * b) - 2.0 * consistency * (a - b)
        dw = da - beta * _sigmoid(delta - beta * chosen)
        dr = db - beta * _sigmoid(delta - beta * rejected)
    return loss, dw, dr, dsecond, -db, -da
