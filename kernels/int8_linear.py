"""int8_linear in Triton: quantize_int8 of x, then int8_mm with its epilogue. Two launches.

The quantized rows may be wider than x, with zeros past K. So a layer can keep its weight padded to
[N, K rounded up to 16], with anything in the padding, and any K is read 16 bytes at a time.
"""

from __future__ import annotations

import torch

from . import tuning
from .checks import FLOAT_DTYPES, check_matrix, describe
from .int8_mm import int8_mm
from .quantize_int8 import quantize_int8


def int8_linear(
    x: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    *,
    out_scale: torch.Tensor | None = None,
    config: tuning.MatmulConfig | None = None,
) -> torch.Tensor:
    """``act(x @ (w * w_scale).T + bias)`` with ``x`` [..., K] quantized to int8 row by row.

    ``w`` is int8 [N, K], or [N, K_w] with K_w > K, whose columns from K on meet zeros. ``w_scale``
    [N] fp32, ``bias`` [N] fp32, bf16 or fp16. Returns [..., N] of ``out_dtype``, by default x's;
    int8 has ``out_scale`` [1] fp32. ``config`` overrides the product's row of the tuning table.
    """
    check_matrix("int8_linear", "w", w, (torch.int8,))
    N, K_w = w.shape
    if x.dim() == 0 or x.dtype not in FLOAT_DTYPES or x.shape[-1] > K_w:
        raise ValueError(
            f"int8_linear: expected x fp32, bf16 or fp16 [..., K] with K <= {K_w}, w's, "
            f"got {describe(x)}"
        )
    rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.reshape(x.shape[:-1].numel(), 0)
    # Rows of 16 bytes times something, of which the product sees w's K_w columns.
    q = torch.empty((rows.shape[0], -(-K_w // 16) * 16), dtype=torch.int8, device=x.device)
    q, q_scale = quantize_int8(rows, q[:, :K_w])
    out_dtype = out_dtype or x.dtype
    tail = (bias, activation, out_dtype)
    out = int8_mm(q, w, q_scale, w_scale, *tail, out_scale=out_scale, config=config)
    return out.reshape(*x.shape[:-1], N)
