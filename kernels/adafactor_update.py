"""Adafactor's direction and update in Triton (csrc/cuda/adafactor_update.cuh): over the elements as
they lie in memory, whatever the matrices.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import _min
from .adafactor_average import gradients, lanes_in_chains, move_state, tensor_at
from .adafactor_table import COLUMN_FACTOR, HEIGHT, LARGE, MATRIX, ROW_FACTOR, WIDTH
from .optim_constants import ADAFACTOR_D, ADAFACTOR_EPS2, ADAFACTOR_RATE, group_lr, group_number
from .optim_elements import load, store
from .optim_prepare import all_sums, dtype_of
from .optim_rules import shrink
from .optim_table import (
    FIRST_BLOCK,
    GRAD_KIND_AT,
    GROUP,
    GROUP_AT,
    KIND,
    NORM_BLOCK,
    NUMEL,
    PARAM_AT,
    STATE_AT,
    STEP,
    WIDE,
    field,
    has,
)

PARTS, PART = tl.constexpr(8), tl.constexpr(512)  # of a block whose squares are added in fp32


@triton.jit
def _factors(shape, row_factor_ptr, column_factor_ptr, offs, inside, KIND_BITS: tl.constexpr):
    """Product of a row's and a column's factor."""
    INDEX: tl.constexpr = tl.int64 if has(KIND_BITS, LARGE) else tl.int32
    height, width = tl.load(shape + HEIGHT).to(INDEX), tl.load(shape + WIDTH).to(INDEX)
    at = offs.to(INDEX)
    row = at // width
    column = row // height * width + (at - row * width)
    rows = row_factor_ptr + tl.load(shape + ROW_FACTOR) + row
    columns = column_factor_ptr + tl.load(shape + COLUMN_FACTOR) + column
    if inside is None:
        return tl.load(rows) * tl.load(columns)
    else:
        return tl.load(rows, mask=inside, other=0.0) * tl.load(columns, mask=inside, other=0.0)


@triton.jit
def _of_vector(variance):
    return tl.div_rn(1.0, tl.sqrt_rn(variance))


@triton.jit
def _rate(row, group, param_square, direction_square):
    """adafactor_rate; the step has been counted."""
    step_at = tl.load(row + STEP).to(tl.pointer_type(tl.float32))
    numel = tl.load(row + NUMEL)
    there = numel > 0
    lr, eps2 = group_lr(group, there), group_number(group, ADAFACTOR_EPS2, there)
    root = tl.sqrt(numel.to(tl.float64))
    size = tl.sqrt(param_square) / root
    excess = tl.sqrt(direction_square) / (root * group_number(group, ADAFACTOR_D, there))
    length = tl.where(size > eps2, size, eps2)
    bound = 1.0 / tl.sqrt(tl.load(step_at).to(tl.float64))
    relative = tl.where(lr < bound, lr, bound)
    return (length * relative * -1.0 / tl.where(excess > 1.0, excess, 1.0)).to(tl.float32)


@triton.jit
def _in_order(x):
    index = tl.arange(0, PARTS)
    total = tl.sum(tl.zeros_like(x), axis=0)
    for i in range(PARTS):
        total += tl.sum(tl.where(index == i, x, 0.0), axis=0)
    return total


@triton.jit
def _direction_squares(
    m, f, shape, begin, end, row_factor_ptr, column_factor_ptr, KIND_BITS: tl.constexpr
):
    """|p|^2 and |u|^2 of a block; a vector's variance moves."""
    first = begin + tl.arange(0, PARTS)[:, None] * PART
    lanes = tl.arange(0, 32)[None, :]
    params, directions = tl.zeros([PARTS, 32], tl.float32), tl.zeros([PARTS, 32], tl.float32)
    for at in range(0, tl.minimum(end - begin, PART), 32):
        offs = first + at + lanes
        inside = offs < end
        p = load(m.param, offs, inside, dtype_of(field(KIND_BITS, PARAM_AT))).to(tl.float32)
        g = gradients(m, f, offs, inside, KIND_BITS)
        if has(KIND_BITS, MATRIX):
            factor = _factors(shape, row_factor_ptr, column_factor_ptr, offs, inside, KIND_BITS)
        else:
            factor = _of_vector(move_state(m.states[0], f, offs, inside, g * g, KIND_BITS))
        u = tl.where(inside, g * _min(f.constants[2], factor), 0.0)
        params = tl.fma(p, p, params)
        directions = tl.fma(u, u, directions)
    return _in_order(lanes_in_chains(params, PARTS)), _in_order(lanes_in_chains(directions, PARTS))


