"""quantize_affine in Triton: b bits with a zero point, one pair a group (NUMERICS.md section 2).

lo = min(0, min x),  hi = max(0, max x),  levels = 2^b - 1
scale = (hi - lo) / levels,  inverse = levels / (hi - lo),  zero = rne(-lo * inverse)
q = min(rne(x * inverse) + zero, levels)

A program takes BLOCK_M groups, whatever rows they lie in. A group is read twice; the second time it
comes from the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import tuning
from .checks import FLOAT_DTYPES, check_matrix
from .launch import on_device_of
from .quantize_int8 import INF_BITS, ROUNDER


@triton.jit
def _rint(v):
    """rne(v) for |v| <= 2^22, as a float."""
    return (v + ROUNDER) - ROUNDER


@triton.jit
def quantize_affine_kernel(
    x_ptr,  # [M, K] fp32, bf16 or fp16
    q_ptr,  # [M, K] uint8, contiguous
    scale_ptr,  # [M, groups] fp32
    zero_ptr,  # [M, groups] uint8
    count,  # M * groups
    K,
    groups,  # of a row
    group,  # elements of a group; the last of a row may be shorter
    stride_xm,
    stride_xk,
    LEVELS: tl.constexpr,  # 2^b - 1
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Offsets in int64: a view may reach further than 2^31 elements.
    unit = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row, first = unit // groups, unit % groups * group
    n = tl.where(unit < count, tl.minimum(K - first, group), 0)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    x_tile = x_ptr + (row * stride_xm + first * stride_xk)[:, None]

    # Pass 1: the range, which takes in 0 as masked loads do; and the largest bits, where NaN shows.
    low = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    high = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    peak = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.int32)
    for k in range(0, group, BLOCK_K):
        at = offs_k[None, :] + k
        x = tl.load(x_tile + at * stride_xk, mask=at < n[:, None], other=0.0).to(tl.float32)
        low = tl.minimum(low, x)
        high = tl.maximum(high, x)
        peak = tl.maximum(peak, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    finite = tl.max(peak, axis=1) < INF_BITS
    lo = tl.where(finite, tl.min(low, axis=1), 0.0)
    hi = tl.where(finite, tl.max(high, axis=1), 0.0)

    # Half the range where the whole overflows; it stands for span / part.
    span = hi - lo
    overflows = span == float("inf")
    span = tl.where(overflows, hi * 0.5 - lo * 0.5, span)
    part = tl.where(overflows, 0.5, 1.0)
    # div_rn, because Triton's "/" is the approximate div.full.f32 on NVIDIA.
    inverse = tl.div_rn(LEVELS, span) * part
    counts = finite & (span > 0.0) & (inverse < float("inf"))
    inverse = tl.where(counts, inverse, 0.0)
    scale = tl.div_rn(tl.div_rn(span, LEVELS), part)
    scale = tl.where(counts, scale, tl.where(finite, 0.0, float("nan")))
    zero = tl.where(counts, _rint(-lo * inverse), 0.0)
    tl.store(scale_ptr + unit, scale, mask=unit < count)
    tl.store(zero_ptr + unit, zero.to(tl.uint8), mask=unit < count)

    # Pass 2: quantize.
    q_tile = q_ptr + (row * K + first)[:, None]
    for k in range(0, group, BLOCK_K):
        at = offs_k[None, :] + k
        x = tl.load(x_tile + at * stride_xk, mask=at < n[:, None], other=0.0).to(tl.float32)
        q = tl.minimum(_rint(x * inverse[:, None]) + zero[:, None], LEVELS)
        q = tl.where(counts[:, None], q, 0.0)
        tl.store(q_tile + at, q.to(tl.uint8), mask=at < n[:, None])


def quantize_affine(
    x: torch.Tensor,
    bits: int = 8,
    group_size: int | None = None,
    *,
    config: tuning.QuantizeConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize float ``x`` [M, K], of any strides, to ``bits`` bits with a zero point.

    Returns ``q`` [M, K] uint8, ``scale`` [M, groups] float32 and ``zero_point`` [M, groups] uint8.
    ``group_size`` None: a row is one group. ``config`` overrides the tuning table.
    """
    check_matrix("quantize_affine", "x", x, FLOAT_DTYPES)
    if not 2 <= bits <= 8:
        raise ValueError(f"quantize_affine: expected bits in 2..8, got {bits}")
    if group_size is not None and group_size < 1:
        raise ValueError(f"quantize_affine: expected group_size >= 1 or None, got {group_size}")
    M, K = x.shape
    group = max(1, K if group_size is None else min(group_size, K))
    groups = max(1, -(-K // group))
    q = torch.empty((M, K), dtype=torch.uint8, device=x.device)
    scale = torch.empty((M, groups), dtype=torch.float32, device=x.device)
    zero_point = torch.empty((M, groups), dtype=torch.uint8, device=x.device)
    if M == 0:
        return q, scale, zero_point
    # The same work as quantize_int8's, with a group for a row.
    config = config or tuning.choose("quantize_int8", x.device, M * groups, 0, group)
    with on_device_of(x):
        quantize_affine_kernel[(triton.cdiv(M * groups, config.BLOCK_M),)](
            x,
            q,
            scale,
            zero_point,
            M * groups,
            K,
            groups,
            group,
            *x.stride(),
            LEVELS=float(2**bits - 1),
            **config.blocks(),
            **config.options(),
        )
    return q, scale, zero_point
