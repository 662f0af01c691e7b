"""The CUDA implementation of the int8 ops: the Triton kernels of trimtab.kernels, imported on first use.

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
    rows = x.reshape(-1, x.shape[-1])
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


for _name, _function in {
    "quantize_int8": _quantize_int8,
    "quantize_int8.out": _quantize_int8_out,
    "int8_mm": _int8_mm,
    "int8_mm.out": _int8_mm_out,
    "int8_linear": _int8_linear,
    "int8_linear.inference": _int8_linear,
    "int8_linear.out": _int8_linear_out,
}.items():
    library.implement(_name, _function, "CUDA")
