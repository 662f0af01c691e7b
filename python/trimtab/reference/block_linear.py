"""block_linear, the obvious way: one product a kept block, in float64."""

from __future__ import annotations

import numpy as np

from .activation import activate
from .dtypes import dtype_name, round_to, to_float32
from .int8_linear import int8_linear


def block_unpack(
    values: np.ndarray, crow: np.ndarray, col: np.ndarray, N: int, K: int
) -> np.ndarray:
    """The dense weight [N, K] of ``values`` [blocks, bn, bk], zero where no block is kept."""
    _, bn, bk = values.shape
    rows = len(crow) - 1
    dense = np.zeros((rows, bn, -(-K // bk), bk), values.dtype)
    for i in range(rows):
        for b in range(crow[i], crow[i + 1]):
            dense[i, :, col[b]] = values[b]
    return dense.reshape(rows * bn, -1)[:N, :K]


def block_linear(
    x: np.ndarray,
    values: np.ndarray,
    crow: np.ndarray,
    col: np.ndarray,
    N: int,
    weight_scale: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    activation: str = "none",
) -> np.ndarray:
    """``act(x @ W.T + bias)`` with the block-sparse ``W`` [N, K]; ``x`` [M, K].

    ``values`` [blocks, bn, bk] of x's dtype, summed in float64 and rounded to float32 before the bias;
    or int8 with ``weight_scale`` [N], as int8_linear of the dense weight. What no kept block covers is
    not evaluated: 0 times Inf is not there.
    """
    M, K = x.shape
    if weight_scale is not None:
        dense = block_unpack(values, crow, col, N, K)
        return int8_linear(x, dense, weight_scale, bias, activation)
    _, bn, bk = values.shape
    t = np.zeros((M, (len(crow) - 1) * bn))
    x64 = np.zeros((M, -(-K // bk) * bk))
    x64[:, :K] = to_float32(x)
    w64 = to_float32(values).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        for i in range(len(crow) - 1):
            for b in range(crow[i], crow[i + 1]):
                columns = slice(col[b] * bk, (col[b] + 1) * bk)
                t[:, i * bn : (i + 1) * bn] += x64[:, columns] @ w64[b].T
        t32 = t[:, :N].astype(np.float32)
        if bias is not None:
            t32 = t32 + to_float32(bias)[None, :]
        return round_to(activate(activation, t32), dtype_name(x))
