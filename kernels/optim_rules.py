"""The update rules of the optimizers in Triton: csrc/math/<rule>.h, line for line, the same bits.

What each step is for stands there, and so do the formulas. A rule takes the constants ``c`` of a tensor
(optim_constants.py, in the order of the C++ struct), a tile of the parameter ``p`` and of the gradient
``g``, unscaled, clipped and with the sign that minimizes, and its states ``s``, a tuple of as many as
``states_of`` says; it returns the new ``p`` and ``s``. ``VARIANT`` has the bits of the C++ kVariant but
those of torch's tails: where ``tail`` is given, elements that it is true for are computed so.
Launch with enable_fp_fusion=False: an fma stands only where the formula has one.
"""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl

from .activation import _max

RULES = ("SGD", "Adam", "Adagrad", "RMSprop", "NAdam", "RAdam", "Adamax", "Lion", "LAMB")
COUNTS_STEPS = {"Adam", "Adagrad", "RMSprop", "NAdam", "RAdam", "Adamax", "LAMB"}
HAS_TAILS = {"Adam", "Adagrad"}  # rules that torch's kernels round otherwise at the end of a tensor
FLAGS = {
    "maximize": 1,
    "amsgrad": 2,
    "nesterov": 4,
    "decoupled": 8,
    "centered": 16,
}  # tt_optim_flag

DECAY = tl.constexpr(1)  # weight decay enters the gradient, for every rule that has it
SGD_MOMENTUM, SGD_NESTEROV, SGD_FRESH = tl.constexpr(2), tl.constexpr(4), tl.constexpr(8)
ADAM_AMSGRAD = tl.constexpr(2)
RMSPROP_MOMENTUM, RMSPROP_CENTERED = tl.constexpr(2), tl.constexpr(4)


def variants(rule: str, groups: np.ndarray, fresh: bool) -> np.ndarray:
    """<rule>_variant of each group (a structured array of tt_optim_group)."""

    def flag(name: str) -> np.ndarray:
        return groups["flags"] & FLAGS[name] != 0

    decay = groups["weight_decay"] != 0
    into_gradient = decay & ~flag("decoupled")
    if rule == "SGD":
        moves = 2 + 4 * flag("nesterov") + 8 * fresh
        return decay + np.where(groups["momentum"] != 0, moves, 0)
    if rule == "Adam":
        return into_gradient + 2 * flag("amsgrad")
    if rule == "RMSprop":
        return decay + 2 * (groups["momentum"] > 0) + 4 * flag("centered")
    if rule in ("NAdam", "RAdam"):
        return into_gradient.astype(np.int64)
    return decay.astype(np.int64) if rule in ("Adagrad", "Adamax") else np.zeros(len(groups), int)


@triton.constexpr_function
def states_of(rule, variant):
    """kStates: how many states a variant of a rule has."""
    if rule == "SGD":
        return 1 if variant & 2 else 0
    if rule == "Adam":
        return 3 if variant & 2 else 2
    if rule == "RMSprop":
        return 1 + (variant >> 1 & 1) + (variant >> 2 & 1)
    return 1 if rule in ("Adagrad", "Lion") else 2


@triton.constexpr_function
def is_signed(rule, state):
    """Whether a state can be negative."""
    if rule == "RMSprop":
        return state > 0
    return rule != "Adagrad" and state == 0


# --- what the rules share (optim_rule.h)


@triton.jit
def copysign(magnitude, sign):
    """|magnitude| with the sign of ``sign``."""
    bits = magnitude.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return (bits | sign.to(tl.int32, bitcast=True) & -2147483648).to(tl.float32, bitcast=True)


@triton.jit
def lerp(start, end, coefficient, from_end):
    base = tl.where(from_end == 1.0, end, start)
    return tl.fma(end - start, coefficient, base)


@triton.jit
def decay_into_gradient(g, p, weight_decay):
    return tl.fma(p, weight_decay, g)


