"""int8_weight_mm in Triton: float a times an int8 weight, the scale in the epilogue.

    t = sum_k a[m,k] * float(b[n,k]);  t = t * b_scale[n];  t = t + bias[n];  out = round(act(t))

The sum is fp32, in the order of the tensor cores (NUMERICS.md section 7). bf16 and fp16 hold int8,
so no product rounds before it is added.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import tuning
from .activation import check_activation
from .checks import FLOAT_DTYPES, check_matrix, check_tensor, out_tensor
from .epilogue import epilogue
from .int8_mm import grouped_tile
from .launch import k_alignment, on_device_of


@triton.jit
def int8_weight_mm_kernel(
    a_ptr,  # [M, K] fp32, bf16 or fp16
    b_ptr,  # [N, K] int8
    b_scale_ptr,  # [N] fp32
    bias_ptr,  # [N] fp32, bf16 or fp16; None for no bias
    out_ptr,  # [M, N] fp32, bf16 or fp16
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bn,
    stride_bk,
    stride_om,
    stride_on,
    ACTIVATION: tl.constexpr,  # "none", "relu", "gelu", "gelu_tanh", "silu"
    ALIGN: tl.constexpr,  # elements of K read at once, from k_alignment
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # Offsets and steps in int64: a view may reach further than 2^31 elements.
    pid_m, pid_n = grouped_tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    mask_m = (offs_m < M)[:, None]
    mask_n = (offs_n < N)[:, None]
    a_rows = offs_m * stride_am
    b_rows = offs_n * stride_bn
    if ALIGN > 1:
        a_rows = tl.multiple_of(a_rows, ALIGN)
        b_rows = tl.multiple_of(b_rows, ALIGN)
    a_ptrs = a_ptr + a_rows[:, None] + offs_k[None, :] * stride_ak
    b_ptrs = b_ptr + b_rows[:, None] + offs_k[None, :] * stride_bk
    a_step = tl.cast(stride_ak, tl.int64) * BLOCK_K
    b_step = tl.cast(stride_bk, tl.int64) * BLOCK_K

    # The product is taken transposed, b times a^T: the weight is widened in registers, and only the
    # left operand of a tensor core instruction may come from there. So too 64 rows of b, not of a,
    # fill a wgmma, and a few rows of a waste nothing.
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        if ALIGN > 1:
            mask_k = tl.max_constancy(mask_k, ALIGN)
        a = tl.load(a_ptrs, mask=mask_m & mask_k[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=mask_n & mask_k[None, :], other=0)
        # "ieee": fp32 a is multiplied in fp32, not rounded to tf32.
        acc = tl.dot(b.to(a.dtype), tl.trans(a), acc, input_precision="ieee")
        a_ptrs += a_step
        b_ptrs += b_step

    t = epilogue(tl.trans(acc), b_scale_ptr, None, bias_ptr, offs_m, offs_n, M, N, ACTIVATION)
    # Within a tile 32 bits do (the launcher sees to it), and spare a register an element.
    out_ptr += pid_m.to(tl.int64) * BLOCK_M * stride_om + pid_n.to(tl.int64) * BLOCK_N * stride_on
    out_m = tl.arange(0, BLOCK_M)[:, None] * stride_om
    out_n = tl.arange(0, BLOCK_N)[None, :] * stride_on
    mask = mask_m & (offs_n < N)[None, :]
    tl.store(out_ptr + out_m + out_n, t.to(out_ptr.dtype.element_ty), mask=mask)


def int8_weight_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    *,
    config: tuning.MatmulConfig | None = None,
) -> torch.Tensor:
    """Product of float ``a`` [M, K] and int8 ``b`` [N, K], transposed, one scale a row of ``b``.

    ``b_scale`` [N] fp32, ``bias`` [N] fp32, bf16 or fp16. ``a``, ``b`` and ``out`` may have any
    strides. Returns [M, N] of ``out_dtype``, by default a's, or ``out``, whose dtype then counts.
    ``config`` overrides the tuning table.
    """
    check_matrix("int8_weight_mm", "a", a, FLOAT_DTYPES)
    check_matrix("int8_weight_mm", "b", b, (torch.int8,))
    (M, K), N = a.shape, b.shape[0]
    check_tensor("int8_weight_mm", "b", b, (N, K), (torch.int8,), a.device)
    check_tensor("int8_weight_mm", "b_scale", b_scale, (N,), (torch.float32,), a.device)
    if bias is not None:
        check_tensor("int8_weight_mm", "bias", bias, (N,), FLOAT_DTYPES, a.device)
        bias = bias.contiguous()
    check_activation("int8_weight_mm", activation)
    out = out_tensor("int8_weight_mm", out, (M, N), out_dtype or a.dtype, a.device)
    if M == 0 or N == 0:
        return out
    align = k_alignment(a, b)
    table = "int8_weight_mm_fp32" if a.dtype == torch.float32 else "int8_weight_mm"
    config = config or tuning.choose(table, a.device, M, N, K, strided=align == 1)
    with on_device_of(a):
        int8_weight_mm_kernel[(config.tiles(M, N),)](
            a,
            b,
            b_scale.contiguous(),
            bias,
            out,
            M,
            N,
            K,
            *a.stride(),
            *b.stride(),
            *out.stride(),
            ACTIVATION=activation,
            ALIGN=align,
            **config.blocks(),
            **config.options(),
        )
    return out
