"""How optim_step's smaller formats come to fp32 and back, in Triton: csrc/math/stochastic_rounding.h
and master.h line for line, and dynamic_code.h; the same bits.

What each step is for stands there. A code's decade is found here by tables of 32 exponents in memory:
where the next begins, and the first t of the lower; -offset / slope stands for the C++ limit's line.
"""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl

from .activation import _bits, _float, _max, _min, _rint
from .optim_rules import copysign

STREAMS = tl.constexpr(4)  # what a tensor rounds: the parameter and up to three states
KEY_WORDS = tl.constexpr(8)  # two words a stream
CODE_BLOCK = tl.constexpr(256)  # elements that share a scale
FLT_MAX = tl.constexpr(float.fromhex("0x1.fffffep+127"))
NAN = tl.constexpr(0x7FC00000)

# --- stochastic_rounding.h


@triton.jit
def _mix64(z):
    z += 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _store_word(at, z, mask):
    tl.store(at, z.to(tl.uint32).to(tl.int32, bitcast=True), mask=mask)


@triton.jit
def _word(at):
    return tl.load(at).to(tl.uint32, bitcast=True)


@triton.jit
def store_keys(out, seed, step, tensor, mask):
    """The keys of all streams of a vector of tensors, two words each; seed, step, tensor: uint64."""
    first = _mix64(_mix64(seed) ^ step)
    for stream in tl.static_range(STREAMS):
        z = _mix64(first ^ (tensor * 16 + stream))
        _store_word(out + 2 * stream, z, mask)
        _store_word(out + 2 * stream + 1, z >> 32, mask)


@triton.jit
def random_bits(key, element):
    """key: where the words of a stream are; element: its number in the tensor, below 2^32."""
    x = element.to(tl.uint32) ^ _word(key)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) + _word(key + 1)
    x = (x ^ (x >> 16)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def stochastic_bf16(x, bits):
    """The upper or lower bf16 neighbour of x."""
    up = x.to(tl.uint32, bitcast=True) + (bits >> 16)
    upper = tl.where(x != x, NAN, up & 0xFFFF0000)
    return upper.to(tl.uint32).to(tl.float32, bitcast=True).to(tl.bfloat16)


# --- master.h


@triton.jit
def join_remainder(param, remainder):
    """Both int16."""
    return _float((param.to(tl.int32) << 16) + remainder.to(tl.int32))


@triton.jit
def split_remainder(master):
    u = tl.where(master != master, NAN, _bits(master))
    return ((u + 0x8000) >> 16).to(tl.int16), u.to(tl.int16)


@triton.jit
def lost(master, rounded):
    rest = master - rounded
    return tl.where((_bits(rest) & 0x7FFFFFFF) < 0x7F800000, rest, 0.0)


# --- dynamic_code.h

# Where the parts of a code's table begin, in floats.
SLOPE, OFFSET, INVERSE, INVERSE_OFFSET = (tl.constexpr(8 * i) for i in range(4))
NEAREST, LOWEST, CODE_FLOATS = (tl.constexpr(32 + 64 * i) for i in range(3))


def _decades(first: int, thresholds: list[float]) -> np.ndarray:
    """threshold [32], lower [32]"""
    threshold, lower = np.full(32, 4.0), np.zeros(32)
    power, decade = 2.0**-23, 0
    for e in range(-23, 1):
        at = (e + 127) & 31
        while decade < 8 and thresholds[decade] < power:
            decade += 1
        lower[at] = (first << decade) * 0.5
        if decade < 8 and thresholds[decade] < 2.0 * power:
            threshold[at] = thresholds[decade]
        power *= 2.0
    return np.concatenate([threshold, lower])


def dynamic_code(is_signed: bool) -> np.ndarray:
    """The tables of a code, fp32 [CODE_FLOATS]."""
    tops = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 0.0)
    first, first_exponent = (1, 0) if is_signed else (2, 1)
    tables = np.zeros((4, 8))
    nearest, lowest = [], []
    below = 0.0
    for i, top in enumerate(tops):
        at = (first_exponent + i + 127) & 7
        n = float(first << i)
        slope = 0.9 * top / n
        offset = top * (0.45 / n - 0.8) if i < 7 else 1.0
        inverses = (1.0 / slope, -offset / slope) if i < 7 else (0.0, n)
        tables[:, at] = slope, offset, *inverses
        lowest.append(n * slope + offset)
        nearest.append(0.5 * (below + lowest[-1]))
        below = (2.0 * n - 1.0) * slope + offset
    parts = tables.reshape(-1), _decades(first, nearest), _decades(first, lowest)
    return np.concatenate(parts).astype(np.float32)


@triton.jit
def _lookup(table, at: tl.constexpr, x, SIZE: tl.constexpr):
    """Of x's exponent."""
    return tl.load(table + at + ((_bits(x) >> 23) & (SIZE - 1)))


