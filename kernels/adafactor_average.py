"""The second moments of Adafactor in Triton (csrc/cuda/adafactor_average.cuh): sums of squares of rows
and columns, the averages they move, and what these multiply a gradient by.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .adafactor_table import (
    BATCH,
    BLOCKS,
    COLUMN_FACTOR,
    COLUMN_PARTS,
    COLUMNS,
    HEIGHT,
    MEAN_PARTS,
    MEAN_ROWS,
    MEANS,
    ROW_BLOCK,
    ROW_BLOCKS,
    ROW_FACTOR,
    ROW_PARTS,
    ROW_TILES,
    SHAPE,
    TILE_ROWS,
    WIDTH,
)
from .optim_constants import ADAFACTOR_EPS1, CONSTANTS, group_number
from .optim_elements import facts_of, load, memory_of, prepared, store
from .optim_prepare import NORM_SUMS, add_halves, all_sums, dtype_of
from .optim_rules import lerp
from .optim_table import GRAD_KIND_AT, GROUP, GROUP_AT, KIND, ROW, STATE_AT, field


@triton.jit
def _halves(x, N: tl.constexpr, M: tl.constexpr):
    """[2 N, M] to [N, M]: i and i + N."""
    low, high = tl.split(tl.permute(tl.reshape(x, [2, N, M]), [1, 2, 0]))
    return low + high


@triton.jit
def lanes_in_chains(sums, N: tl.constexpr):
    """fp32 [N, 32] to float64 [N]: lanes 4 k + i into sum i, then (0 + 1) + (2 + 3)."""
    lanes = tl.reshape(sums, [N, 8, 4])
    index = tl.arange(0, 8)[None, :, None]
    chains = tl.zeros([N, 4], tl.float64)
    for k in tl.static_range(8):
        chains += tl.sum(tl.where(index == k, lanes, 0.0), axis=1).to(tl.float64)
    even, odd = tl.split(tl.reshape(chains, [N, 2, 2]))
    return tl.sum(even + odd, axis=1)  # of two


@triton.jit
def gradients(m, f, offs, inside, KIND_BITS: tl.constexpr):
    g = load(m.grad, offs, inside, dtype_of(field(KIND_BITS, GRAD_KIND_AT))).to(tl.float32)
    g = prepared(g, f)
    if inside is None:
        return g
    else:
        return tl.where(inside, g, 0.0)


@triton.jit
def tensor_at(table_ptr, shapes_ptr, facts_ptr, constants_ptr, number):
    """Row, shape, constants, addresses and numbers of a tensor."""
    row = table_ptr + number * ROW
    constants = constants_ptr + number * CONSTANTS
    m = memory_of(row, 0, 0, 0)
    f = facts_of(row, tl.load(facts_ptr), tl.load(facts_ptr + 1), constants, 0.0)
    return row, shapes_ptr + number * SHAPE, constants, m, f


# --- squares: a program a tile of 64 rows and 512 columns


@triton.jit
def _add_rows(m, f, to, begin, rows, width, stride, KIND_BITS: tl.constexpr):
    r = tl.arange(0, TILE_ROWS)
    lanes = tl.arange(0, 32)
    first = begin + r[:, None] * stride
    there = r[:, None] < rows
    sums = tl.zeros([TILE_ROWS, 32], tl.float32)
    for at in range(0, width, 32):
        column = at + lanes[None, :]
        g = gradients(m, f, first + column, there & (column < width), KIND_BITS)
        sums = tl.fma(g, g, sums)
    tl.store(to + r, lanes_in_chains(sums, TILE_ROWS), mask=r < rows)


@triton.jit
def _add_columns(m, f, to, begin, rows, width, stride, KIND_BITS: tl.constexpr):
    column = tl.arange(0, ROW_BLOCK)
    there = column < width
    sums = tl.zeros([ROW_BLOCK], tl.float32)
    for r in range(rows):
        g = gradients(m, f, begin + r * stride + column, there, KIND_BITS)
        sums = tl.fma(g, g, sums)
    tl.store(to + column, sums, mask=there)


@triton.jit
def _squares(m, f, shape, at, row_parts_ptr, column_parts_ptr, KIND_BITS: tl.constexpr):
    batch, height, width = tl.load(shape + BATCH), tl.load(shape + HEIGHT), tl.load(shape + WIDTH)
    blocks, tiles = tl.load(shape + ROW_BLOCKS), tl.load(shape + ROW_TILES)
    block, tile = at % blocks, at // blocks
    matrix, tile_of_matrix = tile // tiles, tile % tiles
    row = matrix * height + tile_of_matrix * TILE_ROWS
    rows = tl.minimum(height - tile_of_matrix * TILE_ROWS, TILE_ROWS)
    column = block * ROW_BLOCK
    count = tl.minimum(width - column, ROW_BLOCK)
    begin = row * width + column
    of_rows = row_parts_ptr + tl.load(shape + ROW_PARTS) + block * batch * height + row
    of_columns = column_parts_ptr + tl.load(shape + COLUMN_PARTS)
    of_columns += tile_of_matrix * batch * width + matrix * width + column
    _add_columns(m, f, of_columns, begin, rows, count, width, KIND_BITS)
    _add_rows(m, f, of_rows, begin, rows, count, width, KIND_BITS)


@triton.jit
def adafactor_squares_kernel(
    table_ptr, shapes_ptr, list_ptr, facts_ptr, constants_ptr, row_parts_ptr, column_parts_ptr,
    KINDS: tl.constexpr,
):  # fmt: skip
    if tl.load(facts_ptr + 2) == 0.0:
        piece = list_ptr + tl.program_id(0).to(tl.int64) * 2
        number, at = tl.load(piece), tl.load(piece + 1)
        row, shape, _, m, f = tensor_at(table_ptr, shapes_ptr, facts_ptr, constants_ptr, number)
        kind = tl.load(row + KIND)
        for i in tl.static_range(len(KINDS)):
            if kind == i:
                _squares(m, f, shape, at, row_parts_ptr, column_parts_ptr, KINDS[i])


# --- averages


@triton.jit
def move_state(address, f, offs, inside, end, KIND_BITS: tl.constexpr):
    """An element of a state moves towards ``end`` and is stored; returns what it then is."""
    DTYPE: tl.constexpr = dtype_of(field(KIND_BITS, STATE_AT))
    x = load(address, offs, inside, DTYPE).to(tl.float32)
    moved = lerp(x, end, f.constants[0], f.constants[1]).to(DTYPE)
    store(address, offs, inside, moved, DTYPE)
    return moved.to(tl.float32)


@triton.jit
def _row_sums(parts, there, blocks, stride):
    """Eight blocks of columns in order, these tiles in order."""
    total = tl.zeros([NORM_SUMS], tl.float64)
    for block in range(0, blocks, BLOCKS):
        tile = tl.zeros([NORM_SUMS], tl.float64)
        for k in tl.static_range(BLOCKS):
            at = block + k
            tile += tl.load(parts + at * stride, mask=there & (at < blocks), other=0.0)
        total += tile
    return total


@triton.jit
def _average_rows(m, f, shape, at, row_parts_ptr, factors_ptr, means_ptr, KIND_BITS: tl.constexpr):
    height, width = tl.load(shape + HEIGHT), tl.load(shape + WIDTH)
    parts, of_rows = tl.load(shape + MEAN_PARTS), tl.load(shape + BATCH) * height
    matrix, begin = at // parts, at % parts * MEAN_ROWS
    sums = tl.zeros([NORM_SUMS], tl.float64)
    for first in range(begin, tl.minimum(begin + MEAN_ROWS, height), NORM_SUMS):
        r = first + tl.arange(0, NORM_SUMS)
        there = r < height
        row = matrix * height + r
        squares = row_parts_ptr + tl.load(shape + ROW_PARTS) + row
        total = _row_sums(squares, there, tl.load(shape + ROW_BLOCKS), of_rows)
        mean = (total / width.to(tl.float64)).to(tl.float32)
        now = move_state(m.states[0], f, row, there, mean, KIND_BITS)
        tl.store(factors_ptr + tl.load(shape + ROW_FACTOR) + row, now, mask=there)
        sums += tl.where(there, now, 0.0).to(tl.float64)
    tl.store(means_ptr + tl.load(shape + MEANS) + at, add_halves(sums))


@triton.jit
def _average_columns(m, f, shape, at, column_parts_ptr, factors_ptr, KIND_BITS: tl.constexpr):
    tiles, of_columns = tl.load(shape + ROW_TILES), tl.load(shape + BATCH) * tl.load(shape + WIDTH)
    column = at * COLUMNS + tl.arange(0, COLUMNS)
    there = column < of_columns
    parts = column_parts_ptr + tl.load(shape + COLUMN_PARTS)
    chain = tl.arange(0, 8)[:, None]
    sums = tl.zeros([8, COLUMNS], tl.float64)
    for first in range(0, tiles, 8):
        tile = first + chain
        mask = there[None, :] & (tile < tiles)
        part = tl.load(parts + tile * of_columns + column[None, :], mask=mask, other=0.0)
        sums += part.to(tl.float64)
    sums = _halves(_halves(_halves(sums, 4, COLUMNS), 2, COLUMNS), 1, COLUMNS)
    mean = (tl.sum(sums, axis=0) / tl.load(shape + HEIGHT).to(tl.float64)).to(tl.float32)
    now = move_state(m.states[1], f, column, there, mean, KIND_BITS)
    factor = (1.0 / tl.sqrt(now.to(tl.float64))).to(tl.float32)
    tl.store(factors_ptr + tl.load(shape + COLUMN_FACTOR) + column, factor, mask=there)


@triton.jit(do_not_specialize=["n_rows"])
def adafactor_average_kernel(
    table_ptr, shapes_ptr, rows_ptr, columns_ptr, facts_ptr, constants_ptr, row_parts_ptr,
    column_parts_ptr, row_factor_ptr, column_factor_ptr, means_ptr,
    n_rows,  # programs of rows; those of columns come after them
    KINDS: tl.constexpr,
):  # fmt: skip
    if tl.load(facts_ptr + 2) == 0.0:
        program = tl.program_id(0).to(tl.int64)
        of_rows = program < n_rows
        piece = tl.where(of_rows, program, program - n_rows) * 2
        list_ptr = rows_ptr if of_rows else columns_ptr
        number, at = tl.load(list_ptr + piece), tl.load(list_ptr + piece + 1)
        row, shape, _, m, f = tensor_at(table_ptr, shapes_ptr, facts_ptr, constants_ptr, number)
        kind = tl.load(row + KIND)
        for i in tl.static_range(len(KINDS)):
            if kind == i:
                if of_rows:
                    _average_rows(
                        m, f, shape, at, row_parts_ptr, row_factor_ptr, means_ptr, KINDS[i]
                    )
                else:
                    _average_columns(m, f, shape, at, column_parts_ptr, column_factor_ptr, KINDS[i])


@triton.jit
def adafactor_factors_kernel(
    table_ptr, shapes_ptr, list_ptr, groups_ptr, facts_ptr, row_factor_ptr, means_ptr
):
    if tl.load(facts_ptr + 2) == 0.0:
        piece = list_ptr + tl.program_id(0).to(tl.int64) * 2
        number, at = tl.load(piece), tl.load(piece + 1)
        group = groups_ptr + tl.load(table_ptr + number * ROW + GROUP_AT) * GROUP
        shape = shapes_ptr + number * SHAPE
        height, parts = tl.load(shape + HEIGHT), tl.load(shape + MEAN_PARTS)
        eps1 = group_number(group, ADAFACTOR_EPS1, height > 0)
        matrix, begin = at // parts, at % parts * MEAN_ROWS
        means = means_ptr + tl.load(shape + MEANS) + matrix * parts
        mean = all_sums(means, parts) / height.to(tl.float64)
        mean = tl.where(mean < eps1, eps1, mean)
        for first in range(begin, tl.minimum(begin + MEAN_ROWS, height), NORM_SUMS):
            r = first + tl.arange(0, NORM_SUMS)
            to = row_factor_ptr + tl.load(shape + ROW_FACTOR) + matrix * height + r
            row_var = tl.load(to, mask=r < height, other=0.0).to(tl.float64)
            tl.store(to, (1.0 / tl.sqrt(row_var / mean)).to(tl.float32), mask=r < height)
