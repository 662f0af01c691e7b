"""sparse24_linear, the obvious way: the weight written out, then bitmap_linear's reference."""

from __future__ import annotations

import numpy as np

from .bitmap_linear import bitmap_linear
from .sparse24_compress import sparse24_mask


def sparse24_linear(
    x: np.ndarray,
    values: np.ndarray,
    indices: np.ndarray,
    weight_scale: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    activation: str = "none",
) -> np.ndarray:
    """``act(x @ weight.T + bias)`` [M, N]; ``values`` [N, K4 / 2], bfloat16 as its bits."""
    K = x.shape[1]
    mask = sparse24_mask(indices, K)
    kept = values.reshape(-1)[np.nonzero(mask)[1] < K]  # row by row; without what pads K to fours
    padded = np.zeros((len(mask), -(-K // 64) * 64), bool)
    padded[:, :K] = mask[:, :K]
    bitmap = np.packbits(padded, axis=1, bitorder="little")
    return bitmap_linear(x, kept, bitmap, weight_scale, bias, activation)
