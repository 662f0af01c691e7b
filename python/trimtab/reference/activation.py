"""exp, tanh, erf and the activations in float32: csrc/math/activation.h line for line.

Each line is one or more of + - * / on float32, each rounded once, or a compare, a select or a shift
of the exponent, in the C++'s order: the results are the same bits (any NaN counts as equal to any
other). What each step is for stands beside its C++ line. This is the place to transcribe from:
``_min`` and ``_max`` are tl.where, ``_bits``/``_float`` are bitcasts, and there are no tables.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

f32 = np.float32

LOG2E = f32(float.fromhex("0x1.715476p+0"))
LN2_HI = f32(float.fromhex("0x1.62e4p-1"))
LN2_LO = f32(float.fromhex("0x1.7f7d1cp-20"))
EXP1 = f32(float.fromhex("0x1.000064p+0"))
EXP2 = f32(float.fromhex("0x1.ffde24p-2"))
EXP3 = f32(float.fromhex("0x1.572706p-3"))
EXP4 = f32(float.fromhex("0x1.40005p-5"))
EXP5 = f32(float.fromhex("0x1.7e61c6p-7"))


def _c(text: str) -> np.float32:
    """An fp32 constant as C++ spells it."""
    return f32(float.fromhex(text))


def _min(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(a < b, a, b)  # b if either is NaN, as minps


def _max(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(a > b, a, b)


def _bits(x: np.ndarray) -> np.ndarray:
    return x.view(np.uint32)


def _float(u: np.ndarray) -> np.ndarray:
    return u.view(np.float32)


def _pow2(n: np.ndarray) -> np.ndarray:
    """2^n for integral n in [-126, 127], Inf for 128: n + 127 moved into the exponent field."""
    return _float(_bits(n + f32(8388735.0)) << np.uint32(23))


def _ldexp(x: np.ndarray, n: np.ndarray) -> np.ndarray:
    """x 2^n with one rounding: the first product is exact."""
    n1 = _max(f32(-100.0), n)
    return x * _pow2(n1) * _pow2(n - n1)


def _copysign(mag: np.ndarray, sgn: np.ndarray) -> np.ndarray:
    sign = _bits(sgn) & np.uint32(0x80000000)
    return _float((_bits(mag) & np.uint32(0x7FFFFFFF)) | sign)


def _horner(x: np.ndarray, p: np.ndarray | np.float32, *coefficients: np.float32) -> np.ndarray:
    """((p x + c) x + ...) x + last coefficient"""
    for c in coefficients:
        p = p * x + c
    return np.asarray(p)


def _exp(x: np.ndarray) -> np.ndarray:
    c = _max(f32(-104.5), _min(f32(89.0), x))
    n = np.floor(c * LOG2E)
    r = (c - n * LN2_HI) - n * LN2_LO
    m = _horner(
        r,
        _c("0x1.fe47d8p-10"),
        _c("0x1.fefd2ap-8"),
        _c("0x1.5755b8p-5"),
        _c("0x1.553884p-3"),
        _c("0x1.0000bap-1"),
        _c("0x1.fffffap-1"),
        f32(1.0),
    )
    return _ldexp(m, n)


def _tanh(x: np.ndarray) -> np.ndarray:
    t = _min(f32(10.0), np.abs(x))
    z = t * t
    p = _horner(
        z, _c("0x1.ff9d04p-7"), _c("-0x1.abb8fcp-5"), _c("0x1.10a72p-3"), _c("-0x1.555368p-2")
    )
    small = t + t * (z * p)
    n = np.floor(t * (f32(2.0) * LOG2E))
    r = t - n * _c("0x1.62e43p-2")
    m = _horner(
        r,
        f32(32.0) * EXP5,
        f32(16.0) * EXP4,
        f32(8.0) * EXP3,
        f32(4.0) * EXP2,
        f32(2.0) * EXP1,
        f32(1.0),
    )
    large = f32(1.0) - f32(2.0) / (m * _pow2(n) + f32(1.0))
    return _copysign(np.where(t < f32(0.58), small, large), x)


def _erf(x: np.ndarray) -> np.ndarray:
    t = _min(f32(4.0), np.abs(x))
    z = t * t
    p = _horner(
        z,
        _c("-0x1.3ba23p-11"),
        _c("0x1.479bacp-8"),
        _c("-0x1.b69b88p-6"),
        _c("0x1.ce1b86p-4"),
        _c("-0x1.8126ecp-2"),
        _c("0x1.06eba6p-3"),
    )
    small = t + t * p
    h = _float(_bits(t) | np.uint32(1))
    g = _horner(
        h,
        _c("0x1.4ee42cp-10"),
        _c("-0x1.0281dap-6"),
        _c("0x1.779d9p-4"),
        _c("0x1.4cbeb8p-1"),
        _c("0x1.1eecdap+0"),
        _c("0x1.bffa9ap-10"),
    )
    n = np.floor(g * -LOG2E)
    r = (n * -LN2_HI - g) - n * LN2_LO
    m = _horner(r, EXP5, EXP4, EXP3, EXP2, EXP1, f32(1.0))
    large = f32(1.0) - m * _pow2(n)
    return _copysign(np.where(t < f32(0.875), small, large), x)


def _relu(x: np.ndarray) -> np.ndarray:
    return _max(f32(0.0), x)


def _silu(x: np.ndarray) -> np.ndarray:
    a = np.where(x <= f32(-111.0), f32(-0.0), x)
    c = _min(f32(18.0), a)
    n = np.ceil(c * LOG2E)
    r = (n * LN2_HI - c) + n * LN2_LO
    m = _horner(r, EXP5, EXP4, EXP3, EXP2, EXP1, f32(1.0))
    return _ldexp(a / (m + _pow2(_max(f32(-100.0), n))), n)


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    a = np.where(x <= f32(-10.8125), f32(-0.0), x)
    c = _min(f32(5.25), a)
    h = (c + f32(786432.0)) - f32(786432.0)
    l = c - h
    g = h * h + _c("0x1.65dp+4")
    hi = h * g
    lo = l * ((c + h) * c + g)
    n = np.ceil((hi + lo) * _c("0x1.a5a7dp-4"))
    tiny = n * _c("-0x1.549446p-16") - c * _c("0x1.2f6ecep-11")
    r = (n * _c("0x1.36dap+3") - hi) - (lo - tiny)
    m = _horner(
        r,
        _c("0x1.72ca1ep-26"),
        _c("0x1.0fd906p-20"),
        _c("0x1.fea30ep-15"),
        _c("0x1.4d976p-9"),
        _c("0x1.244564p-4"),
        f32(1.0),
    )
    return _ldexp(a / (m + _pow2(_max(f32(-100.0), n))), n)


def _gelu(x: np.ndarray) -> np.ndarray:
    t = np.where((x > f32(-14.5)) & (x < f32(6.0)), np.abs(x), f32(0.0))
    h = _float(_bits(t) & np.uint32(0xFFFFF000))
    u = h * h
    v = (t - h) * (t + h)
    n = np.rint(u * (f32(-0.5) * LOG2E))
    r = (n * (f32(2.0) * LN2_HI) + u) + (n * (f32(2.0) * LN2_LO) + v)
    d = _horner(
        t, t + _c("0x1.2ae0fp+3"), _c("0x1.431b4p+5"), _c("0x1.74aeb2p+6"), _c("0x1.95478ep+6")
    )
    e = _horner(
        t, _c("0x1.3fd718p+1"), _c("0x1.797fb2p+4"), _c("0x1.7835fcp+6"), _c("0x1.95478ep+7")
    )
    td = t * d
    q = td / (td * _c("0x1.40d95ap+1") + e)
    s = r * _horner(
        r,
        _c("0x1.6882fap-16"),
        _c("-0x1.123f3ap-12"),
        _c("0x1.555acp-9"),
        _c("-0x1.55548ap-6"),
        _c("0x1.fffffap-4"),
        f32(-0.5),
    )
    return _max(f32(-0.0), x) - _ldexp(q + q * s, n)


def _run(function: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
    x = np.asarray(x)
    if x.dtype != np.float32:
        raise TypeError(f"expected a float32 array, got {x.dtype}")
    with np.errstate(all="ignore"):  # NaN, overflow and underflow are part of the definition
        # At least one dimension: NumPy's 0-d results are scalars, which have no other view.
        return function(np.atleast_1d(x)).reshape(x.shape)


def exp(x: np.ndarray) -> np.ndarray:
    """e^x, float32, at most 1.9 ulp from exact."""
    return _run(_exp, x)


def tanh(x: np.ndarray) -> np.ndarray:
    """Hyperbolic tangent, float32, at most 2 ulp from exact."""
    return _run(_tanh, x)


def erf(x: np.ndarray) -> np.ndarray:
    """Error function, float32, at most 2.6 ulp from exact."""
    return _run(_erf, x)


def relu(x: np.ndarray) -> np.ndarray:
    """max(0, x), float32. relu(-0.0) is -0.0, relu(NaN) is NaN."""
    return _run(_relu, x)


def silu(x: np.ndarray) -> np.ndarray:
    """x / (1 + e^-x), float32, at most 4 ulp from exact. silu(-inf) is -0.0."""
    return _run(_silu, x)


def gelu(x: np.ndarray) -> np.ndarray:
    """x Phi(x) (the erf form), float32, at most 4 ulp from exact. gelu(-inf) is -0.0."""
    return _run(_gelu, x)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), float32, at most 4 ulp from exact.

    gelu_tanh(-inf) is -0.0.
    """
    return _run(_gelu_tanh, x)


_ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": np.asarray,
    "relu": relu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "silu": silu,
}


def activate(name: str, x: np.ndarray) -> np.ndarray:
    """The activation called ``name`` ("none", "relu", "gelu", "gelu_tanh", "silu") of float32 ``x``."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"expected an activation in {sorted(_ACTIVATIONS)}, got {name!r}")
    return _ACTIVATIONS[name](x)
