"""bitmap_linear, the obvious way: float64 sums over the kept weights, or the exact int8 product."""

from __future__ import annotations

import numpy as np

from .activation import activate
from .dtypes import dtype_name, round_to, to_float32
from .int8_linear import int8_linear


def mask_of(bitmap: np.ndarray, K: int) -> np.ndarray:
    """The bits [N, 8 * ceil(K / 64)] as bool [N, K]."""
    return np.unpackbits(bitmap, axis=1, bitorder="little")[:, :K].astype(bool)


def unpack(values: np.ndarray, bitmap: np.ndarray, K: int) -> np.ndarray:
    """The dense weight [N, K]."""
    mask = mask_of(bitmap, K)
    weight = np.zeros(mask.shape, values.dtype)
    weight[mask] = values
    return weight


def float64_product(x: np.ndarray, values: np.ndarray, bitmap: np.ndarray) -> np.ndarray:
    """``x @ weight.T`` [M, N] in float64; pruned weights are not multiplied, whatever x is there."""
    x64, mask = to_float32(x).astype(np.float64), mask_of(bitmap, x.shape[1])
    kept, start = to_float32(values).astype(np.float64), 0
    out = np.zeros((x.shape[0], len(mask)))
    with np.errstate(over="ignore", invalid="ignore"):
        for n, row in enumerate(mask):
            count = int(row.sum())
            out[:, n] = x64[:, row] @ kept[start : start + count]
            start += count
    return out


def bitmap_linear(
    x: np.ndarray,
    values: np.ndarray,
    bitmap: np.ndarray,
    weight_scale: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    activation: str = "none",
) -> np.ndarray:
    """``act(x @ weight.T + bias)`` [M, N] of x's dtype; ``x`` [M, K], bfloat16 as its bits.

    int8 ``values`` come with ``weight_scale`` [N] and give int8_linear's bits. Others are summed in
    float64 and rounded once to float32 before the bias.
    """
    if values.dtype == np.int8:
        assert weight_scale is not None
        weight = unpack(values, bitmap, x.shape[1])
        return int8_linear(x, weight, weight_scale, bias, activation)
    t = float64_product(x, values, bitmap).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        if bias is not None:
            t = t + to_float32(bias)[None, :]
        return round_to(activate(activation, t), dtype_name(x))
