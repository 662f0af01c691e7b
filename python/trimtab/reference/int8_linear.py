"""int8_linear, the obvious way: quantize_int8 of x, then int8_mm."""

from __future__ import annotations

import numpy as np

from .dtypes import dtype_name
from .int8_mm import int8_mm
from .quantize_int8 import quantize_int8


def int8_linear(
    x: np.ndarray,
    w: np.ndarray,
    w_scale: np.ndarray,
    bias: np.ndarray | None = None,
    activation: str = "none",
    out_dtype: str | None = None,
    out_scale: np.ndarray | None = None,
) -> np.ndarray:
    """``act(x @ (w * w_scale).T + bias)`` with ``x`` [..., K] quantized row by row.

    ``w`` [N, K] int8, ``w_scale`` [N] float32. Returns [..., N] of ``out_dtype``, by default x's;
    int8 has ``out_scale`` [1].
    """
    q, scale = quantize_int8(x)
    out_dtype = out_dtype or dtype_name(x)
    rows = q.reshape(scale.size, q.shape[-1])
    out = int8_mm(rows, w, scale.reshape(-1), w_scale, bias, activation, out_dtype, out_scale)
    return out.reshape(*scale.shape, w.shape[0])
