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


def int8_code(t: np.ndarray, out_scale: np.ndarray) -> np.ndarray:
    """float32 ``t`` as a next layer's int8 input: clamp(rne(t * (1 / out_scale)), -127, 127).

    A NaN product gives 0, Inf +-127.
    """
    with np.errstate(over="ignore", invalid="ignore", under="ignore", divide="ignore"):
        code = t * (np.float32(1) / out_scale.astype(np.float32))
    return np.where(np.isnan(code), 0, np.clip(np.rint(code), -127, 127)).astype(np.int8)


def epilogue(
    t: np.ndarray,
    b_scale: np.ndarray,
    a_scale: np.ndarray | None,
    bias: np.ndarray | None,
    activation: str,
    out_dtype: str,
    out_scale: np.ndarray | None = None,
) -> np.ndarray:
    """Scales, bias, activation, one rounding: float32 ``t`` [M, N] to ``out_dtype`` [M, N]."""
    if (out_dtype == "int8") != (out_scale is not None):
        raise ValueError(f"expected out_scale with int8 out alone, got {out_dtype} and {out_scale}")
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        t = t * b_scale.astype(np.float32)[None, :]
        if a_scale is not None:
            t = t * a_scale.astype(np.float32)[:, None]
        if bias is not None:
            t = t + to_float32(bias)[None, :]
        t = activate(activation, t)
    return round_to(t, out_dtype) if out_scale is None else int8_code(t, out_scale)


def int8_mm(
    a: np.ndarray,
    b: np.ndarray,
    a_scale: np.ndarray,
    b_scale: np.ndarray,
    bias: np.ndarray | None = None,
    activation: str = "none",
    out_dtype: str = "float32",
    out_scale: np.ndarray | None = None,
) -> np.ndarray:
    """Scaled product of int8 ``a`` [M, K] and int8 ``b`` [N, K], transposed.

    ``a_scale`` [M] and ``b_scale`` [N] are float32, ``bias`` [N] any of the three float dtypes.
    Returns [M, N] of ``out_dtype`` (bfloat16 as uint16 bits); int8 has ``out_scale`` [1] float32.
    """
    t = int8_dot(a, b).astype(np.float32)
    return epilogue(t, b_scale, a_scale, bias, activation, out_dtype, out_scale)
