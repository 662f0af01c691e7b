"""RMSNorm that leaves as int8."""

import torch
from torch import Tensor

from . import library

_OP = "rms_norm_quantize_int8"


def rms_norm_quantize_int8(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """``quantize_int8(rms_norm(x) * weight)``, x read once.

    ``y = (x * (1 / sqrt(mean(x^2) + eps))) * weight`` in float32 (Zhang and Sennrich,
    arXiv:1910.07467), not rounded to x's dtype before it is quantized. The squares are added in one
    fixed order, so every device gives the same bits.

    Args:
        x: float32, bfloat16 or float16 [..., K], any rank >= 1, any strides.
        weight: [K], float32 or of x's dtype.
        eps: added to the mean of the squares.
        out: optional (q, scale) to write to, contiguous, with the shapes and dtypes below.

    Returns:
        q int8 [..., K] and scale float32 [...], as ``quantize_int8``: a row with a NaN or Inf gets
        q = 0 and scale NaN. Where the squares overflow float32 (|x| above 1e19), y is 0, as in torch.

    Raises:
        RuntimeError: wrong dtype, rank or shape, or an input requires grad (rounding has none).
    """
    if torch.is_grad_enabled():
        library.refuse_grad(_OP, x=x, weight=weight)
    if out is not None:
        torch.ops.trimtab.rms_norm_quantize_int8.out(x, weight, eps, q=out[0], scale=out[1])
        return out
    return torch.ops.trimtab.rms_norm_quantize_int8.default(x, weight, eps)


@library.register_fake("trimtab::rms_norm_quantize_int8")
def _(x: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    library.expect_float(_OP, "x", x)
    library.expect(
        x.dim() >= 1, f"{_OP}: expected x of at least one dimension, got {library.describe(x)}"
    )
    library.expect(
        weight.shape == x.shape[-1:] and weight.dtype in (x.dtype, torch.float32),
        f"{_OP}: expected weight [K] of float32 or x's dtype for x {library.describe(x)}, "
        f"got {library.describe(weight)}",
    )
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


@library.register_fake("trimtab::rms_norm_quantize_int8.out")
def _(x: Tensor, weight: Tensor, eps: float, q: Tensor, scale: Tensor) -> None:
    library.expect_float(_OP, "x", x)
