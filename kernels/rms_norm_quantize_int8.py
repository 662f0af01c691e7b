"""rms_norm_quantize_int8 in Triton: csrc/math/rms_norm.h, line for line, the same bits.

    r = 1 / sqrt(mean_k x[m,k]^2 + eps);  y[m,k] = (x[m,k] * r) * weight[k];  quantize_int8(y)

A program takes a row, 2048 elements a step: as many as there are partial sums, so that a step adds one
square to each. The row is read three times; after the first it comes from the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import tuning
from .checks import FLOAT_DTYPES, check_matrix, check_tensor
from .launch import k_alignment, on_device_of
from .quantize_int8 import _abs_bits, _round_to_int8, row_factors

CHUNK = tl.constexpr(8)
CHUNKS = tl.constexpr(256)
PARTIALS = tl.constexpr(2048)
NUM_WARPS = 8  # 8 elements a thread: a chunk


@triton.jit
def _add_neighbours(p, COUNT: tl.constexpr):
    """[COUNT] -> [COUNT / 2]: p[2 i] + p[2 i + 1]"""
    low, high = tl.split(tl.reshape(p, [COUNT // 2, 2]))
    return low + high


@triton.jit
def _add_halves(p, COUNT: tl.constexpr):
    """[COUNT] -> [COUNT / 2]: p[i] + p[i + COUNT / 2]"""
    low, high = tl.split(tl.trans(tl.reshape(p, [2, COUNT // 2])))
    return low + high


@triton.jit
def _sum(partial):
    """The 2048 partial sums, a scalar. tl.sum would add in an order of its own."""
    p = _add_neighbours(partial, 2048)
    p = _add_neighbours(p, 1024)
    p = _add_neighbours(p, 512)
    p = _add_halves(p, 256)
    p = _add_halves(p, 128)
    p = _add_halves(p, 64)
    p = _add_halves(p, 32)
    p = _add_halves(p, 16)
    p = _add_halves(p, 8)
    p = _add_halves(p, 4)
    low, high = tl.split(p)
    return low + high


@triton.jit
def rms_norm_quantize_int8_kernel(
    x_ptr,  # [M, K] fp32, bf16 or fp16
    weight_ptr,  # [K] fp32 or x's dtype
    q_ptr,  # [M, K] int8, rows adjacent
    scale_ptr,  # [M] fp32
    K,
    eps,
    stride_xm,
    stride_xk,
    ALIGN: tl.constexpr,  # elements of K taken at once, from k_alignment
):
    m = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, PARTIALS).to(tl.int64)
    x_row = m * stride_xm
    q_row = m * K
    if ALIGN > 1:
        x_row = tl.multiple_of(x_row, ALIGN)
        q_row = tl.multiple_of(q_row, ALIGN)
    x_tile = x_ptr + x_row + offs_k * stride_xk
    x_step = tl.cast(stride_xk, tl.int64) * PARTIALS

    partial = tl.zeros([PARTIALS], dtype=tl.float32)
    x_ptrs = x_tile
    for k in range(0, K, PARTIALS):
        mask = offs_k < K - k
        if ALIGN > 1:
            mask = tl.max_constancy(mask, ALIGN)
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        partial = partial + x * x
        x_ptrs += x_step
    mean = tl.div_rn(_sum(partial), K.to(tl.float32))
    r_norm = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))

    peak = tl.zeros([PARTIALS], dtype=tl.int32)
    x_ptrs = x_tile
    weight_ptrs = weight_ptr + offs_k
    for k in range(0, K, PARTIALS):
        mask = offs_k < K - k
        if ALIGN > 1:
            mask = tl.max_constancy(mask, ALIGN)
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptrs, mask=mask, other=0.0).to(tl.float32)
        y = tl.where(mask, x * r_norm * weight, 0.0)  # r_norm may be NaN: 0 * NaN past the end
        peak = tl.maximum(peak, _abs_bits(y))
        x_ptrs += x_step
        weight_ptrs += PARTIALS
    r, counts, scale = row_factors(tl.max(peak, axis=0))
    tl.store(scale_ptr + m, scale)

    x_ptrs = x_tile
    weight_ptrs = weight_ptr + offs_k
    q_ptrs = q_ptr + q_row + offs_k
    for k in range(0, K, PARTIALS):
        mask = offs_k < K - k
        if ALIGN > 1:
            mask = tl.max_constancy(mask, ALIGN)
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptrs, mask=mask, other=0.0).to(tl.float32)
        q = tl.where(counts, _round_to_int8(x * r_norm * weight * r), 0)
        tl.store(q_ptrs, q.to(tl.int8), mask=mask)
        x_ptrs += x_step
        weight_ptrs += PARTIALS
        q_ptrs += PARTIALS


def rms_norm_quantize_int8(
    x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """``quantize_int8(rms_norm(x) * weight)`` of float ``x`` [M, K], of any strides, ``weight`` [K].

    Returns ``q`` [M, K] int8 and ``scale`` [M] float32.
    """
    check_matrix("rms_norm_quantize_int8", "x", x, FLOAT_DTYPES)
    M, K = x.shape
    dtypes = (x.dtype, torch.float32)
    check_tensor("rms_norm_quantize_int8", "weight", weight, (K,), dtypes, x.device)
    weight = weight.contiguous()
    q = torch.empty((M, K), dtype=torch.int8, device=x.device)
    scale = torch.empty((M,), dtype=torch.float32, device=x.device)
    if M == 0:
        return q, scale
    with on_device_of(x):
        rms_norm_quantize_int8_kernel[(M,)](
            x,
            weight,
            q,
            scale,
            K,
            eps,
            *x.stride(),
            ALIGN=k_alignment(x, weight[None], q),
            num_warps=NUM_WARPS,
            **tuning.EXACT,
        )
    return q, scale
