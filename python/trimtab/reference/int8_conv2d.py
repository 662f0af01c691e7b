"""int8_conv2d, the obvious way: quantize each image, cut out its patches, int8_mm."""

from __future__ import annotations

import math

import numpy as np

from .dtypes import dtype_name
from .int8_mm import int8_mm
from .quantize_int8 import quantize_int8

Pair = tuple[int, int]


def patches(
    q: np.ndarray, kernel: Pair, stride: Pair, sides: tuple[int, int, int, int], dilation: Pair
) -> np.ndarray:
    """im2col: ``q`` [B, C, H, W], zeros around it, to [B, OH, OW, C, kh, kw].

    ``sides`` is (top, bottom, left, right).
    """
    top, bottom, left, right = sides
    q = np.pad(q, ((0, 0), (0, 0), (top, bottom), (left, right)))
    span = tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel))
    windows = np.lib.stride_tricks.sliding_window_view(q, span, axis=(2, 3))
    windows = windows[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]
    return windows.transpose(0, 2, 3, 1, 4, 5)


def int8_conv2d(
    x: np.ndarray,
    w: np.ndarray,
    w_scale: np.ndarray,
    bias: np.ndarray | None = None,
    stride: Pair = (1, 1),
    sides: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    activation: str = "none",
    out_dtype: str | None = None,
) -> np.ndarray:
    """``act(conv2d(x, w * w_scale) + bias)`` with one scale an image of ``x`` [B, C, H, W].

    ``w`` [O, C / groups, kh, kw] int8, ``w_scale`` [O] float32, ``sides`` the zeros at the (top,
    bottom, left, right). Returns [B, O, OH, OW] of ``out_dtype``, by default x's.
    """
    B = x.shape[0]
    O, group_channels, kh, kw = w.shape
    q, scale = quantize_int8(x.reshape(B, math.prod(x.shape[1:])))
    cut = patches(q.reshape(x.shape), (kh, kw), stride, sides, dilation)
    _, OH, OW = cut.shape[:3]
    cut = cut.reshape(B * OH * OW, groups, group_channels * kh * kw)
    row_scale = np.repeat(scale, OH * OW)
    out_dtype = out_dtype or dtype_name(x)
    columns = []
    for g in range(groups):
        own = slice(g * (O // groups), (g + 1) * (O // groups))
        own_bias = None if bias is None else bias[own]
        weight = w[own].reshape(O // groups, -1)
        columns.append(
            int8_mm(cut[:, g], weight, row_scale, w_scale[own], own_bias, activation, out_dtype)
        )
    out = np.concatenate(columns, axis=1).reshape(B, OH, OW, O)
    return np.ascontiguousarray(out.transpose(0, 3, 1, 2))
