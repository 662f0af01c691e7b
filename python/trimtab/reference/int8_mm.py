"""int8_mm, the obvious way: the oracle for NUMERICS.md section 3."""

from __future__ import annotations

import numpy as np

from .activation import activate
from .dtypes import round_to, to_float32

# 127 * 127 * K must stay below 2^31 for the sum to fit int32.
MAX_K = 133144


def int8_dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``a`` [M, K] int8 times ``b`` [N, K] int8, transposed: [M, N] int32, exact.

    A float64 product holds the sums exactly (128 * 128 * K < 2^53) and runs in BLAS. Past int32,
    which only -128 can reach, the sum wraps as an int32 register does.
    """
    if a.shape[1] > MAX_K:
        raise ValueError(f"int8_mm: expected K <= {MAX_K}, got {a.shape[1]}")
    return (a.astype(np.float64) @ b.astype(np.float64).T).astype(np.int64).astype(np.int32)


def epilogue(
    t: np.ndarray,
    b_scale: np.ndarray,
    a_scale: np.ndarray | None,
    bias: np.ndarray | None,
    activation: str,
    out_dtype: str,
) -> np.ndarray:
    """Scales, bias, activation, one rounding: float32 ``t`` [M, N] to ``out_dtype`` [M, N]."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        t = t * b_scale.astype(np.float32)[None, :]
        if a_scale is not None:
            t = t * a_scale.astype(np.float32)[:, None]
        if bias is not None:
            t = t + to_float32(bias)[None, :]
        t = activate(activation, t)
    return round_to(t, out_dtype)


def int8_mm(
    a: np.ndarray,
    b: np.ndarray,
    a_scale: np.ndarray,
    b_scale: np.ndarray,
    bias: np.ndarray | None = None,
    activation: str = "none",
    out_dtype: str = "float32",
) -> np.ndarray:
    """Scaled product of int8 ``a`` [M, K] and int8 ``b`` [N, K], transposed.

    ``a_scale`` [M] and ``b_scale`` [N] are float32, ``bias`` [N] any of the three float dtypes.
    Returns [M, N] of ``out_dtype`` (bfloat16 as uint16 bits).
    """
    t = int8_dot(a, b).astype(np.float32)
    return epilogue(t, b_scale, a_scale, bias, activation, out_dtype)
