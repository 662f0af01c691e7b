"""sparse24_linear, the obvious way: the weight written out, then bitmap_linear's reference."""

from __future__ import annotations

import numpy as np

from .bitmap_linear import bitmap_linear


def unpack_mask(indices: np.ndarray, K: int) -> np.ndarray:
    """The kept positions as bool [N, K4], K4 = K rounded up to 4; ``indices`` uint8 [N, ceil(K4 / 8)].

    Four bits a group of four columns, the even group's in the lower half: the first kept position in
    the lower two bits, the second above.
    """
    groups = -(-K // 4)
    nibbles = np.stack([indices & 15, indices >> 4], -1).reshape(len(indices), -1)[:, :groups]
    column = np.arange(4)
    keep = (column == (nibbles & 3)[..., None]) | (column == (nibbles >> 2)[..., None])
    return keep.reshape(len(indices), 4 * groups)


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
    mask = unpack_mask(indices, K)
    kept = values.reshape(-1)[np.nonzero(mask)[1] < K]  # row by row; without what pads K to fours
    padded = np.zeros((len(mask), -(-K // 64) * 64), bool)
    padded[:, :K] = mask[:, :K]
    bitmap = np.packbits(padded, axis=1, bitorder="little")
    return bitmap_linear(x, kept, bitmap, weight_scale, bias, activation)
