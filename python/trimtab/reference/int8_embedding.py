"""int8_embedding, the obvious way."""

from __future__ import annotations

import numpy as np

from .dtypes import round_to


def int8_embedding(
    indices: np.ndarray, weight: np.ndarray, weight_scale: np.ndarray, out_dtype: str = "float32"
) -> np.ndarray:
    """``float(weight[indices]) * weight_scale[indices]``, rounded once to ``out_dtype``.

    ``indices`` integers of any shape, ``weight`` [V, D] int8, ``weight_scale`` [V] float32. Returns
    [..., D] (bfloat16 as uint16 bits).
    """
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        rows = weight[indices].astype(np.float32) * weight_scale[indices][..., None]
    return round_to(rows, out_dtype)
