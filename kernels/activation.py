"""relu, gelu, gelu_tanh and silu in Triton: csrc/math/activation.h, line for line, the same bits.

What each step is for stands there. python/trimtab/reference/activation.py has the same lines, and
the tests compare the two. Launch with enable_fp_fusion=False: every + - * and / rounds once.
"""

from __future__ import annotations

import triton
import triton.language as tl

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

LOG2E = tl.constexpr(float.fromhex("0x1.715476p+0"))
LN2_HI = tl.constexpr(float.fromhex("0x1.62e4p-1"))
LN2_LO = tl.constexpr(float.fromhex("0x1.7f7d1cp-20"))
EXP1 = tl.constexpr(float.fromhex("0x1.000064p+0"))
EXP2 = tl.constexpr(float.fromhex("0x1.ffde24p-2"))
EXP3 = tl.constexpr(float.fromhex("0x1.572706p-3"))
EXP4 = tl.constexpr(float.fromhex("0x1.40005p-5"))
EXP5 = tl.constexpr(float.fromhex("0x1.7e61c6p-7"))


def check_activation(op: str, activation: str) -> None:
    """ValueError unless ``activation`` is one of ACTIVATIONS."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: expected activation in {list(ACTIVATIONS)}, got {activation!r}")


@triton.constexpr_function
def _c(text):
    """An fp32 constant as C++ spells it."""
    return float.fromhex(text)


@triton.jit
def _min(a, b):
    return tl.where(a < b, a, b)  # b if either is NaN, as minps


@triton.jit
def _max(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _float(u):
    return u.to(tl.float32, bitcast=True)


@triton.jit
def _rint(x):
    """To the nearest integer, ties to even, for |x| <= 2^22: 1.5 * 2^23 leaves no room for a
    fraction. It turns -0.0 into 0.0, which no line below can tell apart."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _ceil(x):
    """For |x| <= 2^22. tl.ceil would come from libdevice, which flushes a subnormal x to 0."""
    n = _rint(x)
    return tl.where(n < x, n + 1.0, n)


@triton.jit
def _pow2(n):
    """2^n for integral n in [-126, 127], Inf for 128: n + 127 moved into the exponent field."""
    return _float(_bits(n + 8388735.0) << 23)


@triton.jit
def _ldexp(x, n):
    """x 2^n with one rounding: the first product is exact."""
    n1 = _max(-100.0, n)
    return x * _pow2(n1) * _pow2(n - n1)


@triton.jit
def _exp_poly(r, c1, c2, c3, c4, c5):
    return ((((r * c5 + c4) * r + c3) * r + c2) * r + c1) * r + 1.0


@triton.jit
def relu(x):
    return _max(0.0, x)


@triton.jit
def silu(x):
    a = _max(-111.0, x)  # the C++ selects -0.0 below: the same bits, without underflow
    c = _min(18.0, a)
    n = _ceil(c * LOG2E)
    r = (n * LN2_HI - c) + n * LN2_LO
    m = _exp_poly(r, EXP1, EXP2, EXP3, EXP4, EXP5)
    return _ldexp(tl.div_rn(a, m + _pow2(_max(-100.0, n))), n)


@triton.jit
def gelu_tanh(x):
    a = _max(-10.8125, x)  # the C++ selects -0.0 below
    c = _min(5.25, a)
    h = (c + 786432.0) - 786432.0
    l = c - h
    g = h * h + _c("0x1.65dp+4")
    hi = h * g
    lo = l * ((c + h) * c + g)
    n = _ceil((hi + lo) * _c("0x1.a5a7dp-4"))
    tiny = n * _c("-0x1.549446p-16") - c * _c("0x1.2f6ecep-11")
    r = (n * _c("0x1.36dap+3") - hi) - (lo - tiny)
    m = _exp_poly(
        r,
        _c("0x1.244564p-4"),
        _c("0x1.4d976p-9"),
        _c("0x1.fea30ep-15"),
        _c("0x1.0fd906p-20"),
        _c("0x1.72ca1ep-26"),
    )
    return _ldexp(tl.div_rn(a, m + _pow2(_max(-100.0, n))), n)


@triton.jit
def gelu(x):
    t = tl.where((x > -14.5) & (x < 6.0), tl.abs(x), 0.0)
    h = _float(_bits(t) & -4096)  # 0xfffff000
    u = h * h
    v = (t - h) * (t + h)
    n = _rint(u * (-0.5 * LOG2E))
    r = (n * (2.0 * LN2_HI) + u) + (n * (2.0 * LN2_LO) + v)
    d = ((t + _c("0x1.2ae0fp+3")) * t + _c("0x1.431b4p+5")) * t + _c("0x1.74aeb2p+6")
    d = d * t + _c("0x1.95478ep+6")
    e = ((t * _c("0x1.3fd718p+1") + _c("0x1.797fb2p+4")) * t + _c("0x1.7835fcp+6")) * t
    e = e + _c("0x1.95478ep+7")
    td = t * d
    q = tl.div_rn(td, td * _c("0x1.40d95ap+1") + e)
    s = (r * _c("0x1.6882fap-16") + _c("-0x1.123f3ap-12")) * r + _c("0x1.555acp-9")
    s = ((s * r + _c("-0x1.55548ap-6")) * r + _c("0x1.fffffap-4")) * r + -0.5
    s = s * r
    # max(-0.0, x). Triton makes +0.0 of the literal, so -0.0 is the sign of a negative x.
    above = tl.where(x < 0.0, _float(_bits(x) & -2147483648), x)
    return above - _ldexp(q + q * s, n)


# map_elementwise finishes one element before it begins the next. Called on the tile, each line above
# would run for all its elements first: dozens of intermediate values for each of 128 elements a
# thread, which spill. The interpreter has no registers to run out of, and no map_elementwise.
@triton.jit
def activate(t, ACTIVATION: tl.constexpr):
    """The activation called ``ACTIVATION``, one of ACTIVATIONS, of fp32 ``t``."""
    if ACTIVATION == "relu":
        t = relu(t)
    elif ACTIVATION == "gelu":
        t = gelu(t) if INTERPRETED else tl.map_elementwise(gelu, t)
    elif ACTIVATION == "gelu_tanh":
        t = gelu_tanh(t) if INTERPRETED else tl.map_elementwise(gelu_tanh, t)
    elif ACTIVATION == "silu":
        t = silu(t) if INTERPRETED else tl.map_elementwise(silu, t)
    return t
