"""bitmap_conv2d, the obvious way: cut out the patches, then float64 sums over the kept weights."""

from __future__ import annotations

import numpy as np

from .activation import activate
from .bitmap_linear import float64_product
from .dtypes import dtype_name, round_to, to_float32
from .int8_conv2d import Pair, patches


def float64_conv2d(
    x: np.ndarray,
    values: np.ndarray,
    bitmap: np.ndarray,
    kernel: Pair,
    stride: Pair = (1, 1),
    sides: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> np.ndarray:
    """conv2d(x [B, C, H, W], weight) [B, O, OH, OW] in float64; pruned weights are not multiplied."""
    cut = patches(to_float32(x), kernel, stride, sides, dilation)
    B, OH, OW, C = cut.shape[:4]
    cut = cut.reshape(B * OH * OW, groups, C // groups * kernel[0] * kernel[1])
    O, start, columns = len(bitmap), 0, []
    for g in range(groups):
        bits = bitmap[g * (O // groups) : (g + 1) * (O // groups)]
        count = int(np.unpackbits(bits).sum())
        columns.append(float64_product(cut[:, g], values[start : start + count], bits))
        start += count
    return np.concatenate(columns, 1).reshape(B, OH, OW, O).transpose(0, 3, 1, 2)


def bitmap_conv2d(
    x: np.ndarray,
    values: np.ndarray,
    bitmap: np.ndarray,
    bias: np.ndarray | None = None,
    kernel: Pair = (3, 3),
    stride: Pair = (1, 1),
    sides: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    activation: str = "none",
) -> np.ndarray:
    """``act(conv2d(x, weight) + bias)`` of x's dtype; bfloat16 as its bits.

    Summed in float64 and rounded once to float32 before the bias.
    """
    t = float64_conv2d(x, values, bitmap, kernel, stride, sides, dilation, groups)
    t = t.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        if bias is not None:
            t = t + to_float32(bias)[None, :, None, None]
        return round_to(activate(activation, t), dtype_name(x))
