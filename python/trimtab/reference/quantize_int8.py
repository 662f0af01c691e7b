"""quantize_int8, the obvious way: the oracle for NUMERICS.md section 2."""

from __future__ import annotations

import numpy as np

from .dtypes import to_float32


def quantize_int8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 with one scale a row.

    ``x`` [..., K] is float32, float16 or bfloat16 bits (uint16). Returns ``q`` [..., K] int8 and
    ``scale`` [...] float32. A row of zeros (or so small that 127 / absmax overflows) gives q = 0,
    scale = 0; a row that holds NaN or Inf gives q = 0, scale = NaN.
    """
    x = to_float32(x)
    limit = np.float32(127)
    absmax = np.max(np.abs(x), axis=-1, initial=0)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore", under="ignore"):
        scale = absmax / limit
        r = limit / absmax
        q = np.clip(np.rint(x * r[..., None]), -limit, limit)

    finite = np.isfinite(x).all(axis=-1)
    vanishes = np.isinf(r)
    scale = np.where(vanishes, np.float32(0), scale)
    scale = np.where(finite, scale, np.float32(np.nan))
    q = np.where((finite & ~vanishes)[..., None], q, np.float32(0))
    return q.astype(np.int8), scale.astype(np.float32)
