"""int8_weight_mm, the obvious way: the exact order of the CPU kernels, and a float64 oracle."""

from __future__ import annotations

import numpy as np

from .activation import activate
from .dtypes import dtype_name, round_to, to_float32


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32 ``a * b + c``, rounded once.

    The product of two float32 is exact in float64. The sum is rounded to odd there: if it was inexact
    and its last bit is even, it moves to the odd neighbour on the side of the error. 53 bits rounded to
    odd then round to float32 as the exact sum would (Boldo and Melquiond, "Emulation of FMA and
    correctly rounded sums", 2008).
    """
    a, b, c = (np.asarray(v, np.float64) for v in (a, b, c))
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        product = a * b
        total = np.asarray(product + c)
        back = total - product
        error = (product - (total - back)) + (c - back)  # exact: Knuth's two-sum
        even = (total.view(np.int64) & 1) == 0
        inexact = np.isfinite(total) & np.isfinite(error) & (error != 0)
        towards = np.where(error > 0, np.inf, -np.inf)
        odd = np.where(inexact & even, np.nextafter(total, towards), total)
        return odd.astype(np.float32)


def int8_weight_mm(
    x: np.ndarray,
    weight: np.ndarray,
    weight_scale: np.ndarray,
    zero_point: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    group_size: int | None = None,
    activation: str = "none",
    out_dtype: str | None = None,
) -> np.ndarray:
    """``act(x @ ((weight - zero_point) * weight_scale).T + bias)``: the CPU kernels' bits.

    ``x`` [M, K] float32, float16 or bfloat16 bits, ``weight`` [N, K] int8, ``weight_scale`` and
    ``zero_point`` [N] or [groups, N]. Returns [M, N] of ``out_dtype``, by default x's. Slow: one
    rounding after another, as the formula says.
    """
    values, scale, zero = to_float32(x), np.atleast_2d(weight_scale), None
    if zero_point is not None:
        zero = np.atleast_2d(zero_point).astype(np.int32)
    M, K = x.shape
    size = max(K, 1) if group_size is None else group_size
    t = np.zeros((M, weight.shape[0]), np.float32)
    for g in range(scale.shape[0]):
        acc = np.zeros_like(t)
        for k in range(g * size, min(K, (g + 1) * size)):
            column = weight[:, k].astype(np.int32) - (0 if zero is None else zero[g])
            acc = fma(values[:, k, None], column[None, :], acc)
        t = fma(acc, scale[g][None, :], t)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        if bias is not None:
            t = t + to_float32(bias)[None, :]
        t = activate(activation, t)
    return round_to(t, out_dtype or dtype_name(x))


def float64_product(
    x: np.ndarray,
    weight: np.ndarray,
    weight_scale: np.ndarray,
    zero_point: np.ndarray | None = None,
    group_size: int | None = None,
) -> np.ndarray:
    """``x @ ((weight - zero_point) * weight_scale).T`` [M, N] in float64."""
    K = x.shape[1]
    size = max(K, 1) if group_size is None else group_size

    def each(per_group: np.ndarray) -> np.ndarray:
        return np.repeat(np.atleast_2d(per_group).astype(np.float64), size, axis=0)[:K].T

    values = weight.astype(np.float64) - (0 if zero_point is None else each(zero_point))
    return to_float32(x).astype(np.float64) @ (values * each(weight_scale)).T
