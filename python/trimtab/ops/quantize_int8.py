"""Symmetric int8 quantization, one scale a row."""

import torch
from torch import Tensor

from . import library


def quantize_int8(x: Tensor, *, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Quantizes each row of ``x`` [..., K] to int8 with its own scale.

    ``scale = absmax / 127``, ``q = clamp(round_half_even(x * (127 / absmax)), -127, 127)``. A row of
    zeros gets scale 0; a row with a NaN or Inf gets q = 0 and scale NaN, so that it is seen downstream.

    Args:
        x: float32, bfloat16 or float16, any rank >= 1, any strides.
        out: optional (q, scale) to write to, contiguous, with the shapes and dtypes below.

    Returns:
        q int8 [..., K] and scale float32 [...].

    Raises:
        RuntimeError: wrong dtype or rank, or ``x`` requires grad (rounding has none).
    """
    if torch.is_grad_enabled():
        library.refuse_grad("quantize_int8", x=x)
    if out is not None:
        torch.ops.trimtab.quantize_int8.out(x, q=out[0], scale=out[1])
        return out
    return torch.ops.trimtab.quantize_int8.default(x)


@library.register_fake("trimtab::quantize_int8")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    library.expect_float("quantize_int8", "x", x)
    library.expect(
        x.dim() >= 1,
        f"quantize_int8: expected x of at least one dimension, got {library.describe(x)}",
    )
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


@library.register_fake("trimtab::quantize_int8.out")
def _(x: Tensor, q: Tensor, scale: Tensor) -> None:
    library.expect_float("quantize_int8", "x", x)
