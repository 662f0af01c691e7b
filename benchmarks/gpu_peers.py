"""The candidates of the GPU benchmark: ours in CUDA C++ and in Triton, and what torch has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu import Call
from torch import Tensor
from torch.nn.functional import linear

from trimtab import ops
from trimtab.nn.int8_weight import padded_rows

FP8_MAX = 448.0  # of float8_e4m3fn


@dataclass
class Problem:
    """One layer: ``x`` [M, K] bf16, ``weight`` [N, K] in bf16 and int8, ``bias`` [N]."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    q: Tensor  # int8 weight, in a layer's padded rows
    scale: Tensor
    a: Tensor  # x, quantized
    a_scale: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.x.shape[0], self.x.shape[1], self.weight.shape[0])

    def rows(self, M: int) -> Problem:
        """The same layer with the first M rows of x."""
        return Problem(
            self.x[:M], self.weight, self.bias, self.q, self.scale, self.a[:M], self.a_scale[:M]
        )


def problem(M: int, K: int, N: int, device: torch.device) -> Problem:
    """Normal random values: a GPU draws less power, and clocks higher, on zeros."""
    x = torch.randn(M, K, device=device).bfloat16()
    weight = (torch.randn(N, K, device=device) / K**0.5).bfloat16()
    bias = torch.randn(N, device=device).bfloat16()
    q, scale = ops.quantize_int8(weight)
    return Problem(x, weight, bias, padded_rows(q), scale, *ops.quantize_int8(x))


# --- steps that torch.compile fuses; eager on a CPU, where that would take a C++ compiler's time


def _quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(1, keepdim=True).float() / 127
    return (x.float() / scale).round().clamp(-127, 127).to(torch.int8), scale


def _epilogue(acc: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor) -> Tensor:
    return (acc.float() * b_scale * a_scale + bias).to(torch.bfloat16)


def _quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(1, keepdim=True).float() / FP8_MAX
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


_compiled: dict[Any, Callable[..., Any]] = {}


def fused(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """``function`` compiled once for all shapes."""
    if device.type != "cuda":
        return function
    if function not in _compiled:
        _compiled[function] = torch.compile(function, dynamic=True)
    return _compiled[function]


# --- whole layers: bf16 to bf16, quantization of x included


def layer_ours(p: Problem) -> Call:
    op = torch.ops.trimtab.int8_linear.inference
    return lambda: op(p.x, p.q, p.scale, p.bias)


def layer_triton(p: Problem) -> Call:
    op = torch.ops.trimtab.int8_linear.triton
    return lambda: op(p.x, p.q, p.scale, p.bias)


def layer_bf16(p: Problem) -> Call:
    return lambda: linear(p.x, p.weight, p.bias)


def layer_int_mm(p: Problem) -> Call:
    quantize, epilogue = fused(_quantize_int8, p.x.device), fused(_epilogue, p.x.device)
    b = p.q.contiguous().t()

    def run() -> Tensor:
        a, a_scale = quantize(p.x)
        return epilogue(torch._int_mm(a, b), a_scale, p.scale, p.bias)

    return run


def layer_fp8(p: Problem) -> Call:
    quantize = fused(_quantize_fp8, p.x.device)
    b, b_scale = _quantize_fp8(p.weight)

    def run() -> Tensor:
        a, a_scale = quantize(p.x)
        return torch._scaled_mm(
            a, b.t(), a_scale, b_scale.t(), bias=p.bias, out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )  # fmt: skip

    return run


# --- the product alone: operands quantized before


def product_ours(p: Problem) -> Call:
    op = torch.ops.trimtab.int8_mm.default
    return lambda: op(p.a, p.q, p.a_scale, p.scale, p.bias, 0, torch.bfloat16)


def product_triton(p: Problem) -> Call:
    op = torch.ops.trimtab.int8_mm.triton
    return lambda: op(p.a, p.q, p.a_scale, p.scale, p.bias, 0, torch.bfloat16)


def product_bf16(p: Problem) -> Call:
    b = p.weight.t()
    return lambda: p.x @ b


def product_int_mm(p: Problem) -> Call:
    b = p.q.contiguous().t()
    return lambda: torch._int_mm(p.a, b)


def product_fp8(p: Problem) -> Call:
    (a, a_scale), (b, b_scale) = _quantize_fp8(p.x), _quantize_fp8(p.weight)
    return lambda: torch._scaled_mm(
        a, b.t(), a_scale, b_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
    )


LAYERS = {
    "trimtab CUDA": layer_ours,
    "trimtab Triton": layer_triton,
    "nn.Linear bf16": layer_bf16,
    "_int_mm, compiled around it": layer_int_mm,
    "_scaled_mm fp8, compiled around it": layer_fp8,
}
PRODUCTS = {
    "trimtab CUDA": product_ours,
    "trimtab Triton": product_triton,
    "cuBLAS bf16": product_bf16,
    "_int_mm": product_int_mm,
    "_scaled_mm fp8": product_fp8,
}


# --- decode: the weight stays int8, x does not


def decode_ours(p: Problem) -> Call:
    op = torch.ops.trimtab.int8_weight_mm.inference
    return lambda: op(p.x, p.q, p.scale, None, p.bias)


def decode_triton(p: Problem) -> Call:
    op = torch.ops.trimtab.int8_weight_mm.triton
    return lambda: op(p.x, p.q, p.scale, None, p.bias)


DECODE = {
    "trimtab CUDA": decode_ours,
    "trimtab Triton": decode_triton,
    "nn.Linear bf16": layer_bf16,
}


def build(table: dict[str, Callable[[Problem], Call]], p: Problem) -> tuple[dict, dict[str, str]]:
    """(calls, reasons of those that cannot run here), each tried once; ours must run."""
    calls, absent = {}, {}
    for name, make in table.items():
        try:
            call = make(p)
            call()
        except Exception as error:  # a peer may fail in any way, and is then named as absent
            if name == next(iter(table)):
                raise
            absent[name] = " ".join(str(error).split())[:160] or type(error).__name__
        else:
            calls[name] = call
    return calls, absent