@triton.jit(do_not_specialize=["n_blocks"])
def adafactor_direction_kernel(
    table_ptr, shapes_ptr, list_ptr, groups_ptr, facts_ptr, constants_ptr, row_factor_ptr,
    column_factor_ptr, sums_ptr, counts_ptr, n_blocks, KINDS: tl.constexpr,
):  # fmt: skip
    if tl.load(facts_ptr + 2) == 0.0:
        block = tl.program_id(0).to(tl.int64)
        number, within = tl.load(list_ptr + block * 2), tl.load(list_ptr + block * 2 + 1)
        row, shape, constants, m, f = tensor_at(
            table_ptr, shapes_ptr, facts_ptr, constants_ptr, number
        )
        numel = tl.load(row + NUMEL)
        begin = within * NORM_BLOCK
        end = tl.minimum(begin + NORM_BLOCK, numel)
        kind = tl.load(row + KIND)
        for i in tl.static_range(len(KINDS)):
            if kind == i:
                param, direction = _direction_squares(
                    m, f, shape, begin, end, row_factor_ptr, column_factor_ptr, KINDS[i]
                )
                # The sums before the count, the count before the others' sums.
                tl.store(sums_ptr + block, param)
                tl.store(sums_ptr + n_blocks + block, direction)
        before = tl.atomic_add(counts_ptr + number, 1, sem="acq_rel")
        blocks = tl.cdiv(numel, NORM_BLOCK)
        if before == blocks - 1:
            first = sums_ptr + tl.load(row + FIRST_BLOCK)
            group = groups_ptr + tl.load(row + GROUP_AT) * GROUP
            rate = _rate(row, group, all_sums(first, blocks), all_sums(first + n_blocks, blocks))
            tl.store(constants + ADAFACTOR_RATE, rate)


# --- the update


@triton.jit
def _apply_tile(
    m, f, shape, offs, inside, row_factor_ptr, column_factor_ptr,
    KIND_BITS: tl.constexpr, ZERO_GRAD: tl.constexpr,
):  # fmt: skip
    PARAM: tl.constexpr = dtype_of(field(KIND_BITS, PARAM_AT))
    p = load(m.param, offs, inside, PARAM).to(tl.float32)
    g = gradients(m, f, offs, inside, KIND_BITS)
    if has(KIND_BITS, MATRIX):
        factor = _factors(shape, row_factor_ptr, column_factor_ptr, offs, inside, KIND_BITS)
    else:
        DTYPE: tl.constexpr = dtype_of(field(KIND_BITS, STATE_AT))
        factor = _of_vector(load(m.states[0], offs, inside, DTYPE).to(tl.float32))
    u = g * _min(f.constants[2], factor)
    p = tl.fma(u, f.constants[4], p * f.constants[3])
    if f.threshold > 0.0:
        p = shrink(p, f.threshold)
    store(m.param, offs, inside, p, PARAM)
    if ZERO_GRAD:
        store(m.grad, offs, inside, tl.zeros_like(g), dtype_of(field(KIND_BITS, GRAD_KIND_AT)))


@triton.jit
def _apply_piece(
    row, shape, m, f, skip, first, tiles, row_factor_ptr, column_factor_ptr,
    KIND_BITS: tl.constexpr, ZERO_GRAD: tl.constexpr, BLOCK: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    end = tl.load(row + NUMEL)
    wide = tl.load(row + WIDE) != 0
    begin, last = first * BLOCK, tl.minimum((first + tiles) * BLOCK, end)
    if skip == 0.0:
        for at in range(begin, last, BLOCK):
            if wide & (at + BLOCK <= end):
                offs = at + tl.arange(0, BLOCK)
                _apply_tile(
                    m, f, shape, offs, None, row_factor_ptr, column_factor_ptr, KIND_BITS, ZERO_GRAD
                )
            else:
                for part in range(at, tl.minimum(at + BLOCK, end), EDGE):
                    offs = part + tl.arange(0, EDGE)
                    _apply_tile(
                        m, f, shape, offs, offs < end, row_factor_ptr, column_factor_ptr,
                        KIND_BITS, ZERO_GRAD,
                    )  # fmt: skip
    elif ZERO_GRAD:
        for part in range(begin, last, EDGE):
            offs = part + tl.arange(0, EDGE)
            zero = tl.zeros([EDGE], tl.float32)
            DTYPE: tl.constexpr = dtype_of(field(KIND_BITS, GRAD_KIND_AT))
            store(m.grad, offs, offs < end, zero, DTYPE)


@triton.jit(do_not_specialize=["tiles"])
def adafactor_apply_kernel(
    table_ptr, shapes_ptr, list_ptr, facts_ptr, constants_ptr, row_factor_ptr, column_factor_ptr,
    tiles,  # of a piece
    KINDS: tl.constexpr,
    ZERO_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,  # elements of a tile
    EDGE: tl.constexpr,  # of what is taken at a time where a tile is not whole or not aligned
):  # fmt: skip
    piece = list_ptr + tl.program_id(0).to(tl.int64) * 2
    number, first = tl.load(piece), tl.load(piece + 1)
    row, shape, _, m, f = tensor_at(table_ptr, shapes_ptr, facts_ptr, constants_ptr, number)
    skip, kind = tl.load(facts_ptr + 2), tl.load(row + KIND)
    for i in tl.static_range(len(KINDS)):
        if kind == i:
            _apply_piece(
                row, shape, m, f, skip, first, tiles, row_factor_ptr, column_factor_ptr,
                KINDS[i], ZERO_GRAD, BLOCK, EDGE,
            )  # fmt: skip
