"""What the sparse products do with their sums: to outputs, or added part by part first."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .epilogue import epilogue
from .tuning import EXACT


@triton.jit
def store_outputs(
    sums,  # [BLOCK_M, BLOCK_N] fp32 or int32
    w_scale_ptr,  # [N] fp32 for int32 sums, else None
    x_scale_ptr,  # [M] fp32 for int32 sums, else None
    bias_ptr,  # [N] fp32, bf16 or fp16; None for no bias
    out_ptr,  # [M, N], contiguous
    offs_m,
    offs_n,
    mask,
    M,
    N,
    ACTIVATION: tl.constexpr,
):
    t = epilogue(
        sums.to(tl.float32), w_scale_ptr, x_scale_ptr, bias_ptr, offs_m, offs_n, M, N, ACTIVATION
    )
    at = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(out_ptr + at, t.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["parts", "M"])
def add_parts_kernel(
    sums_ptr,  # [parts, M, N] fp32 or int32
    w_scale_ptr,
    x_scale_ptr,
    bias_ptr,
    out_ptr,
    parts,
    M,
    N,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles_n = tl.cdiv(N, BLOCK_N)
    offs_m = (tl.program_id(0) // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    at = sums_ptr + offs_m[:, None] * N + offs_n[None, :]
    step = tl.cast(M, tl.int64) * N
    total = tl.zeros([BLOCK_M, BLOCK_N], sums_ptr.dtype.element_ty)
    for _ in range(parts):
        total += tl.load(at, mask=mask, other=0)
        at += step
    store_outputs(
        total, w_scale_ptr, x_scale_ptr, bias_ptr, out_ptr, offs_m, offs_n, mask, M, N, ACTIVATION
    )


def add_parts(
    sums: torch.Tensor,
    w_scale: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    activation: str = "none",
) -> None:
    """``out`` [M, N] = the epilogue of ``sums`` [parts, M, N], added in their order. On the current
    device; all contiguous."""
    parts, M, N = sums.shape
    BLOCK_M, BLOCK_N = (1, 256) if M < 4 else (4, 64)
    grid = (triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N),)
    add_parts_kernel[grid](
        sums, w_scale, x_scale, bias, out, parts, M, N,
        ACTIVATION=activation, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=2, **EXACT,
    )  # fmt: skip
