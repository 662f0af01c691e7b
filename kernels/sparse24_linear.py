"""sparse24_linear in Triton: tiles of the 2:4 weight written out, then the dense product.

Triton has no sparse tensor core product, so this saves reading, not multiplying: for devices that
CUDA C++ does not serve. int8 values give int8_linear's bits with the dense weight. Float values
(NUMERICS.md section 7) differ from the contract in one thing: the dense product evaluates 0 * Inf, so
an Inf or NaN in x that meets a pruned weight gives NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import tuning
from .activation import check_activation
from .checks import FLOAT_DTYPES, check_matrix, check_tensor
from .epilogue import epilogue
from .int8_mm import MAX_K, grouped_tile
from .launch import on_device_of
from .quantize_int8 import quantize_int8


@triton.jit
def group_code(metadata_ptr, offs_n, offs_k, blocks, mask, INT8: tl.constexpr):
    """The four bits of each element's group [BLOCK_N, BLOCK_K], as in trimtab/sparse24_linear.h."""
    row16, half, g = offs_n // 16, (offs_n % 16 // 8).to(tl.int32), (offs_n % 8).to(tl.int32)
    block, c = offs_k // 64, offs_k % 64
    if INT8:
        lane = 4 * g[:, None] + 2 * (c // 32)[None, :] + half[:, None]
        bit = (c % 32 // 4 * 4)[None, :] + 0 * half[:, None]
    else:
        lane = 4 * g[:, None] + (c // 16)[None, :]
        bit = (c % 16 // 4 * 4)[None, :] + 16 * half[:, None]
    word = (row16[:, None] * blocks + block[None, :]) * 32 + lane
    return (tl.load(metadata_ptr + word, mask=mask, other=0) >> bit) & 15


@triton.jit
def sparse24_linear_kernel(
    x_ptr,  # [M, K] bf16 or fp16, or int8 for int8 values
    values_ptr,  # [N, K4 / 2] of the same dtype, adjacent in a row
    metadata_ptr,  # [ceil(N / 16), ceil(K / 64), 32] int32
    x_scale_ptr,  # [M] fp32 for int8, else None
    w_scale_ptr,  # [N] fp32 for int8, else None
    bias_ptr,  # [N] fp32, bf16 or fp16; None for no bias
    out_ptr,  # [M, N], contiguous
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_vn,
    ACTIVATION: tl.constexpr,
    INT8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    pid_m, pid_n = grouped_tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = (offs_m < M)[:, None], (offs_n < N)[:, None]
    x_rows = x_ptr + offs_m[:, None] * stride_xm
    value_rows = values_ptr + offs_n[:, None] * stride_vn
    blocks = tl.cdiv(K, 64)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32 if INT8 else tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)  # K and rows of metadata stay below 2^31
        inside = (offs_k < K)[None, :]
        x = tl.load(
            x_rows + offs_k.to(tl.int64)[None, :] * stride_xk, mask=mask_m & inside, other=0
        )
        code = group_code(metadata_ptr, offs_n, offs_k, blocks, mask_n & inside, INT8)
        place = (offs_k % 4)[None, :]
        second = place == code >> 2
        kept = (place == (code & 3)) | second
        at = (offs_k // 4 * 2)[None, :] + second.to(tl.int32)
        w = tl.load(value_rows + at, mask=mask_n & inside & kept, other=0)
        acc = tl.dot(x, tl.trans(w), acc, out_dtype=acc.dtype)
    t = epilogue(
        acc.to(tl.float32), w_scale_ptr, x_scale_ptr, bias_ptr, offs_m, offs_n, M, N, ACTIVATION
    )
    out = out_ptr + offs_m[:, None] * N + offs_n[None, :]
    mask = mask_m & (offs_n < N)[None, :]
    tl.store(out, t.to(out_ptr.dtype.element_ty), mask=mask)


def config_of(M: int) -> tuning.MatmulConfig:
    """Few tokens: narrow tiles, and more of them. Not yet measured."""
    return tuning.MatmulConfig(*((16, 32) if M <= 16 else (64, 64)), 64, 4 if M <= 16 else 8, 3, 8)


def sparse24_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    metadata: torch.Tensor,
    weight_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    *,
    config: tuning.MatmulConfig | None = None,
) -> torch.Tensor:
    """``act(x @ weight.T + bias)`` [M, N] for ``x`` [M, K], the rest as in ops.sparse24_linear."""
    op, int8 = "sparse24_linear", values.dtype == torch.int8
    check_matrix(op, "x", x, FLOAT_DTYPES if int8 else (values.dtype,))
    (M, K), N = x.shape, values.shape[0]
    dtypes = (torch.bfloat16, torch.float16, torch.int8)
    check_tensor(op, "values", values, (N, (K + 3) // 4 * 2), dtypes, x.device)
    shape = ((N + 15) // 16, (K + 63) // 64, 32)
    check_tensor(op, "metadata", metadata, shape, (torch.int32,), x.device)
    check_activation(op, activation)
    if int8 and (weight_scale is None or K > MAX_K):
        raise ValueError(
            f"{op}: expected weight_scale and K <= {MAX_K} with int8 values, got K={K}"
        )
    if bias is not None:
        check_tensor(op, "bias", bias, (N,), FLOAT_DTYPES, x.device)
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if M == 0 or N == 0:
        return out
    q, q_scale = quantize_int8(x) if int8 else (x, None)
    if values.stride(1) != 1:
        values = values.contiguous()
    config = config or config_of(M)
    with on_device_of(x):
        sparse24_linear_kernel[(config.tiles(M, N),)](
            q,
            values,
            metadata.contiguous(),
            q_scale,
            weight_scale.contiguous() if weight_scale is not None else None,
            bias.contiguous() if bias is not None else None,
            out,
            M,
            N,
            K,
            *q.stride(),
            values.stride(0),
            ACTIVATION=activation,
            INT8=int8,
            **config.blocks(),
            **config.options(),
        )
    return out