@triton.jit
def add_quotient(p, value, numerator, denominator):
    return p + tl.div_rn(value * numerator, denominator)


@triton.jit
def average_square(v, g, beta, rest):
    return tl.fma(rest * g, g, v * beta)


# --- the rules


@triton.jit
def sgd(c, p, g, s, VARIANT: tl.constexpr):
    minus_lr, weight_decay, momentum, rest = c[0], c[1], c[2], c[3]
    if DECAY & VARIANT:
        g = decay_into_gradient(g, p, weight_decay)
    if SGD_MOMENTUM & VARIANT:
        b = g if SGD_FRESH & VARIANT else tl.fma(g, rest, s[0] * momentum)
        g = tl.fma(b, momentum, g) if SGD_NESTEROV & VARIANT else b
        s = (b,)
    return tl.fma(g, minus_lr, p), s


@triton.jit
def adam(c, p, g, s, tail, VARIANT: tl.constexpr):
    coefficient, from_end, factor, weight_decay, beta2, rest2 = c[0], c[1], c[2], c[3], c[4], c[5]
    minus_step_size, correction2_sqrt, eps = c[6], c[7], c[8]
    m, v = s[0], s[1]
    if DECAY & VARIANT:
        g = decay_into_gradient(g, p, weight_decay)
    else:
        p = p * factor
    m = lerp(m, g, coefficient, from_end)
    body = average_square(v, g, beta2, rest2)
    v = body if tail is None else tl.where(tail, tl.fma(v, beta2, rest2 * g * g), body)
    if ADAM_AMSGRAD & VARIANT:
        largest = tl.where((s[2] != s[2]) | (v < s[2]), s[2], v)
        s = (m, v, largest)
    else:
        largest = v
        s = (m, v)
    denominator = tl.div_rn(tl.sqrt_rn(largest), correction2_sqrt) + eps
    return add_quotient(p, minus_step_size, m, denominator), s


@triton.jit
def adagrad(c, p, g, s, tail, VARIANT: tl.constexpr):
    minus_lr, weight_decay, eps = c[0], c[1], c[2]
    if tail is not None:
        minus_lr = tl.where(tail, c[3], minus_lr)
        weight_decay = tl.where(tail, c[4], weight_decay)
        eps = tl.where(tail, c[5], eps)
    if DECAY & VARIANT:
        g = decay_into_gradient(g, p, weight_decay)
    total = tl.fma(g, g, s[0])
    return add_quotient(p, minus_lr, g, tl.sqrt_rn(total) + eps), (total,)


@triton.jit
def rmsprop(c, p, g, s, VARIANT: tl.constexpr):
    coefficient, from_end, minus_lr, weight_decay = c[0], c[1], c[2], c[3]
    alpha, rest, momentum, eps = c[4], c[5], c[6], c[7]
    if DECAY & VARIANT:
        g = decay_into_gradient(g, p, weight_decay)
    v = average_square(s[0], g, alpha, rest)
    centered = v
    if RMSPROP_CENTERED & VARIANT:
        mean = lerp(s[2] if RMSPROP_MOMENTUM & VARIANT else s[1], g, coefficient, from_end)
        centered = tl.fma(mean * -1.0, mean, v)
    d = tl.sqrt_rn(centered) + eps
    if RMSPROP_MOMENTUM & VARIANT:
        b = s[1] * momentum + tl.div_rn(g, d)
        p = tl.fma(b, minus_lr, p)
        s = (v, b, mean) if RMSPROP_CENTERED & VARIANT else (v, b)
    else:
        p = add_quotient(p, minus_lr, g, d)
        s = (v, mean) if RMSPROP_CENTERED & VARIANT else (v,)
    return p, s


