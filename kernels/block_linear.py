"""block_linear in Triton: a product whose weight is kept in blocks (BSR).

    out[m, row bn + i] = sum over kept blocks b of the row, j: x[m, col[b] bk + j] * values[b, i, j]

A row of blocks is a dense product of its kept blocks, side by side, with the columns of x they stand
for, which are gathered: BLOCK_K of them at a time, some blocks or a part of one.

Rows may hold any number of blocks. So that none holds up the others, a program takes a group of about
twice the mean at most (block_groups.py): a row that has more is several programs' work, whose sums
block_finish_kernel adds in their order. Few rows and tiles of x make groups smaller.

Blocks of fewer than 16 rows leave most of a tensor core idle, which waits for x then anyway; float32,
which has none, sums them by multiply-adds, a row a program. bn and bk are powers of two; others go
through the dense weight (ops/sparse_fallback.py).

int8 values give the bits of int8_linear with the dense weight. Float sums are fp32 (NUMERICS.md section
7). Nothing outside the operands is read or written, whatever crow and col hold.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .activation import check_activation
from .block_groups import (
    STAGES,
    WANTED_PROGRAMS,
    Tile,
    alignment,
    check_programs,
    check_weight,
    columns_of,
    find_group,
    levels_of,
    row_start,
)
from .checks import FLOAT_DTYPES, check_bias, check_matrix, check_scale, check_tensor
from .int8_mm import MAX_K
from .launch import on_device_of
from .part_sums import store_outputs
from .quantize_int8 import quantize_int8
from .tuning import EXACT

LEAST_COLUMNS = 256  # kept ones of a group, on average


@triton.jit(do_not_specialize=["M", "blocks", "rows", "each", "programs"])
def block_linear_kernel(
    x_ptr,  # [M, K] fp32, bf16 or fp16, or int8 for int8 values
    values_ptr,  # [blocks, BN, BK] of the same dtype
    crow_ptr,  # [rows + 1] int32
    col_ptr,  # [blocks] int32
    x_scale_ptr,  # [M] fp32 for int8, else None
    w_scale_ptr,  # [N] fp32 for int8, else None
    bias_ptr,  # [N] fp32, bf16 or fp16; None for no bias
    out_ptr,  # [M, N]
    sums_ptr,  # [2 (blocks // each + 1), BN // BLOCK_N, M, BLOCK_N] fp32 or int32: of longer rows
    M,
    N,
    K,
    blocks,
    rows,
    each,
    programs,  # of a tile of x: groups times parts of a block's rows
    stride_xm,
    stride_xk,
    ACTIVATION: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ALIGN: tl.constexpr,  # elements of x and of a block's row read at once
    LEVELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # 1: by multiply-adds
    BLOCK_K: tl.constexpr,
):
    PARTS: tl.constexpr = BN // BLOCK_N if BN > BLOCK_N else 1
    program = tl.program_id(0) % programs
    row, index, first, last, count = find_group(
        crow_ptr, blocks, rows, each, program // PARTS, LEVELS
    )
    # An empty row has one group, of no blocks: its outputs are the bias'.
    if (index == 0) | ((index > 0) & (first < last)):
        part = program % PARTS
        offs_i = part * BLOCK_N + tl.arange(0, BLOCK_N)  # of a block's rows
        offs_m = (tl.program_id(0) // programs).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = (offs_m < M)[:, None]
        x_rows = offs_m * stride_xm
        if ALIGN > 1:
            x_rows = tl.multiple_of(x_rows, ALIGN)
        STEPS: tl.constexpr = BK // BLOCK_K if BK > BLOCK_K else 1
        EACH: tl.constexpr = BLOCK_K // BK if BK < BLOCK_K else 1
        SUM: tl.constexpr = tl.int32 if values_ptr.dtype.element_ty == tl.int8 else tl.float32
        acc = tl.zeros([BLOCK_M, BLOCK_K if BLOCK_N == 1 else BLOCK_N], dtype=SUM)
        steps = tl.cdiv((last - first).to(tl.int32), EACH) * STEPS
        for step in range(steps):
            block, offset, there, k, inside = columns_of(
                col_ptr, first, last, step, K, BK, BLOCK_K, ALIGN
            )
            x_at = x_rows[:, None] + k[None, :] * stride_xk
            x = tl.load(x_ptr + x_at, mask=mask_m & inside[None, :], other=0)
            w_at = (block * BN)[None, :] + offs_i[:, None]
            mask = there[None, :] & (offs_i < BN)[:, None]
            w = tl.load(values_ptr + w_at * BK + offset[None, :], mask=mask, other=0)
            if BLOCK_N == 1:
                acc = tl.fma(x.to(SUM), tl.broadcast_to(w.to(SUM), [BLOCK_M, BLOCK_K]), acc)
            else:
                # "ieee": fp32 is multiplied in fp32, not rounded to tf32.
                acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee", out_dtype=SUM)
        if BLOCK_N == 1:
            acc = tl.sum(acc, axis=1)[:, None]
        offs_n = row * BN + offs_i
        mask = mask_m & ((offs_i < BN) & (offs_n < N))[None, :]
        if count <= each:
            store_outputs(
                acc, w_scale_ptr, x_scale_ptr, bias_ptr, out_ptr, offs_m, offs_n, mask, M, N,
                ACTIVATION,
            )  # fmt: skip
        else:
            slot = slot_of(first, index, each) * PARTS + part
            at = (slot * M + offs_m)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
            tl.store(sums_ptr + at, acc, mask=mask_m)


@triton.jit
def slot_of(first, index, each):
    """Where a longer row's group has its sums: of the groups that begin within the same `each` blocks,
    one may be a row's first, and one another row's, but not its first."""
    return (first // each * 2 + (index == 0)).to(tl.int64)


@triton.jit(do_not_specialize=["M", "blocks", "each", "programs"])
def block_finish_kernel(
    sums_ptr,
    crow_ptr,
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    blocks,
    each,
    programs,  # of a tile of x: rows of blocks times parts of a block's rows
    ACTIVATION: tl.constexpr,
    BN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    PARTS: tl.constexpr = BN // BLOCK_N if BN > BLOCK_N else 1
    program = tl.program_id(0) % programs
    row, part = program // PARTS, program % PARTS
    begin = row_start(crow_ptr, row, blocks, True)
    count = row_start(crow_ptr, row + 1, blocks, True) - begin
    if count > each:
        offs_m = (tl.program_id(0) // programs).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_i = part * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_n = row * BN + offs_i
        mask_m = (offs_m < M)[:, None]
        total = tl.zeros([BLOCK_M, BLOCK_N], sums_ptr.dtype.element_ty)
        for index in range(tl.cdiv(count, each)):
            slot = slot_of(tl.cast(begin, tl.int64) + index * each, index, each) * PARTS + part
            at = (slot * M + offs_m)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
            total += tl.load(sums_ptr + at, mask=mask_m, other=0)
        mask = mask_m & ((offs_i < BN) & (offs_n < N))[None, :]
        store_outputs(
            total,
            w_scale_ptr,
            x_scale_ptr,
            bias_ptr,
            out_ptr,
            offs_m,
            offs_n,
            mask,
            M,
            N,
            ACTIVATION,
        )


# --- launchers


def tile_of(M: int, bn: int, dtype: torch.dtype) -> Tile:
    """Not yet measured. Sums take 64 registers a thread at most, float32's operands as many again."""
    BLOCK_M = next((size for size in (16, 32, 64) if M <= size), 128)
    if dtype != torch.float32:
        return Tile(BLOCK_M, min(max(bn, 16), 64), 64)
    if bn < 16:
        return Tile(min(BLOCK_M, 64), 1, 64)
    return Tile(min(BLOCK_M, 64), min(bn, 64), 32)


