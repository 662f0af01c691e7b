"""A whole 2-D convolution with an unstructured sparse weight, in one call."""

from typing import Any

import torch
from torch import Tensor

from . import library
from .bitmap_linear import bitmap_row_bytes, bitmap_unpack, expect_sparse, kept_of
from .conv2d import grad_of_images, grad_of_weight, out_sizes, padding_sides, pair
from .flops import register_flop_formula
from .int8_linear import activation_backward

_op = torch.ops.trimtab.bitmap_conv2d


def bitmap_conv2d(
    x: Tensor,
    values: Tensor,
    bitmap: Tensor,
    row_start: Tensor,
    bias: Tensor | None = None,
    kernel_size: int | tuple[int, int] = 3,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    activation: str = "none",
) -> Tensor:
    """``act(conv2d(x, weight) + bias)`` with the weight [O, C / groups, kh, kw] of ``bitmap_pack``.

    The weight is packed as the matrix [O, C / groups * kh * kw]. Each kept weight multiplies runs of
    neighbouring pixels where they stand: no patches are stored (direct sparse convolution; Park et
    al., "Faster CNNs with Direct Sparse Convolutions and Guided Pruning", 2017). Sums are float32, in
    the rising order of (channel, kh, kw) whatever the thread count and the sizes of the images
    (NUMERICS.md section 7). A pruned weight contributes nothing: 0 * Inf is not evaluated.

    Args:
        x: float32, bfloat16 or float16 [B, C, H, W] or [C, H, W], any strides, on a CPU.
        values: kept weights [kept] row by row, of the dtype of ``x``.
        bitmap: uint8 [O, 8 * ceil(K / 64)], K = C / groups * kh * kw, as for bitmap_linear.
        row_start: int64 [O + 1], kept weights before each output channel.
        bias: float32, bfloat16 or float16 [O], or None.
        kernel_size, stride, padding, dilation, groups: as for torch.nn.Conv2d, "same" and "valid" too.
        activation: "none", "relu", "gelu", "gelu_tanh" or "silu".

    Returns [B, O, OH, OW] (or [O, OH, OW]) of the dtype of ``x``, contiguous. Gradients flow to ``x``,
    ``values`` and ``bias``, through torch's convolutions with the dense weight.

    Raises:
        RuntimeError: wrong dtype, shape or device, values that row_start does not count, or a kernel
            larger than the padded image.
        ValueError: unknown activation or padding name, "same" with a stride.
    """
    code = library.activation_code("bitmap_conv2d", activation)
    kernel = pair("kernel_size", kernel_size, "bitmap_conv2d")
    stride = pair("stride", stride, "bitmap_conv2d")
    dilation = pair("dilation", dilation, "bitmap_conv2d")
    sides = padding_sides(padding, kernel, stride, dilation, "bitmap_conv2d")
    batch = x.unsqueeze(0) if x.dim() == 3 else x
    parts = (values, bitmap, row_start, bias)
    result = _op.default(batch, *parts, kernel, stride, sides, dilation, groups, code)
    return result.squeeze(0) if x.dim() == 3 else result


def _fake(
    x: Tensor,
    values: Tensor,
    bitmap: Tensor,
    row_start: Tensor,
    bias: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: int = 0,
) -> Tensor:
    O = bitmap.shape[0]
    sizes = out_sizes("bitmap_conv2d", x, O, kernel_size, stride, padding, dilation, groups)
    expect_sparse("bitmap_conv2d", x, values, None, bias, O)
    K = x.shape[1] // groups * kernel_size[0] * kernel_size[1]
    library.expect(
        bitmap.dtype == torch.uint8 and bitmap.shape[1] == bitmap_row_bytes(K),
        f"bitmap_conv2d: expected a contiguous bitmap [N, {bitmap_row_bytes(K)}] for K={K}, got "
        f"{library.describe(bitmap)}",
    )
    return x.new_empty(sizes)


library.register_fake("trimtab::bitmap_conv2d")(_fake)
library.register_fake("trimtab::bitmap_conv2d.inference")(_fake)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, values, bitmap, row_start, bias, kernel, *ctx.shape, activation = inputs
    ctx.activation, ctx.kernel = activation, kernel
    ctx.save_for_backward(x, values, bitmap, row_start, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, values, bitmap, row_start, bias = ctx.saved_tensors
    if ctx.activation:
        before = _op.default(x, values, bitmap, row_start, bias, ctx.kernel, *ctx.shape, 0)
        grad = activation_backward(
            library.ACTIVATION_NAMES[ctx.activation], before.to(torch.float32), grad
        )
    grad = grad.to(x.dtype)
    sizes = (bitmap.shape[0], x.shape[1] // ctx.shape[3], *ctx.kernel)
    K = sizes[1] * sizes[2] * sizes[3]
    grad_x = grad_values = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = bitmap_unpack(values, bitmap, K).reshape(sizes)
        grad_x = grad_of_images(x.shape, weight, grad, *ctx.shape)
    if ctx.needs_input_grad[1]:
        grad_values = kept_of(grad_of_weight(x, sizes, grad, *ctx.shape), bitmap, K, values)
    if bias is not None and ctx.needs_input_grad[4]:
        grad_bias = grad.sum((0, 2, 3), dtype=torch.float32).to(bias.dtype)
    return grad_x, grad_values, None, None, grad_bias, *[None] * 6


torch.library.register_autograd("trimtab::bitmap_conv2d", _backward, setup_context=_setup_context)

library.register_autocast(_op.default, weight=True)
library.register_autocast(_op.inference, weight=True)


@register_flop_formula(torch.ops.trimtab.bitmap_conv2d)
def _(x_shape: Any, values_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """2 B OH OW for every kept weight."""
    return 2 * x_shape[0] * out_shape[2] * out_shape[3] * values_shape[0]