@triton.jit
def nadam(c, p, g, s, VARIANT: tl.constexpr):
    coefficient, from_end, factor, weight_decay, beta2, rest2 = c[0], c[1], c[2], c[3], c[4], c[5]
    correction2_sqrt, eps, gradient_step, moment_step = c[6], c[7], c[8], c[9]
    if DECAY & VARIANT:
        g = decay_into_gradient(g, p, weight_decay)
    else:
        p = p * factor
    m = lerp(s[0], g, coefficient, from_end)
    v = average_square(s[1], g, beta2, rest2)
    d = tl.div_rn(tl.sqrt_rn(v), correction2_sqrt) + eps
    p = add_quotient(p, gradient_step, g, d)
    return add_quotient(p, moment_step, m, d), (m, v)


@triton.jit
def radam(c, p, g, s, VARIANT: tl.constexpr):
    coefficient, from_end, factor, weight_decay, beta2, rest2 = c[0], c[1], c[2], c[3], c[4], c[5]
    eps, rectified, plain = c[6], c[7], c[8]
    if DECAY & VARIANT:
        g = decay_into_gradient(g, p, weight_decay)
    else:
        p = p * factor
    m = lerp(s[0], g, coefficient, from_end)
    v = average_square(s[1], g, beta2, rest2)
    inverse = tl.div_rn(1.0, tl.div_rn(tl.sqrt_rn(v) + eps, rectified))
    return tl.fma(m, inverse + plain, p), (m, v)


@triton.jit
def adamax(c, p, g, s, VARIANT: tl.constexpr):
    coefficient, from_end, weight_decay, beta2, eps = c[0], c[1], c[2], c[3], c[4]
    minus_step_size = c[5]
    if DECAY & VARIANT:
        g = decay_into_gradient(g, p, weight_decay)
    m = lerp(s[0], g, coefficient, from_end)
    decayed = s[1] * beta2
    now = tl.abs(g) + eps
    u = tl.where((decayed != decayed) | (now < decayed), decayed, now)
    return add_quotient(p, minus_step_size, m, u), (m, u)


@triton.jit
def lion(c, p, g, s):
    factor, lr = c[4], c[5]
    m = s[0]
    u = lerp(m, g, c[0], c[1])
    move = tl.where(u == 0.0, 0.0, copysign(lr + tl.zeros_like(u), u))
    p = p * factor - tl.where(u != u, u, move)
    return p, (lerp(m, g, c[2], c[3]),)


@triton.jit
def lamb_direction(c, p, g, s):
    """In which the parameter moves, and the states."""
    m = lerp(s[0], g, c[0], c[1])
    v = average_square(s[1], g, c[3], c[4])
    denominator = tl.div_rn(tl.sqrt_rn(v), c[6]) + c[7]
    return tl.fma(p, c[2], tl.div_rn(tl.div_rn(m, c[5]), denominator)), (m, v)


@triton.jit
def lamb(c, p, g, s):
    u, s = lamb_direction(c, p, g, s)
    return tl.fma(u, c[10] * -1.0, p), s


@triton.jit
def update(c, p, g, s, tail, RULE: tl.constexpr, VARIANT: tl.constexpr):
    """The rule called ``RULE``, one of RULES."""
    if RULE == "SGD":
        return sgd(c, p, g, s, VARIANT)
    elif RULE == "Adam":
        return adam(c, p, g, s, tail, VARIANT)
    elif RULE == "Adagrad":
        return adagrad(c, p, g, s, tail, VARIANT)
    elif RULE == "RMSprop":
        return rmsprop(c, p, g, s, VARIANT)
    elif RULE == "NAdam":
        return nadam(c, p, g, s, VARIANT)
    elif RULE == "RAdam":
        return radam(c, p, g, s, VARIANT)
    elif RULE == "Adamax":
        return adamax(c, p, g, s, VARIANT)
    elif RULE == "LAMB":
        return lamb(c, p, g, s)
    else:
        return lion(c, p, g, s)


@triton.jit
def shrink(p, threshold):
    """sign(p) * max(|p| - threshold, 0); a NaN stays."""
    return copysign(_max(0.0, tl.abs(p) - threshold), p)