def blocks_of_group(blocks: int, rows: int, bk: int, tiles: int) -> int:
    """``each``: not asked of the device, whose the order of a sum would then be. ``tiles``: programs of
    a group."""
    balanced = 2 * triton.cdiv(blocks, rows)
    filling = blocks // max(WANTED_PROGRAMS // tiles, 1)
    return max(min(balanced, filling), LEAST_COLUMNS // bk, 1)


def block_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    crow: torch.Tensor,
    col: torch.Tensor,
    weight_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    *,
    N: int,
) -> torch.Tensor:
    """``act(x @ weight.T + bias)`` [M, N] for ``x`` [M, K], blocks of powers of two; the rest as in
    ops.block_linear."""
    op, int8 = "block_linear", values.dtype == torch.int8
    check_matrix(op, "x", x, FLOAT_DTYPES if int8 else (values.dtype,))
    M, K = x.shape
    if values.dim() != 3:
        raise ValueError(f"{op}: expected values [blocks, bn, bk], got {tuple(values.shape)}")
    dtypes = (*FLOAT_DTYPES, torch.int8)
    check_tensor(op, "values", values, tuple(values.shape), dtypes, x.device)
    check_weight(op, tuple(values.shape), crow, col, N)
    check_activation(op, activation)
    check_scale(op, weight_scale, N, int8, x.device)
    check_bias(op, bias, N, x.device)
    if int8 and K > MAX_K:
        raise ValueError(f"{op}: expected K <= {MAX_K}, so that int32 holds the sum, got {K}")
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if M == 0 or N == 0:
        return out
    q, q_scale = quantize_int8(x) if int8 else (x, None)
    blocks, bn, bk = values.shape
    tile, rows = tile_of(M, bn, values.dtype), triton.cdiv(N, bn)
    tiles_m, parts = triton.cdiv(M, tile.BLOCK_M), max(bn // tile.BLOCK_N, 1)
    each = blocks_of_group(blocks, rows, bk, tiles_m * parts)
    programs = (blocks // each + rows) * parts
    check_programs(op, programs * tiles_m)
    sums = None
    if blocks > each:
        size = (2 * (blocks // each + 1), parts, M, tile.BLOCK_N)
        sums = torch.empty(size, dtype=torch.int32 if int8 else torch.float32, device=x.device)
    factors = (weight_scale, bias)
    weight_scale, bias = (None if t is None else t.contiguous() for t in factors)
    crow, options = crow.contiguous(), {"num_warps": tile.num_warps, **EXACT}
    shared = {"ACTIVATION": activation, "BN": bn, **options}
    with on_device_of(x):
        block_linear_kernel[(programs * tiles_m,)](
            q,
            values.contiguous(),
            crow,
            col.contiguous(),
            q_scale,
            weight_scale,
            bias,
            out,
            out if sums is None else sums,
            M,
            N,
            K,
            blocks,
            rows,
            each,
            programs,
            *q.stride(),
            BK=bk,
            ALIGN=alignment(bk, q),
            LEVELS=levels_of(rows),
            num_stages=STAGES,
            **tile._asdict(),
            **shared,
        )
        if sums is not None:
            programs = rows * parts
            block_finish_kernel[(programs * tiles_m,)](
                sums, crow, q_scale, weight_scale, bias, out, M, N, blocks, each, programs,
                BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, **shared,
            )  # fmt: skip
    return out
