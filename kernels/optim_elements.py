"""Elements of optim_step in Triton: from a tensor's arrays to fp32 and back, as in
csrc/cuda/optim_elements.cuh and optim_compact.cuh.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .optim_constants import THRESHOLD
from .optim_memory import (
    CODE_FLOATS,
    decode,
    encode,
    join_remainder,
    lost,
    random_bits,
    split_remainder,
    stochastic_bf16,
)
from .optim_prepare import dtype_of
from .optim_rules import is_signed
from .optim_table import (
    COPY,
    EMA,
    GRAD,
    MASK,
    MASTER,
    MASTER_AT,
    NEGATE,
    PARAM,
    PARAM_AT,
    SCALE,
    STATE,
    STATE_AT,
    STOCHASTIC,
    field,
    has,
)


class Memory(NamedTuple):
    """Addresses of a tensor's arrays."""

    param: Any
    grad: Any
    states: Any
    scales: Any
    ema: Any
    copy: Any
    mask: Any
    master: Any
    keys: Any
    codes: Any
    shift: Any


@triton.jit
def memory_of(row, keys, codes, shift):
    return Memory(
        tl.load(row + PARAM),
        tl.load(row + GRAD),
        (tl.load(row + STATE), tl.load(row + STATE + 1), tl.load(row + STATE + 2)),
        (tl.load(row + SCALE), tl.load(row + SCALE + 1), tl.load(row + SCALE + 2)),
        tl.load(row + EMA),
        tl.load(row + COPY),
        tl.load(row + MASK),
        tl.load(row + MASTER),
        keys,
        codes,
        shift,
    )


class Facts(NamedTuple):
    """What all elements of a tensor share."""

    constants: Any
    threshold: Any
    scale: Any
    clip: Any
    sign: Any
    ema_rest: Any


@triton.jit
def facts_of(row, scale, clip, constants, ema_rest):
    """Constants that a rule does not read are not loaded."""
    c = (
        tl.load(constants),
        tl.load(constants + 1),
        tl.load(constants + 2),
        tl.load(constants + 3),
        tl.load(constants + 4),
        tl.load(constants + 5),
        tl.load(constants + 6),
        tl.load(constants + 7),
        tl.load(constants + 8),
        tl.load(constants + 9),
        tl.load(constants + 10),
    )
    sign = tl.where(tl.load(row + NEGATE) != 0, -1.0, 1.0)
    threshold = tl.load(constants + THRESHOLD)
    return Facts(c, threshold, scale, clip, sign, ema_rest)


@triton.jit
def _pointer(address, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    pointer = address.to(tl.pointer_type(DTYPE))
    if WHOLE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load(address, offs, inside, DTYPE: tl.constexpr):
    if inside is None:
        return tl.load(_pointer(address, DTYPE, True) + offs)
    else:
        return tl.load(_pointer(address, DTYPE, False) + offs, mask=inside, other=0)


@triton.jit
def store(address, offs, inside, x, DTYPE: tl.constexpr):
    if inside is None:
        tl.store(_pointer(address, DTYPE, True) + offs, x.to(DTYPE))
    else:
        tl.store(_pointer(address, DTYPE, False) + offs, x.to(DTYPE), mask=inside)


@triton.jit
def open_state(k: tl.constexpr, m, offs, inside, RULE: tl.constexpr, KIND_BITS: tl.constexpr):
    """State k as fp32."""
    if field(KIND_BITS, STATE_AT) == 3:
        codes = load(m.states[k], offs, inside, tl.uint8)
        SIGNED: tl.constexpr = is_signed(RULE, k)
        return decode(_code_table(m, SIGNED), codes, m.scales[k], offs, inside, SIGNED)
    else:
        return load(m.states[k], offs, inside, dtype_of(field(KIND_BITS, STATE_AT))).to(tl.float32)


@triton.jit
def close_state(k: tl.constexpr, x, m, offs, inside, RULE: tl.constexpr, KIND_BITS: tl.constexpr):
    RANDOM: tl.constexpr = has(KIND_BITS, STOCHASTIC)
    if field(KIND_BITS, STATE_AT) == 3:
        SIGNED: tl.constexpr = is_signed(RULE, k)
        BLOCK: tl.constexpr = x.shape[0]
        key = m.keys + 2 + 2 * k
        table = _code_table(m, SIGNED)
        codes = encode(table, x, m.scales[k], offs, inside, key, SIGNED, RANDOM, BLOCK)
        store(m.states[k], offs, inside, codes, tl.uint8)
    else:
        DTYPE: tl.constexpr = dtype_of(field(KIND_BITS, STATE_AT))
        if RANDOM and DTYPE == tl.bfloat16:
            x = stochastic_bf16(x, random_bits(m.keys + 2 + 2 * k, offs - m.shift))
        store(m.states[k], offs, inside, x, DTYPE)


@triton.jit
def _code_table(m, SIGNED: tl.constexpr):
    return m.codes if SIGNED else m.codes + CODE_FLOATS


@triton.jit
def open_param(m, offs, inside, KIND_BITS: tl.constexpr):
    """The parameter, or its master, as fp32."""
    if field(KIND_BITS, MASTER_AT) == 2:
        param = load(m.param, offs, inside, tl.int16)
        return join_remainder(param, load(m.master, offs, inside, tl.int16))
    else:
        p = load(m.param, offs, inside, dtype_of(field(KIND_BITS, PARAM_AT))).to(tl.float32)
        if field(KIND_BITS, MASTER_AT) == 1:
            p = p + load(m.master, offs, inside, tl.bfloat16).to(tl.float32)
        return p


@triton.jit
def close_param(p, m, offs, inside, KIND_BITS: tl.constexpr):
    """Stores it; returns what a weight average takes."""
    if field(KIND_BITS, MASTER_AT) == 2:
        param, remainder = split_remainder(p)
        store(m.param, offs, inside, param, tl.int16)
        store(m.master, offs, inside, remainder, tl.int16)
        return p
    else:
        DTYPE: tl.constexpr = dtype_of(field(KIND_BITS, PARAM_AT))
        if field(KIND_BITS, MASTER_AT) == 1:
            rounded = p.to(DTYPE)
            rest = lost(p, rounded.to(tl.float32))
            store(m.master, offs, inside, rest, tl.bfloat16)
        elif has(KIND_BITS, STOCHASTIC) and DTYPE == tl.bfloat16:
            rounded = stochastic_bf16(p, random_bits(m.keys, offs - m.shift))
        else:
            rounded = p.to(DTYPE)
        store(m.param, offs, inside, rounded, DTYPE)
        return p if field(KIND_BITS, MASTER_AT) == 1 else rounded.to(tl.float32)


@triton.jit
def prepared(g, f):
    """A gradient unscaled, clipped and with the sign that minimizes."""
    if (f.scale != 1.0) | (f.clip != 1.0) | (f.sign != 1.0):
        g = tl.div_rn(g, f.scale) * f.clip * f.sign
    return g
