"""silu_mul_quantize_int8 in Triton: quantize_int8(silu(gate) * up), the product in fp32.

A row is read twice and its product computed twice; the second time it comes from the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import tuning
from .activation import activate
from .checks import FLOAT_DTYPES, check_matrix, check_tensor
from .launch import k_alignment, on_device_of
from .quantize_int8 import _abs_bits, _round_to_int8, row_factors


@triton.jit
def _product(gate_ptrs, up_ptrs, mask):
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptrs, mask=mask, other=0.0).to(tl.float32)
    return activate(gate, "silu") * up


@triton.jit
def silu_mul_quantize_int8_kernel(
    gate_ptr,  # [M, K] fp32, bf16 or fp16
    up_ptr,  # [M, K], of the same dtype
    q_ptr,  # [M, K] int8, rows adjacent
    scale_ptr,  # [M] fp32
    M,
    K,
    stride_gm,
    stride_gk,
    stride_um,
    stride_uk,
    ALIGN: tl.constexpr,  # elements of K taken at once, from k_alignment
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Offsets and steps in int64: a view may reach further than 2^31 elements.
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    mask_m = (offs_m < M)[:, None]
    gate_rows = offs_m * stride_gm
    up_rows = offs_m * stride_um
    q_rows = offs_m * K
    if ALIGN > 1:
        gate_rows = tl.multiple_of(gate_rows, ALIGN)
        up_rows = tl.multiple_of(up_rows, ALIGN)
        q_rows = tl.multiple_of(q_rows, ALIGN)
    gate_tile = gate_ptr + gate_rows[:, None] + offs_k[None, :] * stride_gk
    up_tile = up_ptr + up_rows[:, None] + offs_k[None, :] * stride_uk
    gate_step = tl.cast(stride_gk, tl.int64) * BLOCK_K
    up_step = tl.cast(stride_uk, tl.int64) * BLOCK_K

    peak = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.int32)
    gate_ptrs = gate_tile
    up_ptrs = up_tile
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        if ALIGN > 1:
            mask_k = tl.max_constancy(mask_k, ALIGN)
        peak = tl.maximum(peak, _abs_bits(_product(gate_ptrs, up_ptrs, mask_m & mask_k[None, :])))
        gate_ptrs += gate_step
        up_ptrs += up_step
    r, counts, scale = row_factors(tl.max(peak, axis=1))
    tl.store(scale_ptr + offs_m, scale, mask=offs_m < M)

    gate_ptrs = gate_tile
    up_ptrs = up_tile
    q_ptrs = q_ptr + q_rows[:, None] + offs_k[None, :]
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        if ALIGN > 1:
            mask_k = tl.max_constancy(mask_k, ALIGN)
        y = _product(gate_ptrs, up_ptrs, mask_m & mask_k[None, :])
        q = tl.where(counts[:, None], _round_to_int8(y * r[:, None]), 0)
        tl.store(q_ptrs, q.to(tl.int8), mask=mask_m & mask_k[None, :])
        gate_ptrs += gate_step
        up_ptrs += up_step
        q_ptrs += BLOCK_K


def silu_mul_quantize_int8(
    gate: torch.Tensor, up: torch.Tensor, *, config: tuning.QuantizeConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``quantize_int8(silu(gate) * up)`` of float ``gate`` and ``up`` [M, K], of any strides.

    Returns ``q`` [M, K] int8 and ``scale`` [M] float32. ``config`` overrides the tuning table.
    """
    check_matrix("silu_mul_quantize_int8", "gate", gate, FLOAT_DTYPES)
    M, K = gate.shape
    check_tensor("silu_mul_quantize_int8", "up", up, (M, K), (gate.dtype,), gate.device)
    q = torch.empty((M, K), dtype=torch.int8, device=gate.device)
    scale = torch.empty((M,), dtype=torch.float32, device=gate.device)
    if M == 0:
        return q, scale
    config = config or tuning.choose("quantize_int8", gate.device, M, 0, K)
    with on_device_of(gate):
        silu_mul_quantize_int8_kernel[(triton.cdiv(M, config.BLOCK_M),)](
            gate,
            up,
            q,
            scale,
            M,
            K,
            *gate.stride(),
            *up.stride(),
            ALIGN=k_alignment(gate, up, q),
            **config.blocks(),
            **config.options(),
        )
    return q, scale
