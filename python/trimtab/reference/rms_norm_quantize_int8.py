"""rms_norm_quantize_int8 in float32, in the order of csrc/math/rms_norm.h, line for line."""

from __future__ import annotations

import numpy as np

from .dtypes import to_float32
from .quantize_int8 import quantize_int8

CHUNK, CHUNKS = 8, 256
PARTIALS = CHUNK * CHUNKS


def sum_of_squares(x: np.ndarray) -> np.ndarray:
    """Of rows [..., K] float32, in the pinned order."""
    *outer, K = x.shape
    steps = -(-K // PARTIALS)
    squares = np.zeros((*outer, steps * PARTIALS), np.float32)
    squares[..., :K] = x * x
    partial = np.zeros((*outer, PARTIALS), np.float32)
    for step in range(steps):
        partial = partial + squares[..., step * PARTIALS : (step + 1) * PARTIALS]
    p = partial.reshape(*outer, CHUNKS, CHUNK)
    for _ in range(3):  # neighbours
        p = p[..., 0::2] + p[..., 1::2]
    chunk = p[..., 0]
    half = CHUNKS // 2
    while half > 0:
        chunk = chunk[..., :half] + chunk[..., half:]
        half //= 2
    return chunk[..., 0]


def rms_norm_quantize_int8(
    x: np.ndarray, weight: np.ndarray, eps: float = 1e-6
) -> tuple[np.ndarray, np.ndarray]:
    """``quantize_int8(rms_norm(x) * weight)`` of ``x`` [..., K], ``weight`` [K], in float32.

    Both are float32, float16 or bfloat16 bits (uint16). Returns q [..., K] int8, scale [...] float32.
    """
    x, weight = to_float32(x), to_float32(weight)
    one = np.float32(1)
    with np.errstate(all="ignore"):
        mean = sum_of_squares(x) / np.float32(x.shape[-1])
        r = one / np.sqrt(mean + np.float32(eps))
        y = (x * r[..., None]) * weight
    return quantize_int8(y)
