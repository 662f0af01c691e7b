"""int8_mm in Triton: exact scaled product of int8 matrices, epilogue fused (NUMERICS.md section 3).

    t = float(sum_k a[m,k] * b[n,k]);  t = t * b_scale[n];  t = t * a_scale[m];
    t = t + bias[n];  t = act(t);  out[m,n] = round(t)
    int8 out: r = 1 / out_scale;  out[m,n] = clamp(rne(t * r), -127, 127), 0 where t * r is NaN

The sum is exact in int32 up to K = 133144 (127 * 127 * K < 2^31).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import tuning
from .activation import check_activation
from .checks import FLOAT_DTYPES, check_matrix, check_out_scale, check_tensor, out_tensor
from .epilogue import epilogue, int8_code
from .launch import k_alignment, on_device_of

MAX_K = 133144


@triton.jit
def grouped_tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column of this program's tile, going down GROUP_M rows of tiles, then right.

    Programs that run at the same time then cover a block of the output that is about square, and
    share their rows of a and of b in the L2 cache.
    """
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_in_group = GROUP_M * tiles_n
    first_m = pid // tiles_in_group * GROUP_M
    rows = min(tiles_m - first_m, GROUP_M)  # the last group may have fewer
    pid_m = first_m + pid % tiles_in_group % rows
    pid_n = pid % tiles_in_group // rows
    return pid_m, pid_n


@triton.jit
def int8_mm_kernel(
    a_ptr,  # [M, K] int8
    b_ptr,  # [N, K] int8
    a_scale_ptr,  # [M] fp32
    b_scale_ptr,  # [N] fp32
    bias_ptr,  # [N] fp32, bf16 or fp16; None for no bias
    out_ptr,  # [M, N] fp32, bf16, fp16 or int8
    out_scale_ptr,  # [1] fp32 for int8 out, else None
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

    # The exact sum. b is loaded as it lies, [N, K]; the transposition is a view of shared memory,
    # and the one that the tensor cores want: they read 8-bit operands with K adjacent.
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        if ALIGN > 1:
            mask_k = tl.max_constancy(mask_k, ALIGN)
        a = tl.load(a_ptrs, mask=mask_m & mask_k[None, :], other=0)
        b = tl.load(b_ptrs, mask=mask_n & mask_k[None, :], other=0)
        acc = tl.dot(a, tl.trans(b), acc, out_dtype=tl.int32)
        a_ptrs += a_step
        b_ptrs += b_step

    t = epilogue(
        acc.to(tl.float32), b_scale_ptr, a_scale_ptr, bias_ptr, offs_m, offs_n, M, N, ACTIVATION
    )
    if out_scale_ptr is not None:
        t = int8_code(t, out_scale_ptr)
    # Within a tile 32 bits do (the launcher sees to it), and spare a register an element.
    out_ptr += pid_m.to(tl.int64) * BLOCK_M * stride_om + pid_n.to(tl.int64) * BLOCK_N * stride_on
    out_m = tl.arange(0, BLOCK_M)[:, None] * stride_om
    out_n = tl.arange(0, BLOCK_N)[None, :] * stride_on
    mask = mask_m & (offs_n < N)[None, :]
    tl.store(out_ptr + out_m + out_n, t.to(out_ptr.dtype.element_ty), mask=mask)


def int8_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    *,
    out_scale: torch.Tensor | None = None,
    config: tuning.MatmulConfig | None = None,
) -> torch.Tensor:
    """Scaled product of int8 ``a`` [M, K] and int8 ``b`` [N, K], transposed.

    ``a_scale`` [M] and ``b_scale`` [N] are fp32, ``bias`` [N] fp32, bf16 or fp16. ``a``, ``b`` and
    ``out`` may have any strides. Returns [M, N] of ``out_dtype``, or ``out``, whose dtype then
    counts; int8 has ``out_scale`` [1] fp32. ``config`` overrides the tuning table.
    """
    check_matrix("int8_mm", "a", a, (torch.int8,))
    check_matrix("int8_mm", "b", b, (torch.int8,))
    (M, K), N = a.shape, b.shape[0]
    check_tensor("int8_mm", "b", b, (N, K), (torch.int8,), a.device)
    check_tensor("int8_mm", "a_scale", a_scale, (M,), (torch.float32,), a.device)
    check_tensor("int8_mm", "b_scale", b_scale, (N,), (torch.float32,), a.device)
    if bias is not None:
        check_tensor("int8_mm", "bias", bias, (N,), FLOAT_DTYPES, a.device)
        bias = bias.contiguous()
    check_activation("int8_mm", activation)
    if K > MAX_K:
        raise ValueError(f"int8_mm: expected K <= {MAX_K}, so that int32 holds the sum, got {K}")
    out = out_tensor("int8_mm", out, (M, N), out_dtype, a.device, (*FLOAT_DTYPES, torch.int8))
    check_out_scale("int8_mm", out, out_scale)
    if M == 0 or N == 0:
        return out
    align = k_alignment(a, b)
    config = config or tuning.choose("int8_mm", a.device, M, N, K, strided=align == 1)
    with on_device_of(a):
        int8_mm_kernel[(config.tiles(M, N),)](
            a,
            b,
            a_scale.contiguous(),
            b_scale.contiguous(),
            bias,
            out,
            out_scale,
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
