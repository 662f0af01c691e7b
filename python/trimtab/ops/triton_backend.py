"""The Triton implementations: trimtab.kernels. Imported on first use, as library.TRITON registers them.

"cuda" is what torch calls AMD's devices too, so these serve wherever Triton does. Ops that CUDA C++ has
as well take them as their overload "triton", which csrc/torch calls where CUDA C++ cannot answer, and
which names the implementation to whoever wants to compare. The others answer for the device alone.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backend, library


def implementation(op: str) -> Callable[..., Any]:
    """Of an op of library.TRITON: _int8_mm for "int8_mm.triton", _int8_mm_out with out."""
    return globals()["_" + op.removesuffix(".triton").replace(".", "_")]


def _kernel(op: str) -> Callable[..., Any]:
    from .. import kernels

    return kernels.load(op)


def _quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])  # -1 is refused where K is 0
    q, scale = _kernel("quantize_int8")(rows)
    return q.reshape(x.shape), scale.reshape(x.shape[:-1])


def _silu_mul_quantize_int8(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    size = (gate.shape[:-1].numel(), gate.shape[-1])
    q, scale = _kernel("silu_mul_quantize_int8")(gate.reshape(size), up.reshape(size))
    return q.reshape(gate.shape), scale.reshape(gate.shape[:-1])


def _rms_norm_quantize_int8(x: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    q, scale = _kernel("rms_norm_quantize_int8")(rows, weight, eps)
    return q.reshape(x.shape), scale.reshape(x.shape[:-1])


def _int8_mm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    activation: int = 0,
    out_dtype: torch.dtype | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    name = library.ACTIVATION_NAMES[activation]
    tail = (bias, name, out_dtype or torch.bfloat16)
    return _kernel("int8_mm")(a, b, a_scale, b_scale, *tail, out_scale=out_scale)


def _int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: int = 0,
    out_dtype: torch.dtype | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    name = library.ACTIVATION_NAMES[activation]
    (N, K), width = weight.shape, weight.stride(0)
    if width > K and width % 16 == 0 and weight.stride(1) == 1:
        reach = weight.storage_offset() + N * width
        if reach <= weight.untyped_storage().nbytes():
            # A layer's padded rows, padding included: what x does not reach meets zeros.
            weight = weight.as_strided((N, width), (width, 1))
    tail = (bias, name, out_dtype)
    return _kernel("int8_linear")(x, weight, weight_scale, *tail, out_scale=out_scale)


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
    N, K = weight.shape
    name = library.ACTIVATION_NAMES[activation]
    rows = x.reshape(x.shape[:-1].numel(), K)
    out = _kernel("int8_weight_mm")(
        *(rows, weight, weight_scale, bias, name, out_dtype or x.dtype),
        zero_point=zero_point,
        group_size=group_size,
    )
    return out.reshape(*x.shape[:-1], N)


def _sparse24_linear(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    weight_scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: int = 0,
) -> Tensor:
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    name = library.ACTIVATION_NAMES[activation]
    out = _kernel("sparse24_linear")(rows, values, metadata, weight_scale, bias, name)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def _bitmap_linear(
    x: Tensor,
    values: Tensor,
    bitmap: Tensor,
    row_start: Tensor,
    weight_scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: int = 0,
) -> Tensor:
    weight = (values, bitmap, row_start, weight_scale, bias)
    if not backend.has_triton():
        return torch.ops.trimtab.bitmap_linear.dense(x, *weight, activation)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    out = _kernel("bitmap_linear")(rows, *weight, library.ACTIVATION_NAMES[activation])
    return out.reshape(*x.shape[:-1], out.shape[-1])


def _block_linear(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    activation: int,
    N: int,
) -> Tensor:
    weight = (values, crow, col, weight_scale, bias)
    bn, bk = values.shape[1:]
    if not (backend.has_triton() and _blocks("block_groups").serves(bn, bk)):
        return torch.ops.trimtab.block_linear.dense(x, *weight, activation, N)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    out = _kernel("block_linear")(rows, *weight, library.ACTIVATION_NAMES[activation], N=N)
    return out.reshape(*x.shape[:-1], N)


def _block_grad_values(
    grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, bn: int, bk: int
) -> Tensor:
    if not (backend.has_triton() and _blocks("block_grad_values").serves_gradient(bn, bk)):
        return torch.ops.trimtab.block_grad_values.dense(grad, x, crow, col, bn, bk)
    rows = (t.reshape(t.shape[:-1].numel(), t.shape[-1]) for t in (grad, x))
    return _kernel("block_grad_values")(*rows, crow, col, bn, bk)


def _blocks(module: str) -> Any:
    return importlib.import_module(f"..kernels.{module}", __package__)


def _int8_weight_mm_dequantized(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    group_size: int | None = None,
    activation: int = 0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    # The float weight, made for this call, through torch's own product: for many rows, where reading
    # the weight is no longer the cost.
    from .int8_weight_mm import activation_forward, dequantize_weight

    plain = dequantize_weight(weight, weight_scale, zero_point, x.shape[-1], group_size, x.dtype)
    t = (x @ plain.t()).float()
    t = activation_forward(
        library.ACTIVATION_NAMES[activation], t if bias is None else t + bias.float()
    )
    return t.to(out_dtype or x.dtype)
