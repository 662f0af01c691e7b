"""quantize_int8 in Triton: symmetric int8 with one fp32 scale a row (NUMERICS.md section 2).

scale[m] = absmax / 127,  r = 127 / absmax,  q[m,k] = clamp(rne(x[m,k] * r), -127, 127)
with absmax = max_k |x[m,k]|. A row is read twice; the second time it comes from the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import tuning
from .checks import FLOAT_DTYPES, check_matrix, check_tensor
from .launch import k_alignment, on_device_of

# 1.5 * 2^23. Floats of that size are 1 apart, so adding it rounds |v| <= 2^22 to the nearest
# integer, ties to even, and leaves that integer in the low bits of the sum.
ROUNDER = tl.constexpr(12582912.0)
INF_BITS = tl.constexpr(0x7F800000)


@triton.jit
def _abs_bits(x):
    """Bits of |x| as fp32. They order as the values do, with every NaN above Inf."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _round_to_int8(v):
    """rne(v) for |v| < 127.5. The two roundings behind x * r err by less than 2^-22 of 127, so the
    clamp to +-127 never acts and is left out."""
    # The low byte of the sum is the integer in two's complement: ROUNDER's own low byte is zero.
    return (v + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def row_factors(absmax_bits):
    """The factor of a row's codes, whether it has any but 0, and its scale."""
    absmax = absmax_bits.to(tl.float32, bitcast=True)
    # div_rn, because Triton's "/" is the approximate div.full.f32 on NVIDIA.
    r = tl.div_rn(127.0, absmax)
    finite = absmax_bits < INF_BITS
    counts = finite & (r < float("inf"))  # not so small that it has no reciprocal
    scale = tl.where(counts, tl.div_rn(absmax, 127.0), tl.where(finite, 0.0, float("nan")))
    return r, counts, scale


@triton.jit
def quantize_int8_kernel(
    x_ptr,  # [M, K] fp32, bf16 or fp16
    q_ptr,  # [M, K_Q] int8, K_Q >= K
    scale_ptr,  # [M] fp32
    M,
    K,
    K_Q,
    stride_xm,
    stride_xk,
    stride_qm,
    stride_qk,
    stride_sm,
    ALIGN: tl.constexpr,  # elements of K taken at once, from k_alignment
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Offsets and steps in int64: a view may reach further than 2^31 elements.
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    mask_m = offs_m < M
    x_step = tl.cast(stride_xk, tl.int64) * BLOCK_K
    q_step = tl.cast(stride_qk, tl.int64) * BLOCK_K
    x_rows = offs_m * stride_xm
    q_rows = offs_m * stride_qm
    if ALIGN > 1:
        x_rows = tl.multiple_of(x_rows, ALIGN)
        q_rows = tl.multiple_of(q_rows, ALIGN)
    x_tile = x_ptr + x_rows[:, None] + offs_k[None, :] * stride_xk

    # Pass 1: absmax. The maximum of the bits is the maximum of the values, and keeps NaN and Inf.
    peak = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.int32)
    x_ptrs = x_tile
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        if ALIGN > 1:
            mask_k = tl.max_constancy(mask_k, ALIGN)
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        peak = tl.maximum(peak, _abs_bits(x))
        x_ptrs += x_step
    r, counts, scale = row_factors(tl.max(peak, axis=1))
    tl.store(scale_ptr + offs_m * stride_sm, scale, mask=mask_m)

    # Pass 2: quantize. Past K there are zeros, as masked loads give and quantize to.
    x_ptrs = x_tile
    q_ptrs = q_ptr + q_rows[:, None] + offs_k[None, :] * stride_qk
    for k in range(0, K_Q, BLOCK_K):
        mask_k = offs_k < K - k
        mask_q = offs_k < K_Q - k
        if ALIGN > 1:
            mask_k = tl.max_constancy(mask_k, ALIGN)
            mask_q = tl.max_constancy(mask_q, ALIGN)
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0).to(tl.float32)
        q = tl.where(counts[:, None], _round_to_int8(x * r[:, None]), 0)
        tl.store(q_ptrs, q.to(tl.int8), mask=mask_m[:, None] & mask_q[None, :])
        x_ptrs += x_step
        q_ptrs += q_step


def quantize_int8(
    x: torch.Tensor,
    q: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    *,
    config: tuning.QuantizeConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize float ``x`` [M, K], of any strides, to int8 with one scale a row.

    Returns ``q`` [M, K] int8 and ``scale`` [M] float32: the tensors given, or new ones. A given
    ``q`` may be wider than x: its further columns are filled with zeros, which add nothing to a
    product. ``config`` overrides the tuning table.
    """
    check_matrix("quantize_int8", "x", x, FLOAT_DTYPES)
    M, K = x.shape
    if q is None:
        q = torch.empty((M, K), dtype=torch.int8, device=x.device)
    else:
        check_matrix("quantize_int8", "q", q, (torch.int8,))
        width = max(K, q.shape[1])
        check_tensor("quantize_int8", "q", q, (M, width), (torch.int8,), x.device)
    if scale is None:
        scale = torch.empty((M,), dtype=torch.float32, device=x.device)
    else:
        check_tensor("quantize_int8", "scale", scale, (M,), (torch.float32,), x.device)
    if M == 0:
        return q, scale
    config = config or tuning.choose("quantize_int8", x.device, M, 0, K)
    with on_device_of(x):
        quantize_int8_kernel[(triton.cdiv(M, config.BLOCK_M),)](
            x,
            q,
            scale,
            M,
            K,
            q.shape[1],
            *x.stride(),
            *q.stride(),
            scale.stride(0),
            ALIGN=k_alignment(x, q),
            **config.blocks(),
            **config.options(),
        )
    return q, scale
