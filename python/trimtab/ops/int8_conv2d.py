"""A whole int8 2-D convolution in one call."""

from typing import Any

import torch
from torch import Tensor

from . import library
from .conv2d import grad_of_images, out_sizes, padding_sides, pair
from .flops import register_flop_formula
from .int8_linear import activation_backward
from .int8_pack import PANEL, TAIL

_op = torch.ops.trimtab.int8_conv2d


def int8_conv2d(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    *,
    kernel_size: int | tuple[int, int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``act(conv2d(x, weight * weight_scale) + bias)`` with each image of ``x`` quantized to int8.

    One scale an image: ``quantize_int8(x.reshape(B, -1))``; padding is an exact zero; the sums over
    (kh, kw, c) are exact in int32; ``float(sum) * weight_scale[o] * x_scale[b] + bias[o]``, each step
    rounded, then the activation and one rounding to ``out_dtype``. The same bits as int8_mm over the
    images' patches (im2col), on every instruction set. An image with a NaN or Inf comes out NaN.

    Args:
        x: float32, bfloat16 or float16 [B, C, H, W] or [C, H, W], any strides.
        weight: int8 [O, C / groups, kh, kw], or on a CPU its packed form from int8_conv2d_pack.
        weight_scale: float32 [O].
        bias: float32, bfloat16 or float16 [O], or None.
        stride, padding, dilation, groups: as for torch.nn.functional.conv2d, "same" and "valid" too.
        activation: "none", "relu", "gelu", "gelu_tanh" or "silu".
        out_dtype: float32, bfloat16 or float16; None for that of ``x``.
        kernel_size: needed where ``weight`` is packed.
        out: optional [B, O, OH, OW] to write to, contiguous or channels-last (no gradient).

    Returns [B, O, OH, OW] (or [O, OH, OW]), channels-last if ``x`` is and is not contiguous as well.

    Gradients flow to ``x`` (through the dequantized weight; rounding counts as identity) and ``bias``.
    Under autocast ``x`` is cast to the autocast dtype first.

    Raises:
        RuntimeError: wrong dtype, shape, scale length, more than 133,144 products a sum, a kernel
            larger than the padded image, or ``weight_scale`` requires grad.
        ValueError: unknown activation or padding name, "same" with a stride, packed weight without
            ``kernel_size``.
    """
    code = library.activation_code("int8_conv2d", activation)
    if weight.dim() == 4:
        kernel = (weight.shape[2], weight.shape[3])
    elif kernel_size is not None:
        kernel = pair("kernel_size", kernel_size, "int8_conv2d")
    else:
        raise ValueError("int8_conv2d: expected kernel_size with a packed weight, got None")
    stride = pair("stride", stride, "int8_conv2d")
    dilation = pair("dilation", dilation, "int8_conv2d")
    sides = padding_sides(padding, kernel, stride, dilation, "int8_conv2d")
    if torch.is_grad_enabled():
        library.refuse_grad("int8_conv2d", weight_scale=weight_scale)
    batch = x.unsqueeze(0) if x.dim() == 3 else x
    args = (batch, weight, weight_scale, bias, kernel, stride, sides, dilation, groups, code)
    if out is not None:
        if torch.is_grad_enabled():
            library.refuse_grad("int8_conv2d with out=", x=x, bias=bias)
        _op.out(*args, out=out.unsqueeze(0) if x.dim() == 3 else out)
        return out
    result = _op.default(*args, out_dtype)
    return result.squeeze(0) if x.dim() == 3 else result


def int8_conv2d_pack(weight: Tensor, groups: int = 1) -> Tensor:
    """Packs an int8 conv ``weight`` [O, C / groups, kh, kw] for the CPU kernels: 1-D int8.

    Each group as int8_pack of its [O / groups, (kh, kw, c)] matrix; groups of few outputs are merged,
    block-diagonally, until they fill a panel of 16; depthwise weights (C = O = groups) as [kh, kw, O].

    Raises:
        RuntimeError: wrong dtype, rank or device, or groups that do not divide O.
    """
    return torch.ops.trimtab.int8_conv2d_pack.default(weight, groups)


def int8_conv2d_unpack(packed: Tensor, sizes: tuple[int, int, int, int], groups: int = 1) -> Tensor:
    """The inverse of int8_conv2d_pack: int8 [O, C / groups, kh, kw] of these ``sizes``.

    Raises:
        RuntimeError: ``packed`` is not the packed form of such a weight.
    """
    return torch.ops.trimtab.int8_conv2d_unpack.default(packed, sizes, groups)


def packed_size(sizes: tuple[int, int, int, int], groups: int) -> int:
    """Bytes of the packed form of a weight of these ``sizes``."""
    O, C, kh, kw = sizes
    if C == 1 and O == groups:
        return O * kh * kw
    merged = merged_groups(C * kh * kw, O // groups, groups)
    columns = (merged * (O // groups) + PANEL - 1) // PANEL * PANEL
    return groups // merged * columns * ((merged * C * kh * kw + 3) // 4 * 4) + TAIL


def merged_groups(K: int, outputs: int, groups: int) -> int:
    """How many groups share a weight panel: Conv of csrc/cpu/int8_conv2d_pack.cpp."""
    fits = range(2, min(groups, PANEL // max(outputs, 1), 2048 // max(K, 1)) + 1)
    return max((m for m in fits if groups % m == 0), default=1)


def _expect_weight(op: str, weight: Tensor, sizes: tuple[int, int, int, int], groups: int) -> None:
    shape = (packed_size(sizes, groups),) if weight.dim() == 1 else sizes
    library.expect(
        weight.dtype == torch.int8 and tuple(weight.shape) == shape,
        f"{op}: expected weight {list(sizes)} int8 or its packed form, got "
        f"{library.describe(weight)}",
    )
    K = sizes[1] * sizes[2] * sizes[3]
    library.expect(
        K <= library.MAX_K,
        f"{op}: expected C / groups * kh * kw <= {library.MAX_K}, where the int32 sum is "
        f"exact, got {K}",
    )


def _fake_sizes(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> list[int]:
    O = weight_scale.shape[0]
    sizes = out_sizes("int8_conv2d", x, O, kernel, stride, padding, dilation, groups)
    _expect_weight("int8_conv2d", weight, (O, x.shape[1] // groups, kernel[0], kernel[1]), groups)
    return sizes


def _fake(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: int = 0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    sizes = _fake_sizes(x, weight, weight_scale, kernel_size, stride, padding, dilation, groups)
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(sizes, dtype=out_dtype or x.dtype, device=x.device, memory_format=layout)


library.register_fake("trimtab::int8_conv2d")(_fake)
library.register_fake("trimtab::int8_conv2d.inference")(_fake)


@library.register_fake("trimtab::int8_conv2d.out")
def _(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: int = 0,
    *,
    out: Tensor,
) -> None:
    _fake_sizes(x, weight, weight_scale, kernel_size, stride, padding, dilation, groups)


@library.register_fake("trimtab::int8_conv2d_pack")
def _(weight: Tensor, groups: int) -> Tensor:
    library.expect(
        weight.dtype == torch.int8 and weight.dim() == 4,
        f"int8_conv2d_pack: expected weight of 4-D int8, got {library.describe(weight)}",
    )
    O, C, kh, kw = weight.shape
    return weight.new_empty(packed_size((O, C, kh, kw), groups))


@library.register_fake("trimtab::int8_conv2d_unpack")
def _(packed: Tensor, sizes: list[int], groups: int) -> Tensor:
    return packed.new_empty(sizes)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, weight_scale, bias, kernel, stride, padding, dilation, groups, activation, _ = inputs
    ctx.activation = activation
    # With an activation its derivative needs the sum before it, computed again from x.
    ctx.save_for_backward(x if activation else None, weight, weight_scale, bias)
    ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
    ctx.shape = (kernel, stride, padding, dilation, groups)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, weight, weight_scale, bias = ctx.saved_tensors
    if ctx.activation:
        before = _op.default(x, weight, weight_scale, bias, *ctx.shape, 0, torch.float32)
        grad = activation_backward(library.ACTIVATION_NAMES[ctx.activation], before, grad)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _grad_x(ctx, grad.to(ctx.x_dtype), weight, weight_scale)
    if bias is not None and ctx.needs_input_grad[3]:
        grad_bias = grad.sum((0, 2, 3), dtype=torch.float32).to(bias.dtype)
    return grad_x, None, None, grad_bias, *[None] * 7


def _grad_x(ctx: Any, grad: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    sizes = (weight_scale.shape[0], ctx.x_shape[1] // ctx.shape[4], *ctx.shape[0])
    plain = int8_conv2d_unpack(weight, sizes, ctx.shape[4]) if weight.dim() == 1 else weight
    real = (plain.to(torch.float32) * weight_scale[:, None, None, None]).to(grad.dtype)
    return grad_of_images(ctx.x_shape, real, grad, *ctx.shape[1:])


torch.library.register_autograd("trimtab::int8_conv2d", _backward, setup_context=_setup_context)

library.register_autocast(_op.default)
library.register_autocast(_op.inference)


@register_flop_formula(torch.ops.trimtab.int8_conv2d)
def _(
    x_shape: Any,
    weight_shape: Any,
    scale_shape: Any,
    bias_shape: Any,
    kernel: Any,
    *args: Any,
    out_shape: Any = None,
    **_: Any,
) -> int:
    """2 B O OH OW (C / groups) kh kw."""
    groups, (B, O, OH, OW) = args[3], out_shape
    return 2 * B * O * OH * OW * (x_shape[1] // groups) * kernel[0] * kernel[1]
