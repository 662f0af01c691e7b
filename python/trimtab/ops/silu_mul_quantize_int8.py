"""A gated activation that leaves as int8."""

import torch
from torch import Tensor

from . import library

_OP = "silu_mul_quantize_int8"


def silu_mul_quantize_int8(
    gate: Tensor, up: Tensor, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """``quantize_int8(silu(gate) * up)``, each input read once.

    What stands between the two halves of a gated MLP: the result goes into ``int8_mm``. Unlike the two
    steps apart, the product is not rounded to the input's dtype before it is quantized.

    Args:
        gate: float32, bfloat16 or float16 [..., K], any rank >= 1, any strides.
        up: of the same shape and dtype.
        out: optional (q, scale) to write to, contiguous, with the shapes and dtypes below.

    Returns:
        q int8 [..., K] and scale float32 [...], as ``quantize_int8``: a row in which the product is NaN
        or Inf somewhere gets q = 0 and scale NaN.

    Raises:
        RuntimeError: wrong dtype, rank or shape, or an input requires grad (rounding has none).
    """
    if torch.is_grad_enabled():
        library.refuse_grad(_OP, gate=gate, up=up)
    if out is not None:
        torch.ops.trimtab.silu_mul_quantize_int8.out(gate, up, q=out[0], scale=out[1])
        return out
    return torch.ops.trimtab.silu_mul_quantize_int8.default(gate, up)


@library.register_fake("trimtab::silu_mul_quantize_int8")
def _(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    library.expect_float(_OP, "gate", gate)
    library.expect(
        gate.dim() >= 1,
        f"{_OP}: expected gate of at least one dimension, got {library.describe(gate)}",
    )
    library.expect(
        up.shape == gate.shape and up.dtype == gate.dtype,
        f"{_OP}: expected up like gate, {library.describe(gate)}, got {library.describe(up)}",
    )
    scale = gate.new_empty(gate.shape[:-1], dtype=torch.float32)
    return gate.new_empty(gate.shape, dtype=torch.int8), scale


@library.register_fake("trimtab::silu_mul_quantize_int8.out")
def _(gate: Tensor, up: Tensor, q: Tensor, scale: Tensor) -> None:
    library.expect_float(_OP, "gate", gate)
