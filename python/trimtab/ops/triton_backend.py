"""The CUDA implementation of the int8 ops: trimtab.kernels, imported on first use.

"cuda" is what torch calls AMD's devices too, so this serves wherever Triton does.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import library


def _kernel(op: str) -> Callable[..., Any]:
    from .. import kernels

    return kernels.load(op)


def _quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])  # -1 is refused where K is 0
    q, scale = _kernel("quantize_int8")(rows)
    return q.reshape(x.shape), scale.reshape(x.shape[:-1])


def _int8_mm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    activation: int = 0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    name = library.ACTIVATION_NAMES[activation]
    return _kernel("int8_mm")(a, b, a_scale, b_scale, bias, name, out_dtype or torch.bfloat16)


def _int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: int = 0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    name = library.ACTIVATION_NAMES[activation]
    return _kernel("int8_linear")(x, weight, weight_scale, bias, name, out_dtype)


def _quantize_int8_out(x: Tensor, *, q: Tensor, scale: Tensor) -> None:
    for into, value in zip((q, scale), _quantize_int8(x), strict=True):
        into.copy_(value)


def _int8_mm_out(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    activation: int = 0,
    *,
    out: Tensor,
) -> None:
    out.copy_(_int8_mm(a, b, a_scale, b_scale, bias, activation, out.dtype))


def _int8_linear_out(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: int = 0,
    *,
    out: Tensor,
) -> None:
    out.copy_(_int8_linear(x, weight, weight_scale, bias, activation, out.dtype))


def _quantize_affine(
    x: Tensor, bits: int = 8, group_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    q, *factors = _kernel("quantize_affine")(x.reshape(-1, x.shape[-1]), bits, group_size)
    scale, zero_point = (t.reshape(*x.shape[:-1], t.shape[-1]) for t in factors)
    return q.reshape(x.shape), scale, zero_point


def _quantize_affine_out(
    x: Tensor,
    bits: int = 8,
    group_size: int | None = None,
    *,
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
) -> None:
    values = _quantize_affine(x, bits, group_size)
    for into, value in zip((q, scale, zero_point), values, strict=True):
        into.copy_(value)


def _dequantize_affine(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_size: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    # Two of torch's own elementwise steps: the same roundings, in the same order.
    size, K = group_size or max(q.shape[-1], 1), q.shape[-1]
    zero = zero_point.float().repeat_interleave(size, dim=-1)[..., :K]
    step = scale.repeat_interleave(size, dim=-1)[..., :K]
    return ((q.float() - zero) * step).to(out_dtype or torch.float32)


def _dequantize_affine_out(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_size: int | None = None,
    *,
    out: Tensor,
) -> None:
    out.copy_(_dequantize_affine(q, scale, zero_point, group_size, out.dtype))


def _int8_weight_mm(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    group_size: int | None = None,
    activation: int = 0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    name = library.ACTIVATION_NAMES[activation]
    N, K = weight.shape
    rows = x.reshape(-1, K)
    scale = weight_scale.reshape(-1)
    if zero_point is not None or scale.numel() != N:
        # The kernel has one scale a row. Groups and zero points: the float weight, made for this call,
        # goes through torch's own product.
        from .int8_weight_mm import activation_forward, dequantize_weight

        plain = dequantize_weight(weight, weight_scale, zero_point, K, group_size, x.dtype)
        t = (rows @ plain.t()).float()
        out = activation_forward(name, t if bias is None else t + bias.float())
        out = out.to(out_dtype or x.dtype)
    else:
        out = _kernel("int8_weight_mm")(rows, weight, scale, bias, name, out_dtype or x.dtype)
    return out.reshape(*x.shape[:-1], N)


def _int8_weight_mm_out(
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
    args = (x, weight, weight_scale, zero_point, bias, group_size, activation)
    out.copy_(_int8_weight_mm(*args, out.dtype))


for _name, _function in {
    "quantize_int8": _quantize_int8,
    "quantize_int8.out": _quantize_int8_out,
    "int8_mm": _int8_mm,
    "int8_mm.out": _int8_mm_out,
    "int8_linear": _int8_linear,
    "int8_linear.inference": _int8_linear,
    "int8_linear.out": _int8_linear_out,
    "quantize_affine": _quantize_affine,
    "quantize_affine.out": _quantize_affine_out,
    "dequantize_affine": _dequantize_affine,
    "dequantize_affine.out": _dequantize_affine_out,
    "int8_weight_mm": _int8_weight_mm,
    "int8_weight_mm.inference": _int8_weight_mm,
    "int8_weight_mm.out": _int8_weight_mm_out,
}.items():
    library.implement(_name, _function, "CUDA")
