"""Blocks of a row as programs take them, for block_linear and its gradient of values.

A program takes a group of at most ``each`` kept blocks of a row. Of row r are the groups from
start[r] // each + r on, at least as many as it needs, since

    (start + n) // each - start // each + 1 >= ceil(n / each)

and those beyond do nothing. A program finds its row in crow by steps of 64. Nothing outside the
operands is read, whatever crow and col hold.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .checks import check_tensor
from .launch import k_alignment

WANTED_PROGRAMS = 512
STAGES = 4  # of which the columns' numbers take one
LANES = tl.constexpr(64)  # of a step of find_group


@triton.jit
def row_start(crow_ptr, row, blocks, mask):
    """crow, inside [0, blocks] whatever it holds."""
    return tl.minimum(tl.maximum(tl.load(crow_ptr + row, mask=mask, other=0), 0), blocks)


@triton.jit
def find_group(crow_ptr, blocks, rows, each, group, LEVELS: tl.constexpr):
    """Row of blocks, number in it, first block and end of a group, and the blocks of the row."""
    row = 0
    for level in tl.static_range(LEVELS):
        step = LANES ** (LEVELS - 1 - level)
        r = row + tl.arange(0, LANES) * step
        before = row_start(crow_ptr, r, blocks, r < rows) // each + r <= group
        passed = tl.sum((before & (r < rows)).to(tl.int32), axis=0)
        row += tl.maximum(passed - 1, 0) * step
    begin = row_start(crow_ptr, row, blocks, True)
    end = tl.maximum(row_start(crow_ptr, row + 1, blocks, True), begin)
    index = group - begin // each - row
    first = tl.cast(begin, tl.int64) + tl.cast(index, tl.int64) * each
    last = tl.minimum(first + each, end)
    return row, index, first, last, end - begin


@triton.jit
def columns_of(
    col_ptr, first, last, step, K,
    BK: tl.constexpr, BLOCK_K: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Step `step` of a group's kept columns: each one's block, its place in that, whether it is one of
    the group, its column in x, and whether x has that."""
    STEPS: tl.constexpr = BK // BLOCK_K if BK > BLOCK_K else 1  # of a block
    EACH: tl.constexpr = BLOCK_K // BK if BK < BLOCK_K else 1  # blocks of a step
    lane = tl.arange(0, BLOCK_K)
    block = first + step // STEPS * EACH + lane // BK
    offset = step % STEPS * BLOCK_K + lane % BK
    there = block < last
    col = tl.load(col_ptr + block, mask=there, other=-1)
    col = tl.max_constancy(col, BLOCK_K if BK > BLOCK_K else BK)
    k = col.to(tl.int64) * BK + offset
    inside = (col >= 0) & (k < K)
    if ALIGN > 1:
        inside = tl.max_constancy(inside, ALIGN)
    return block, offset, there, k, inside


# --- for launchers


class Tile(NamedTuple):
    """BLOCK_N: of a block's rows, padded to 16 for tl.dot; 1 where none is."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int

    @property
    def num_warps(self) -> int:
        return 4 if self.BLOCK_N == 1 else min(max(self.BLOCK_M * self.BLOCK_N // 512, 1), 4)


def serves(bn: int, bk: int) -> bool:
    """Whether Triton has blocks of that size."""
    return bn & (bn - 1) == 0 and bk & (bk - 1) == 0


def levels_of(rows: int) -> int:
    """Of find_group: 64 to that power are at least the rows."""
    return next(i for i in range(1, 7) if 64**i >= rows)


def alignment(BK: int, *matrices: torch.Tensor) -> int:
    """k_alignment of these and of a block's columns."""
    align = min(k_alignment(*matrices), BK)
    return align if align >= 4 else 1


def check_weight(
    op: str, values_shape: tuple[int, ...], crow: torch.Tensor, col: torch.Tensor, N: int
) -> None:
    blocks, bn, bk = values_shape
    if bn < 1 or bk < 1 or not serves(bn, bk):
        raise ValueError(f"{op}: expected blocks of powers of two in Triton, got {bn} x {bk}")
    rows = triton.cdiv(N, bn)
    check_tensor(op, "crow", crow, (rows + 1,), (torch.int32,), crow.device)
    check_tensor(op, "col", col, (blocks,), (torch.int32,), crow.device)


def check_programs(op: str, programs: int) -> None:
    if programs >= 2**31:
        raise ValueError(f"{op}: expected fewer than 2^31 tiles, got {programs}")
