"""block_linear's gradient of kept values in Triton: a product that is computed where a block is kept.

    values[b, i, j] = sum_m grad[m, row bn + i] * x[m, col[b] bk + j]

A program computes BLOCK_K columns of some kept blocks of a row, side by side (block_groups.py), over a
part of the tokens; parts are added in their order. Sums are fp32. Blocks have powers of two as sides
and 16 rows at least: thinner ones would leave the tensor cores idle, and come from the dense product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

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
    serves,
)
from .checks import FLOAT_DTYPES, check_matrix, check_tensor
from .launch import on_device_of
from .part_sums import add_parts
from .tuning import EXACT

MOST_PARTS = 16  # of the tokens
NUM_WARPS = 4


@triton.jit(do_not_specialize=["M", "blocks", "rows", "share", "size"])
def block_grad_values_kernel(
    grad_ptr,  # [M, N] fp32, bf16 or fp16
    x_ptr,  # [M, K] of the same dtype
    crow_ptr,  # [rows + 1] int32
    col_ptr,  # [blocks] int32
    out_ptr,  # [blocks, BN, BK], or fp32 [parts, blocks, BN, BK] to be added
    M,
    N,
    K,
    blocks,
    rows,
    share,  # tokens of a part
    size,  # of a part of out
    stride_gm,
    stride_gn,
    stride_xm,
    stride_xk,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ALIGN: tl.constexpr,  # elements of K read at once
    ALIGN_N: tl.constexpr,  # and of N
    LEVELS: tl.constexpr,
    BLOCK_M: tl.constexpr,  # tokens of a step
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    STEPS: tl.constexpr = BK // BLOCK_K if BK > BLOCK_K else 1
    EACH: tl.constexpr = BLOCK_K // BK if BK < BLOCK_K else 1
    PARTS: tl.constexpr = BN // BLOCK_N
    program = tl.program_id(0) // (STEPS * PARTS)
    row, index, first, last, _ = find_group(crow_ptr, blocks, rows, EACH, program, LEVELS)
    if (index >= 0) & (first < last):
        step = tl.program_id(0) % STEPS
        block, offset, there, k, inside = columns_of(
            col_ptr, first, last, step, K, BK, BLOCK_K, ALIGN
        )
        offs_i = tl.program_id(0) // STEPS % PARTS * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_n = tl.cast(row, tl.int64) * BN + offs_i
        mask_n = offs_n < N
        if ALIGN_N > 1:
            mask_n = tl.max_constancy(mask_n, ALIGN_N)
        acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        begin = tl.program_id(1) * share
        end = tl.minimum(begin + share, M)
        for m in range(begin, end, BLOCK_M):
            offs_m = m + tl.arange(0, BLOCK_M)
            mask_m = (offs_m < end)[:, None]
            grad_rows = offs_m.to(tl.int64) * stride_gm
            x_rows = offs_m.to(tl.int64) * stride_xm
            if ALIGN_N > 1:
                grad_rows = tl.multiple_of(grad_rows, ALIGN_N)
            if ALIGN > 1:
                x_rows = tl.multiple_of(x_rows, ALIGN)
            grad_at = grad_rows[:, None] + offs_n[None, :] * stride_gn
            x_at = x_rows[:, None] + k[None, :] * stride_xk
            grad = tl.load(grad_ptr + grad_at, mask=mask_m & mask_n[None, :], other=0.0)
            x = tl.load(x_ptr + x_at, mask=mask_m & inside[None, :], other=0.0)
            acc = tl.dot(tl.trans(grad), x, acc, input_precision="ieee")
        # What lies past N or K is 0, Inf in the other operand or not.
        acc = tl.where((offs_n < N)[:, None] & inside[None, :], acc, 0.0)
        at = (block * BN)[None, :] + offs_i[:, None]
        at = at * BK + offset[None, :] + tl.program_id(1).to(tl.int64) * size
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=there[None, :])


def tile_of(bn: int, dtype: torch.dtype) -> Tile:
    wide = dtype == torch.float32
    return Tile(32 if wide else 64, min(bn, 64), 64 if wide else 128)


def serves_gradient(bn: int, bk: int) -> bool:
    """Whether this kernel has blocks of that size."""
    return serves(bn, bk) and bn >= 16


def block_grad_values(
    grad: torch.Tensor, x: torch.Tensor, crow: torch.Tensor, col: torch.Tensor, bn: int, bk: int
) -> torch.Tensor:
    """The gradient [blocks, bn, bk] of kept values, for that of the outputs [M, N] and ``x`` [M, K];
    blocks of powers of two, of 16 rows at least."""
    op = "block_grad_values"
    check_matrix(op, "grad", grad, FLOAT_DTYPES)
    check_matrix(op, "x", x, (grad.dtype,))
    (M, N), K, blocks = grad.shape, x.shape[1], col.shape[0]
    check_tensor(op, "x", x, (M, K), (grad.dtype,), grad.device)
    check_weight(op, (blocks, bn, bk), crow, col, N)
    if not serves_gradient(bn, bk):
        raise ValueError(f"{op}: expected blocks of at least 16 rows in Triton, got {bn} x {bk}")
    out = torch.empty((blocks, bn, bk), dtype=grad.dtype, device=grad.device)
    if blocks == 0 or N == 0:
        return out.zero_()
    tile = tile_of(bn, grad.dtype)
    rows, subs = triton.cdiv(N, bn), bn // tile.BLOCK_N * max(bk // tile.BLOCK_K, 1)
    programs = (blocks // max(tile.BLOCK_K // bk, 1) + rows) * subs
    check_programs(op, programs)
    # Two steps a part at least.
    most = min(WANTED_PROGRAMS // programs, MOST_PARTS, M // (2 * tile.BLOCK_M))
    share = triton.cdiv(triton.cdiv(M, max(most, 1)), tile.BLOCK_M) * tile.BLOCK_M
    parts = max(triton.cdiv(M, share), 1) if M else 1
    to = out
    if parts > 1:
        to = torch.empty((parts, blocks * bn, bk), dtype=torch.float32, device=x.device)
    with on_device_of(x):
        block_grad_values_kernel[(programs, parts)](
            grad,
            x,
            crow.contiguous(),
            col.contiguous(),
            to,
            M,
            N,
            K,
            blocks,
            rows,
            share,
            out.numel(),
            *grad.stride(),
            *x.stride(),
            BN=bn,
            BK=bk,
            ALIGN=alignment(bk, x),
            ALIGN_N=alignment(bn, grad),
            LEVELS=levels_of(rows),
            num_warps=NUM_WARPS,
            num_stages=STAGES,
            **tile._asdict(),
            **EXACT,
        )
        if parts > 1:
            add_parts(to, None, None, None, out.view(blocks * bn, bk))
    return out