@triton.jit
def _magnitude(table, t, SIGNED: tl.constexpr):
    value = tl.fma(t, _lookup(table, SLOPE, t, 8), _lookup(table, OFFSET, t, 8))
    return tl.where(t < (1.0 if SIGNED else 2.0), 0.0, value)


@triton.jit
def dynamic_value(table, code, SIGNED: tl.constexpr):
    """value(code), for the code as fp32; table: of the code."""
    if SIGNED:
        s = code - 127.0
        return copysign(_magnitude(table, tl.abs(s), SIGNED), s)
    else:
        return _magnitude(table, code + 1.0, SIGNED)


@triton.jit
def _finish(t, x, SIGNED: tl.constexpr):
    if SIGNED:
        return _max(0.0, copysign(t, x) + 127.0)
    else:
        return t - 1.0


@triton.jit
def _ratio(x, inverse):
    return _max(tl.abs(x) * inverse, 1.1920928955078125e-7)


@triton.jit
def _begin(table, decades: tl.constexpr, y):
    lower = _lookup(table, decades + 32, y, 32)
    return tl.where(y >= _lookup(table, decades, y, 32), lower + lower, lower)


@triton.jit
def dynamic_nearest(table, x, inverse, SIGNED: tl.constexpr):
    y = _ratio(x, inverse)
    begin = _begin(table, NEAREST, y)
    inverse_slope = _lookup(table, INVERSE, begin, 8)
    t = _rint(tl.fma(y, inverse_slope, _lookup(table, INVERSE_OFFSET, begin, 8)))
    return _finish(_min(t, begin + (begin - 1.0)), x, SIGNED)


@triton.jit
def dynamic_stochastic(table, x, inverse, bits, SIGNED: tl.constexpr):
    u = (bits >> 8).to(tl.float32) * 5.9604644775390625e-8
    y = _ratio(x, inverse)
    begin = _begin(table, LOWEST, y)
    inverse_slope = _lookup(table, INVERSE, begin, 8)
    t = tl.fma(y, inverse_slope, _lookup(table, INVERSE_OFFSET, begin, 8))
    n = _rint(t)
    t = tl.where(n > t, n - 1.0, n)  # floor
    first: tl.constexpr = 1.0 if SIGNED else 2.0
    t = _max(first - 1.0, _min(t, begin + (begin - 1.0)))
    low, high = _magnitude(table, t, SIGNED), _magnitude(table, t + 1.0, SIGNED)
    t = tl.where(u * (high - low) < y - low, t + 1.0, t)
    return _finish(_min(t, first * 128.0), x, SIGNED)


@triton.jit
def decode(table, codes, scale, offs, inside, SIGNED: tl.constexpr):
    """fp32 of a tile of codes that begins at a multiple of CODE_BLOCK."""
    value = dynamic_value(table, codes.to(tl.float32), SIGNED)
    pointer = scale.to(tl.pointer_type(tl.float32)) + offs // CODE_BLOCK
    if inside is None:
        return value * tl.load(pointer)
    else:
        return value * tl.load(pointer, mask=inside, other=0.0)


@triton.jit
def encode(
    table,
    x,
    scale,
    offs,
    inside,
    key,
    SIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Codes of a tile, uint8; stores the scale of each of its blocks."""
    if inside is not None:
        x = tl.where(inside, x, 0.0)
    BLOCKS: tl.constexpr = BLOCK // CODE_BLOCK
    magnitude = tl.reshape(_bits(x) & 0x7FFFFFFF, [BLOCKS, CODE_BLOCK])
    top = tl.max(magnitude, axis=1)  # every NaN above Inf
    largest = _float(tl.where(top < 0x7F800000, top, NAN))
    inverse = _min(tl.div_rn(1.0, largest), FLT_MAX)
    inverse = tl.where(largest > 0.0, inverse, 0.0)
    at = tl.min(offs, axis=0) // CODE_BLOCK + tl.arange(0, BLOCKS)
    pointer = scale.to(tl.pointer_type(tl.float32)) + at
    if inside is None:
        tl.store(pointer, largest)
    else:
        count = tl.sum(tl.reshape(inside.to(tl.int32), [BLOCKS, CODE_BLOCK]), axis=1)
        tl.store(pointer, largest, mask=count > 0)
    each = tl.reshape(tl.broadcast_to(inverse[:, None], [BLOCKS, CODE_BLOCK]), [BLOCK])
    if STOCHASTIC:
        code = dynamic_stochastic(table, x, each, random_bits(key, offs), SIGNED)
    else:
        code = dynamic_nearest(table, x, each, SIGNED)
    return code.to(tl.int32).to(tl.uint8)
