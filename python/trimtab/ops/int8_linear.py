"""A whole int8 linear layer in one call."""

from typing import Any

import torch
from torch import Tensor

from . import library
from .flops import register_flop_formula
from .int8_mm import check_fake_out_scale, check_fake_product
from .int8_pack import int8_unpack

_op = torch.ops.trimtab.int8_linear


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    *,
    out: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    """``act(x @ (weight * weight_scale).T + bias)`` with ``x`` quantized to int8 row by row.

    The same bits as quantize_int8 followed by int8_mm, in one call and without the int8 copy of ``x``.

    Args:
        x: float32, bfloat16 or float16 [..., K], any rank >= 1, any strides.
        weight: int8 [N, K], or on a CPU its packed form from int8_pack.
        weight_scale: float32 [N].
        bias: float32, bfloat16 or float16 [N], or None.
        activation: "none", "relu", "gelu", "gelu_tanh" or "silu".
        out_dtype: float32, bfloat16, float16, or int8 with ``out_scale`` (no gradient); None for that
            of ``x``.
        out: optional contiguous [..., N] to write to (no gradient); its dtype wins.
        out_scale: float32 [1] for int8 out, the input of a next int8_mm with that scale in every row,
            as int8_mm defines it; else None.

    Gradients flow to ``x`` (through the dequantized weight; rounding counts as identity) and ``bias``.
    Under autocast ``x`` is cast to the autocast dtype first, as for torch.nn.functional.linear.

    Raises:
        RuntimeError: wrong dtype, shape, scale length, K above 133,144, or a gradient is asked for of a
            scale or through int8 out.
        ValueError: unknown activation.
    """
    code = library.activation_code("int8_linear", activation)
    if torch.is_grad_enabled():
        library.refuse_grad("int8_linear", weight_scale=weight_scale, out_scale=out_scale)
        if out is None and out_dtype == torch.int8:
            library.refuse_grad("int8_linear with int8 out", x=x, bias=bias)
    if out is not None:
        if torch.is_grad_enabled():
            library.refuse_grad("int8_linear with out=", x=x, bias=bias)
        _op.out(x, weight, weight_scale, bias, code, out_scale, out=out)
        return out
    return _op.default(x, weight, weight_scale, bias, code, out_dtype, out_scale)


def _fake_sizes(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> list[int]:
    library.expect_float("int8_linear", "x", x)
    library.expect(
        x.dim() >= 1,
        f"int8_linear: expected x of at least one dimension, got {library.describe(x)}",
    )
    check_fake_product("int8_linear", weight, weight_scale, "weight_scale", bias, x.shape[-1])
    return [*x.shape[:-1], weight_scale.shape[0]]


def _fake(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: int = 0,
    out_dtype: torch.dtype | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    sizes, dtype = _fake_sizes(x, weight, weight_scale, bias), out_dtype or x.dtype
    check_fake_out_scale("int8_linear", x, dtype, out_scale)
    return x.new_empty(sizes, dtype=dtype)


library.register_fake("trimtab::int8_linear")(_fake)
library.register_fake("trimtab::int8_linear.inference")(_fake)


@library.register_fake("trimtab::int8_linear.out")
def _(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: int = 0,
    out_scale: Tensor | None = None,
    *,
    out: Tensor,
) -> None:
    _fake_sizes(x, weight, weight_scale, bias)
    check_fake_out_scale("int8_linear", x, out.dtype, out_scale)


def dequantize(weight: Tensor, weight_scale: Tensor, K: int, dtype: torch.dtype) -> Tensor:
    """The float weight [N, K] that an int8 one (plain or packed) stands for."""
    plain = int8_unpack(weight, weight_scale.shape[0], K) if weight.dim() == 1 else weight
    return (plain.to(torch.float32) * weight_scale[:, None]).to(dtype)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, weight_scale, bias, activation, _, out_scale = inputs
    if out_scale is not None:
        library.refuse_grad("int8_linear with int8 out", x=x, bias=bias)
    ctx.activation = activation
    # With an activation its derivative needs the sum before it, computed again from x.
    ctx.save_for_backward(x if activation else None, weight, weight_scale, bias)
    ctx.x_dtype, ctx.K = x.dtype, x.shape[-1]


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, weight, weight_scale, bias = ctx.saved_tensors
    if ctx.activation:
        before = _op.default(x, weight, weight_scale, bias, 0, torch.float32)
        grad = activation_backward(library.ACTIVATION_NAMES[ctx.activation], before, grad)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad.to(ctx.x_dtype) @ dequantize(weight, weight_scale, ctx.K, ctx.x_dtype)
    if bias is not None and ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(bias.dtype)
    return grad_x, None, None, grad_bias, None, None, None


def activation_backward(activation: str, before: Tensor, grad: Tensor) -> Tensor:
    """grad * act'(before), by torch's own backward ops, in float32."""
    grad = grad.to(torch.float32)
    aten = torch.ops.aten
    if activation == "relu":
        return aten.threshold_backward(grad, before, 0)
    if activation == "silu":
        return aten.silu_backward(grad, before)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return aten.gelu_backward(grad, before, approximate=approximate)


torch.library.register_autograd("trimtab::int8_linear", _backward, setup_context=_setup_context)


library.register_autocast(_op.default)
library.register_autocast(_op.inference)


@register_flop_formula(torch.ops.trimtab.int8_linear)
def _(x_shape: Any, weight_shape: Any, scale_shape: Any, *_: Any, **__: Any) -> int:
    """2 M N K."""
    rows = 1
    for size in x_shape[:-1]:
        rows *= size
    return 2 * rows * x_shape[-1] * scale_shape[0]
