"""What follows a product's sum (NUMERICS.md section 3), for every int8 product.

t = t * b_scale[n];  t = t * a_scale[m];  t = t + bias[n];  t = act(t);  out = round(t)
int8 out: r = 1 / out_scale;  out = clamp(rne(t * r), -127, 127), 0 where t * r is NaN
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate
from .quantize_int8 import _round_to_int8


@triton.jit
def epilogue(
    t,  # [BLOCK_M, BLOCK_N] fp32, the sum
    b_scale_ptr,  # [N] fp32; None where the sum has it already
    a_scale_ptr,  # [M] fp32; None for a float a
    bias_ptr,  # [N] fp32, bf16 or fp16; None for no bias
    offs_m,
    offs_n,
    M,
    N,
    ACTIVATION: tl.constexpr,
):
    """One rounding a line: launch with enable_fp_fusion=False, or the bias add becomes an fma."""
    if b_scale_ptr is not None:
        t = t * tl.load(b_scale_ptr + offs_n, mask=offs_n < N, other=0.0)[None, :]
    if a_scale_ptr is not None:
        t = t * tl.load(a_scale_ptr + offs_m, mask=offs_m < M, other=0.0)[:, None]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
        t = t + bias.to(tl.float32)[None, :]
    return activate(t, ACTIVATION)


@triton.jit
def int8_code(
    t,  # fp32, after the activation
    out_scale_ptr,  # [1] fp32
):
    # Clamped first: rne leaves +-127 where they are.
    code = t * tl.div_rn(1.0, tl.load(out_scale_ptr))
    clamped = tl.minimum(tl.maximum(code, -127.0), 127.0)
    return _round_to_int8(tl.where(code == code, clamped, 0.0))
