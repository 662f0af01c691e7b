"""Exact scaled product of int8 matrices."""

from typing import Any

import torch
from torch import Tensor

from . import library
from .flops import register_flop_formula
from .int8_pack import packed_size


def int8_mm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    out: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    """Scaled product of int8 ``a`` [M, K] and int8 ``b`` [N, K], transposed.

    ``out = act(float(sum_k a b) * b_scale * a_scale + bias)``: the sum is exact in int32, each float
    step rounds once, the result rounds once to ``out_dtype``. The same bits on every device.

    int8 out is the input of a next product whose activation scale is known beforehand:
    ``clamp(rne(t * (1 / out_scale)), -127, 127)`` of the float result t, and 0 where that is NaN. That
    product takes ``a_scale=out_scale.expand(M).contiguous()``.

    Args:
        a: int8 [M, K], any strides.
        b: int8 [N, K], or on a CPU its packed form from int8_pack (faster: packed once, not per call).
        a_scale: float32 [M].
        b_scale: float32 [N].
        bias: float32, bfloat16 or float16 [N], or None.
        activation: "none", "relu", "gelu", "gelu_tanh" or "silu".
        out_dtype: float32, bfloat16, float16, or int8 with ``out_scale``.
        out: optional contiguous [M, N] to write to; its dtype wins over ``out_dtype``.
        out_scale: float32 [1] for int8 out, meant to be finite and above 0 (not checked); else None.

    Raises:
        RuntimeError: wrong dtype, shape, scale length or K above 133,144.
        ValueError: unknown activation.
    """
    code = library.activation_code("int8_mm", activation)
    if torch.is_grad_enabled():
        scales = {"a_scale": a_scale, "b_scale": b_scale, "out_scale": out_scale}
        library.refuse_grad("int8_mm", **scales, bias=bias)
    op = torch.ops.trimtab.int8_mm
    if out is not None:
        op.out(a, b, a_scale, b_scale, bias, code, out_scale, out=out)
        return out
    return op.default(a, b, a_scale, b_scale, bias, code, out_dtype, out_scale)


def check_fake_product(
    op: str, weight: Tensor, scale: Tensor, scale_name: str, bias: Tensor | None, K: int
) -> None:
    """What PackedWeight and EpilogueArgs of csrc/torch check, for fakes."""
    library.expect(
        scale.dtype == torch.float32 and scale.dim() == 1,
        f"{op}: expected {scale_name} of 1-D float32, got {library.describe(scale)}",
    )
    N = scale.shape[0]
    if bias is not None:
        library.expect_float(op, "bias", bias)
        library.expect(
            tuple(bias.shape) == (N,),
            f"{op}: expected a contiguous bias [N={N}], got {library.describe(bias)}",
        )
    shape = (packed_size(N, K),) if weight.dim() == 1 else (N, K)
    library.expect(
        weight.dtype == torch.int8 and tuple(weight.shape) == shape,
        f"{op}: expected weight [N={N}, K={K}] int8 or its packed form, got "
        f"{library.describe(weight)}",
    )
    library.expect(
        K <= library.MAX_K,
        f"{op}: expected K <= {library.MAX_K}, where the int32 sum is exact, got K={K}",
    )


def check_fake_out_scale(
    op: str, like: Tensor, out_dtype: torch.dtype, out_scale: Tensor | None
) -> None:
    """What EpilogueArgs::take_out_scale of csrc/torch checks, for fakes."""
    name, int8 = str(out_dtype).removeprefix("torch."), out_dtype == torch.int8
    library.expect(
        int8 or out_dtype in library.FLOAT_DTYPES,
        f"{op}: expected out of float32, bfloat16 or float16, or of int8 with out_scale, got {name}",
    )
    if out_scale is None:
        library.expect(not int8, f"{op}: expected out_scale [1] float32 for int8 out, got None")
        return
    library.expect(int8, f"{op}: expected out_scale with int8 out alone, got one with {name}")
    library.expect(
        out_scale.dtype == torch.float32 and tuple(out_scale.shape) == (1,),
        f"{op}: expected out_scale [1] float32, got {library.describe(out_scale)}",
    )
    library.expect(
        out_scale.device == like.device,
        f"{op}: expected out_scale on {like.device}, like the others, got it on {out_scale.device}",
    )


@library.register_fake("trimtab::int8_mm")
def _(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    activation: int = 0,
    out_dtype: torch.dtype | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    library.expect(
        a.dtype == torch.int8 and a.dim() == 2,
        f"int8_mm: expected a of 2-D int8, got {library.describe(a)}",
    )
    check_fake_product("int8_mm", b, b_scale, "b_scale", bias, a.shape[1])
    dtype = out_dtype or torch.bfloat16
    check_fake_out_scale("int8_mm", a, dtype, out_scale)
    return a.new_empty(a.shape[0], b_scale.shape[0], dtype=dtype)


@library.register_fake("trimtab::int8_mm.out")
def _(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    activation: int = 0,
    out_scale: Tensor | None = None,
    *,
    out: Tensor,
) -> None:
    check_fake_product("int8_mm", b, b_scale, "b_scale", bias, a.shape[1])
    check_fake_out_scale("int8_mm", a, out.dtype, out_scale)


@register_flop_formula(torch.ops.trimtab.int8_mm)
def _(
    a_shape: Any, b_shape: Any, a_scale_shape: Any, b_scale_shape: Any, *_: Any, **__: Any
) -> int:
    """2 M N K."""
    return 2 * a_shape[0] * a_shape[1] * b_scale_shape[0]
