"""Float activations times an int8 weight: nothing of ``x`` is quantized."""

from typing import Any

import torch
from torch import Tensor

from . import library
from .flops import register_flop_formula
from .int8_linear import activation_backward
from .int8_pack import int8_unpack, packed_size
from .quantize_affine import group_count

_op = torch.ops.trimtab.int8_weight_mm


def int8_weight_mm(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    group_size: int | None = None,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """``act(x @ ((weight - zero_point) * weight_scale).T + bias)``, summed in float32.

    For decoding, which is bound by reading the weight, and for accuracy. A group's sum is one chain of
    fused multiply-adds in rising k, and so is the sum of the groups times their scales: the same bits
    on every CPU instruction set, for every batch size and thread count. A GPU sums in an order of its
    own, the same for every run. There CUDA C++ takes up to 64 rows, for which reading the weight is the
    cost; more go through torch's own product with the weight dequantized for the call.

    Args:
        x: float32, bfloat16 or float16 [..., K], any rank >= 1, any strides.
        weight: int8 [N, K], or on a CPU its packed form from int8_pack.
        weight_scale: contiguous float32 [N], or [groups, N] where ``group_size`` is given. (Groups
            first: the transpose of what quantize_affine returns for a weight.)
        zero_point: contiguous int8 of the same shape, in the units of ``weight``, or None for 0.
        bias: float32, bfloat16 or float16 [N], or None.
        group_size: adjacent elements of a row of ``weight`` that share a scale: a multiple of 4, or K
            or more. The last group may be shorter. None: the whole row.
        activation: "none", "relu", "gelu", "gelu_tanh" or "silu".
        out_dtype: float32, bfloat16 or float16; None for that of ``x``.
        out: optional contiguous [..., N] to write to (no gradient); its dtype wins.

    Gradients flow to ``x`` (through the dequantized weight) and ``bias``. Under autocast ``x`` is cast
    to the autocast dtype first, as for torch.nn.functional.linear.

    Raises:
        RuntimeError: wrong dtype, shape, scale or zero point length, group size, or ``weight_scale``
            requires grad.
        ValueError: unknown activation.
    """
    code = library.activation_code("int8_weight_mm", activation)
    if torch.is_grad_enabled():
        library.refuse_grad("int8_weight_mm", weight_scale=weight_scale)
    args = (x, weight, weight_scale, zero_point, bias, group_size, code)
    if out is not None:
        if torch.is_grad_enabled():
            library.refuse_grad("int8_weight_mm with out=", x=x, bias=bias)
        _op.out(*args, out=out)
        return out
    return _op.default(*args, out_dtype)


def dequantize_weight(
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    K: int,
    group_size: int | None,
    dtype: torch.dtype,
) -> Tensor:
    """The float weight [N, K] that an int8 one (plain or packed) stands for; scales as above."""
    plain = int8_unpack(weight, weight_scale.shape[-1], K) if weight.dim() == 1 else weight

    def each(per_group: Tensor) -> Tensor:
        """[N] or [groups, N] -> [N, K] or [N, 1], in float32."""
        columns = per_group.to(torch.float32).reshape(-1, per_group.shape[-1]).t()
        if columns.shape[1] == 1 or group_size is None:
            return columns
        return columns.repeat_interleave(group_size, dim=1)[:, :K]

    values = plain.to(torch.float32)
    if zero_point is not None:
        values = values - each(zero_point)
    return (values * each(weight_scale)).to(dtype)


def activation_forward(activation: str, t: Tensor) -> Tensor:
    """act(t) by torch's own ops: for devices that have no kernel of ours for a form of the weight."""
    if activation == "relu":
        return torch.relu(t)
    if activation == "silu":
        return torch.nn.functional.silu(t)
    if activation == "none":
        return t
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.nn.functional.gelu(t, approximate=approximate)


def _fake_sizes(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    group_size: int | None,
) -> list[int]:
    op = "int8_weight_mm"
    library.expect_float(op, "x", x)
    library.expect(
        x.dim() >= 1, f"{op}: expected x of at least one dimension, got {library.describe(x)}"
    )
    K, N = x.shape[-1], weight_scale.shape[-1]
    library.expect(
        group_size is None or group_size >= 1,
        f"{op}: expected group_size >= 1 or None, got {group_size}",
    )
    library.expect(
        group_size is None or group_size >= K or group_size % 4 == 0,
        f"{op}: expected group_size to be a multiple of 4, or K={K} or more, got {group_size}",
    )
    groups = group_count(K, group_size)
    given = weight_scale.shape[0] if weight_scale.dim() == 2 else 1
    library.expect(
        given == groups and weight_scale.dim() in (1, 2),
        f"{op}: expected weight_scale [groups={groups}, N] for K={K} and group_size {group_size}, "
        f"got {library.describe(weight_scale)}",
    )
    library.expect(
        zero_point is None or zero_point.shape == weight_scale.shape,
        f"{op}: expected a contiguous zero_point of the shape of weight_scale "
        f"{library.describe(weight_scale)}",
    )
    shape = (packed_size(N, K),) if weight.dim() == 1 else (N, K)
    library.expect(
        weight.dtype == torch.int8 and tuple(weight.shape) == shape,
        f"{op}: expected weight [N={N}, K={K}] int8 or its packed form, got "
        f"{library.describe(weight)}",
    )
    return [*x.shape[:-1], N]


def _fake(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    group_size: int | None = None,
    activation: int = 0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    sizes = _fake_sizes(x, weight, weight_scale, zero_point, group_size)
    return x.new_empty(sizes, dtype=out_dtype or x.dtype)


library.register_fake("trimtab::int8_weight_mm")(_fake)
library.register_fake("trimtab::int8_weight_mm.inference")(_fake)


@library.register_fake("trimtab::int8_weight_mm.out")
def _(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    group_size: int | None = None,
    activation: int = 0,
    *,
    out: Tensor,
) -> None:
    _fake_sizes(x, weight, weight_scale, zero_point, group_size)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, weight_scale, zero_point, bias, group_size, activation, _ = inputs
    ctx.activation, ctx.group_size = activation, group_size
    # With an activation its derivative needs the sum before it, computed again from x.
    ctx.save_for_backward(x if activation else None, weight, weight_scale, zero_point, bias)
    ctx.x_dtype, ctx.K = x.dtype, x.shape[-1]


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, weight, scale, zero_point, bias = ctx.saved_tensors
    if ctx.activation:
        before = _op.default(x, weight, scale, zero_point, bias, ctx.group_size, 0, torch.float32)
        grad = activation_backward(library.ACTIVATION_NAMES[ctx.activation], before, grad)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        dtype = ctx.x_dtype
        plain = dequantize_weight(weight, scale, zero_point, ctx.K, ctx.group_size, dtype)
        grad_x = grad.to(dtype) @ plain
    if bias is not None and ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(bias.dtype)
    return grad_x, None, None, None, grad_bias, None, None, None


torch.library.register_autograd("trimtab::int8_weight_mm", _backward, setup_context=_setup_context)

library.register_autocast(_op.default)
library.register_autocast(_op.inference)


@register_flop_formula(torch.ops.trimtab.int8_weight_mm)
def _(x_shape: Any, weight_shape: Any, scale_shape: Any, *_: Any, **__: Any) -> int:
    """2 M N K."""
    rows = 1
    for size in x_shape[:-1]:
        rows *= size
    return 2 * rows * x_shape[-1] * scale_shape[-1]
