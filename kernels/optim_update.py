"""The update of optim_step in Triton: every element comes from memory and goes back once
(csrc/cuda/optim_step.cuh). A program takes a piece of one tensor, tile by tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .optim_constants import CONSTANTS
from .optim_elements import (
    close_param,
    close_state,
    facts_of,
    load,
    memory_of,
    open_param,
    open_state,
    prepared,
    store,
)
from .optim_memory import KEY_WORDS
from .optim_prepare import dtype_of
from .optim_rules import shrink, states_of, update
from .optim_table import (
    BODY,
    CODES,
    COPY_AT,
    GRAD,
    GRAD_KIND_AT,
    HAS_EMA,
    HAS_MASK,
    KIND,
    NUMEL,
    ROW,
    SHIFT,
    STATE_AT,
    STOCHASTIC,
    TAILS,
    WIDE,
    field,
    has,
)

# Registers of a thread: four blocks of four warps on a multiprocessor; three where the search for codes
# of several states needs more, and as many as it takes where that is by chance.
REGISTERS, CODED_REGISTERS = 128, 168
EDGE = 256  # elements: two a thread; a block of 8-bit states


def most_registers(rule: str, kinds: tuple[int, ...]) -> int | None:
    """What the compiler is told for an update of these kinds; None: nothing."""
    states = [states_of(rule, kind & 31) if field(kind, STATE_AT) == CODES else 0 for kind in kinds]
    if max(states, default=0) < 2:
        return REGISTERS
    return None if any(has(kind, STOCHASTIC) for kind in kinds) else CODED_REGISTERS


@triton.jit
def _update_tile(
    m,  # the tensor's Memory
    f,  # its Facts
    offs,
    inside,  # which elements are there; None: all, and they are aligned
    tail,  # which of them are of torch's tail; None: none
    RULE: tl.constexpr,
    KIND_BITS: tl.constexpr,
    ZERO_GRAD: tl.constexpr,
):
    GRAD_DTYPE: tl.constexpr = dtype_of(field(KIND_BITS, GRAD_KIND_AT))
    VARIANT: tl.constexpr = KIND_BITS & 31
    COUNT: tl.constexpr = states_of(RULE, VARIANT)
    p = open_param(m, offs, inside, KIND_BITS)
    g = load(m.grad, offs, inside, GRAD_DTYPE).to(tl.float32)
    s = ()
    for k in tl.static_range(COUNT):
        s = s + (open_state(k, m, offs, inside, RULE, KIND_BITS),)
    p, s = update(f.constants, p, prepared(g, f), s, tail, RULE, VARIANT)
    if f.threshold > 0.0:
        p = shrink(p, f.threshold)
    if has(KIND_BITS, HAS_MASK):
        keep = load(m.mask, offs, inside, tl.uint8) != 0
        p = tl.where(keep, p, 0.0)
    rounded = close_param(p, m, offs, inside, KIND_BITS)
    for k in tl.static_range(COUNT):
        x = s[k]
        if has(KIND_BITS, HAS_MASK):
            x = tl.where(keep, x, 0.0)
        close_state(k, x, m, offs, inside, RULE, KIND_BITS)
    if field(KIND_BITS, COPY_AT):
        store(m.copy, offs, inside, p, dtype_of((field(KIND_BITS, COPY_AT)) - 1))
    if has(KIND_BITS, HAS_EMA):
        e = load(m.ema, offs, inside, tl.float32)
        store(m.ema, offs, inside, tl.fma(rounded - e, f.ema_rest, e), tl.float32)
    if ZERO_GRAD:
        store(m.grad, offs, inside, tl.zeros_like(g), GRAD_DTYPE)


@triton.jit
def _update_piece(
    row,
    first,
    tiles,
    facts_ptr,
    constants,
    keys,
    codes,
    ema_rest,
    RULE: tl.constexpr,
    KIND_BITS: tl.constexpr,
    ZERO_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    EDGE: tl.constexpr,
):
    begin = tl.load(row + SHIFT)
    end = begin + tl.load(row + NUMEL)
    body = begin + tl.load(row + BODY)
    wide = tl.load(row + WIDE) != 0
    last = tl.minimum(first + tiles, tl.cdiv(end, BLOCK))
    if tl.load(facts_ptr + 2) == 0.0:
        m = memory_of(row, keys, codes, begin)
        f = facts_of(row, tl.load(facts_ptr), tl.load(facts_ptr + 1), constants, ema_rest)
        for tile in range(first, last):
            at = tile * BLOCK
            if wide & (at >= begin) & (at + BLOCK <= body):
                offs = at + tl.arange(0, BLOCK)
                _update_tile(m, f, offs, None, None, RULE, KIND_BITS, ZERO_GRAD)
            else:
                for part in range(at, tl.minimum(at + BLOCK, end), EDGE):
                    offs = part + tl.arange(0, EDGE)
                    inside = (offs >= begin) & (offs < end)
                    if has(KIND_BITS, TAILS):
                        tail = offs >= body
                    else:
                        tail = None
                    _update_tile(m, f, offs, inside, tail, RULE, KIND_BITS, ZERO_GRAD)
    elif ZERO_GRAD:
        grad = tl.load(row + GRAD)
        for part in range(first * BLOCK, tl.minimum(last * BLOCK, end), EDGE):
            offs = part + tl.arange(0, EDGE)
            zero = tl.zeros([EDGE], tl.float32)
            inside = (offs >= begin) & (offs < end)
            store(grad, offs, inside, zero, dtype_of(field(KIND_BITS, GRAD_KIND_AT)))


@triton.jit(do_not_specialize=["tiles", "ema_rest"])
def optim_update_kernel(
    table_ptr,  # rows
    pieces_ptr,
    codes_ptr,
    facts_ptr,
    constants_ptr,
    keys_ptr,
    tiles,  # of a piece
    ema_rest,
    RULE: tl.constexpr,
    KINDS: tl.constexpr,
    ZERO_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,  # elements of a tile
    EDGE: tl.constexpr,  # of what is taken at a time where a tile is not whole or not aligned
):
    piece = pieces_ptr + tl.program_id(0).to(tl.int64) * 2
    number, first = tl.load(piece), tl.load(piece + 1)
    row = table_ptr + number * ROW
    constants = constants_ptr + number * CONSTANTS
    keys = keys_ptr + number * KEY_WORDS
    kind = tl.load(row + KIND)
    for i in tl.static_range(len(KINDS)):
        if kind == i:
            _update_piece(
                row,
                first,
                tiles,
                facts_ptr,
                constants,
                keys,
                codes_ptr,
                ema_rest,
                RULE,
                KINDS[i],
                ZERO_GRAD,
                BLOCK,
                EDGE,
            )
