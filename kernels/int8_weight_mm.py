"""int8_weight_mm in Triton: float a times an int8 weight with a scale a row, or a row and group of K.

    t = sum_g b_scale[g,n] * sum_{k in g} a[m,k] * float(b[n,k] - zero[g,n])
    t = t + bias[n];  out = round(act(t))

With one group its scale is the epilogue's. The sum is fp32, in the order of the tensor cores
(NUMERICS.md section 7). bf16 and fp16 hold every integer up to 256, and so b - zero: no product rounds
before it is added.
"""

from __future__ import annotations

import math

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
    b_scale_ptr,  # [groups, N] fp32
    zero_ptr,  # [groups, N] int8; None for 0
    bias_ptr,  # [N] fp32, bf16 or fp16; None for no bias
    out_ptr,  # [M, N] fp32, bf16 or fp16
    M,
    N,
    K,
    group_size,  # columns of K that share a scale; K where it is one for all
    stride_am,
    stride_ak,
    stride_bn,
    stride_bk,
    stride_om,
    stride_on,
    ACTIVATION: tl.constexpr,  # "none", "relu", "gelu", "gelu_tanh", "silu"
    GROUPED: tl.constexpr,  # whether there are several groups
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
    # One loop over all groups, each rounded up to whole steps, so that it is pipelined across them.
    steps = tl.cdiv(group_size, BLOCK_K)
    end = steps * tl.cdiv(K, group_size) * BLOCK_K if GROUPED else K
    for at in range(0, end, BLOCK_K):
        group = 0
        left = K - at
        a_here, b_here = a_ptrs, b_ptrs
        if GROUPED:
            step = at // BLOCK_K
            group = step // steps
            k = group * group_size + step % steps * BLOCK_K  # seen to be aligned
            left = tl.minimum(K, (group + 1) * group_size) - k
            a_here += k * tl.cast(stride_ak, tl.int64)
            b_here += k * tl.cast(stride_bk, tl.int64)
        mask_k = offs_k < left
        if ALIGN > 1:
            mask_k = tl.max_constancy(mask_k, ALIGN)
        a = tl.load(a_here, mask=mask_m & mask_k[None, :], other=0.0)
        b = tl.load(b_here, mask=mask_n & mask_k[None, :], other=0)
        if not GROUPED:
            a_ptrs += a_step
            b_ptrs += b_step
        factors = tl.cast(group, tl.int64) * N + offs_n
        if zero_ptr is not None:
            zero = tl.load(zero_ptr + factors, mask=offs_n < N, other=0)
            b = b.to(tl.int16) - zero.to(tl.int16)[:, None]
        # "ieee": fp32 a is multiplied in fp32, not rounded to tf32.
        if GROUPED:
            part = tl.dot(b.to(a.dtype), tl.trans(a), input_precision="ieee")
            acc += part * tl.load(b_scale_ptr + factors, mask=offs_n < N, other=0.0)[:, None]
        else:
            acc = tl.dot(b.to(a.dtype), tl.trans(a), acc, input_precision="ieee")

    scale_ptr = None if GROUPED else b_scale_ptr
    t = epilogue(tl.trans(acc), scale_ptr, None, bias_ptr, offs_m, offs_n, M, N, ACTIVATION)
    # Within a tile 32 bits do (the launcher sees to it), and spare a register an element.
    out_ptr += pid_m.to(tl.int64) * BLOCK_M * stride_om + pid_n.to(tl.int64) * BLOCK_N * stride_on
    out_m = tl.arange(0, BLOCK_M)[:, None] * stride_om
    out_n = tl.arange(0, BLOCK_N)[None, :] * stride_on
    mask = mask_m & (offs_n < N)[None, :]
    tl.store(out_ptr + out_m + out_n, t.to(out_ptr.dtype.element_ty), mask=mask)


def fit_group(config: tuning.MatmulConfig, group_size: int) -> tuning.MatmulConfig:
    """The config with steps of K no longer than a group, 32 at least: the rest of one is masked."""
    block_k = config.BLOCK_K
    while block_k > max(group_size, 32):
        block_k //= 2
    return config._replace(BLOCK_K=block_k)


def int8_weight_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    *,
    zero_point: torch.Tensor | None = None,
    group_size: int | None = None,
    config: tuning.MatmulConfig | None = None,
) -> torch.Tensor:
    """Product of float ``a`` [M, K] and ``(b - zero_point) * b_scale``, ``b`` int8 [N, K], transposed.

    ``b_scale`` fp32 and ``zero_point`` int8 [N], or [groups, N] with a scale for every ``group_size``
    columns; ``bias`` [N] fp32, bf16 or fp16. ``a``, ``b`` and ``out`` may have any strides. Returns
    [M, N] of ``out_dtype``, by default a's, or ``out``, whose dtype then counts. ``config`` overrides
    the tuning table.
    """
    check_matrix("int8_weight_mm", "a", a, FLOAT_DTYPES)
    check_matrix("int8_weight_mm", "b", b, (torch.int8,))
    (M, K), N = a.shape, b.shape[0]
    check_tensor("int8_weight_mm", "b", b, (N, K), (torch.int8,), a.device)
    group_size = min(group_size or K, K) or 1
    groups = max(-(-K // group_size), 1)
    shape = (groups, N) if b_scale.dim() == 2 or groups > 1 else (N,)
    check_tensor("int8_weight_mm", "b_scale", b_scale, shape, (torch.float32,), a.device)
    if zero_point is not None:
        check_tensor("int8_weight_mm", "zero_point", zero_point, shape, (torch.int8,), a.device)
        zero_point = zero_point.contiguous()
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
    if groups > 1:
        common = math.gcd(align, group_size)  # a group's edge is where its mask changes
        align = common if common >= 4 else 1
        config = fit_group(config, group_size)
    with on_device_of(a):
        int8_weight_mm_kernel[(config.tiles(M, N),)](
            a,
            b,
            b_scale.contiguous(),
            zero_point,
            bias,
            out,
            M,
            N,
            K,
            group_size,
            *a.stride(),
            *b.stride(),
            *out.stride(),
            ACTIVATION=activation,
            GROUPED=groups > 1,
            ALIGN=align,
            **config.blocks(),
            **config.options(),
        )
    return out
