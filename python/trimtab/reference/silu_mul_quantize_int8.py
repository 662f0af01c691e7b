"""silu_mul_quantize_int8, the obvious way: a gated activation, then NUMERICS.md section 2."""

from __future__ import annotations

import numpy as np

from .activation import silu
from .dtypes import to_float32
from .quantize_int8 import quantize_int8


def silu_mul_quantize_int8(gate: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``quantize_int8(silu(gate) * up)`` of two arrays [..., K], the product in float32.

    They are float32, float16 or bfloat16 bits (uint16). Returns q [..., K] int8, scale [...] float32.
    """
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        y = silu(to_float32(gate)) * to_float32(up)
    return quantize_int8(y)
