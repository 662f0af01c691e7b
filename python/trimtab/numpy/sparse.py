"""Sparse weights as arrays: packed once, read by bitmap_linear and block_linear."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _numpy

Array = Any  # an np.ndarray, or an object with __dlpack__


def bitmap_pack(
    weight: np.ndarray, mask: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``weight`` [N, K] as (values [kept], bitmap uint8 [N, 8 * ceil(K / 64)], row_start [N + 1]).

    What is not zero is kept, or what ``mask`` (bool [N, K]) says, zeros included. Bit k of a row is bit
    k % 8 of byte k / 8; ``row_start`` int64 counts the kept weights before each row. To quantize, pack
    ``quantize_int8(weight)[0]`` with the mask ``weight != 0``.

    Raises ValueError if ``weight`` is not 2-D, has a NaN, or ``mask`` is not a bool of its shape.
    """
    weight, keep = _dense("bitmap_pack", weight, mask)
    N, K = weight.shape
    bits = np.zeros((N, (K + 63) // 64 * 64), np.bool_)
    bits[:, :K] = keep
    row_start = np.zeros(N + 1, np.int64)
    np.cumsum(keep.sum(1), out=row_start[1:])
    return weight[keep], np.packbits(bits, axis=1, bitorder="little"), row_start


def bitmap_unpack(values: np.ndarray, bitmap: np.ndarray, K: int) -> np.ndarray:
    """The dense weight [N, K]; ValueError where the parts do not fit each other."""
    _numpy.bitmap_row_start(values, bitmap, K)
    mask = np.unpackbits(bitmap, axis=1, bitorder="little")[:, :K].astype(bool)
    weight = np.zeros(mask.shape, values.dtype)
    weight[mask] = values
    return weight


def bitmap_linear(
    x: Array,
    values: Array,
    bitmap: Array,
    row_start: Array | None = None,
    weight_scale: Array | None = None,
    bias: Array | None = None,
    activation: str = "none",
    out_dtype: Any = None,
    out: Array | None = None,
) -> np.ndarray:
    """Float ``x`` [..., K] times the kept weights of a sparse weight: act(x @ weight.T + bias).

    ``values``, ``bitmap`` and ``row_start`` as ``bitmap_pack`` gives them. Without ``row_start`` they
    are checked against each other at every call, which is what to do once with a file's (a wrong
    ``row_start`` makes the kernel read other memory). Values of x's dtype are summed in float32; int8
    ones come with ``weight_scale`` [N] and give int8_linear's bits. A pruned weight contributes
    nothing, whatever x is there: 0 * Inf is not evaluated.

    Returns [..., N] of ``out_dtype``, by default x's; ``out`` as in ``int8_mm``.
    """
    return _numpy.bitmap_linear(
        x, values, bitmap, row_start, weight_scale, bias, activation, out_dtype, out
    )


def block_pack(
    weight: np.ndarray, block: tuple[int, int] = (32, 32), mask: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``weight`` [N, K] as values [blocks, bn, bk], crow int32 [ceil(N / bn) + 1], col int32 [blocks].

    Kept are the blocks of ``block`` = (outputs, inputs) that hold a nonzero, or with ``mask`` (bool
    [N, K]) those that hold a True; what it prunes is zero. N and K are padded with zeros up to whole
    blocks. Rows of blocks as in SciPy's BSR.

    Raises ValueError as bitmap_pack, and for a block without a side of at least 1.
    """
    weight, keep = _dense("block_pack", weight, mask)
    bn, bk = block
    if bn < 1 or bk < 1:
        raise ValueError(f"block_pack: expected a block of at least 1 x 1, got {block}")
    kept: np.ndarray = np.any(_blocks(keep, bn, bk), axis=(2, 3))
    if mask is not None:
        weight = np.where(keep, weight, weight.dtype.type(0))
    values = _blocks(weight, bn, bk)[kept]
    crow = np.zeros(len(kept) + 1, np.int32)
    np.cumsum(kept.sum(1), out=crow[1:])
    return values, crow, kept.nonzero()[1].astype(np.int32)


def block_unpack(
    values: np.ndarray, crow: np.ndarray, col: np.ndarray, N: int, K: int
) -> np.ndarray:
    """The dense weight [N, K], zero where no block is kept; ValueError where the parts do not fit."""
    op = "block_unpack"
    if values.ndim != 3 or 0 in values.shape[1:]:
        raise ValueError(f"{op}: expected values [blocks, bn, bk], got {list(values.shape)}")
    blocks, bn, bk = values.shape
    rows, columns = -(-N // bn), -(-K // bk)
    rises = len(crow) == rows + 1 and crow[0] == 0 and crow[-1] == blocks
    if not rises or (np.diff(crow) < 0).any():
        raise ValueError(f"{op}: expected crow [{rows + 1}] to rise from 0 to {blocks}")
    if len(col) != blocks or ((col < 0) | (col >= columns)).any():
        raise ValueError(f"{op}: expected col [{blocks}] in [0, {columns})")
    dense = np.zeros((rows, columns, bn, bk), values.dtype)
    dense[np.repeat(np.arange(rows), np.diff(crow)), col] = values
    return np.ascontiguousarray(dense.swapaxes(1, 2).reshape(rows * bn, columns * bk)[:N, :K])


def block_linear(
    x: Array,
    values: Array,
    crow: Array,
    col: Array,
    N: int,
    weight_scale: Array | None = None,
    bias: Array | None = None,
    activation: str = "none",
    out_dtype: Any = None,
    out: Array | None = None,
) -> np.ndarray:
    """Float ``x`` [..., K] times the kept blocks of a sparse weight [N, K]: act(x @ weight.T + bias).

    ``values``, ``crow`` and ``col`` as ``block_pack`` gives them; indices out of range are refused.
    Dtypes, scale and result as in ``bitmap_linear``.
    """
    return _numpy.block_linear(
        x, values, crow, col, N, weight_scale, bias, activation, out_dtype, out
    )


def _dense(
    op: str, weight: np.ndarray, mask: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The weight and what of it is kept, checked."""
    weight = np.asarray(weight)
    if weight.ndim != 2:
        raise ValueError(f"{op}: expected weight [N, K], got {list(weight.shape)}")
    wild = weight != weight
    if wild.any():
        n, k = np.argwhere(wild)[0]
        raise ValueError(f"{op}: expected weights without NaN, got weight[{n}, {k}]")
    keep = weight != 0 if mask is None else np.asarray(mask)
    if keep.dtype != np.bool_ or keep.shape != weight.shape:
        raise ValueError(
            f"{op}: expected mask of {list(weight.shape)} bool, got {list(keep.shape)} {keep.dtype}"
        )
    return weight, keep


def _blocks(array: np.ndarray, bn: int, bk: int) -> np.ndarray:
    """[N, K] -> [rows of blocks, columns of blocks, bn, bk], padded with zeros."""
    N, K = array.shape
    padded = np.zeros((-(-N // bn) * bn, -(-K // bk) * bk), array.dtype)
    padded[:N, :K] = array
    return padded.reshape(-(-N // bn), bn, -(-K // bk), bk).swapaxes(1, 2)
