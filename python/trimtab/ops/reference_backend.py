"""TRIMTAB_BACKEND=reference: the int8 products and the quantizer by the NumPy reference, on any device.

Slow. For asking whether an odd result is the kernels' doing: CUDA, C++ and Triton give these bits.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import reference
from . import library
from .int8_pack import int8_unpack


def to_numpy(tensor: Tensor | None) -> Any:
    """As the reference takes it: bfloat16 as its bits in uint16."""
    if tensor is None:
        return None
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def to_torch(array: Any, device: torch.device) -> Tensor:
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(np.asarray(array)).to(device)


def plain(weight: Tensor, N: int, K: int) -> Tensor:
    """[N, K] int8 of a weight that may be packed."""
    return int8_unpack(weight, N, K) if weight.dim() == 1 else weight


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _load(op: str) -> Any:
    import importlib

    return getattr(importlib.import_module(f"{reference.__name__}.{op}"), op)


def _quantizer(op: str) -> tuple[Any, Any]:
    """quantize_int8, alone or fused after something: (q, scale), and the form with out."""

    def run(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        others = (to_numpy(value) if isinstance(value, Tensor) else value for value in rest)
        q, scale = _load(op)(to_numpy(x), *others)
        return to_torch(q, x.device), to_torch(scale, x.device)

    def run_out(*args: Any, q: Tensor, scale: Tensor) -> None:
        for into, value in zip((q, scale), run(*args), strict=True):
            into.copy_(value)

    return run, run_out


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
    operands = (a, plain(b, b_scale.shape[0], a.shape[1]), a_scale, b_scale, bias)
    names = (library.ACTIVATION_NAMES[activation], name_of(out_dtype or torch.bfloat16))
    out = _load("int8_mm")(*map(to_numpy, operands), *names, to_numpy(out_scale))
    return to_torch(out, a.device)


def _int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: int = 0,
    out_dtype: torch.dtype | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    operands = (x, plain(weight, weight_scale.shape[0], x.shape[-1]), weight_scale, bias)
    names = (library.ACTIVATION_NAMES[activation], name_of(out_dtype or x.dtype))
    out = _load("int8_linear")(*map(to_numpy, operands), *names, to_numpy(out_scale))
    return to_torch(out, x.device)


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
    N, K = weight_scale.shape[-1], x.shape[-1]
    rows = x.reshape(x.shape[:-1].numel(), K)
    operands = map(to_numpy, (rows, plain(weight, N, K), weight_scale, zero_point, bias))
    names = (library.ACTIVATION_NAMES[activation], name_of(out_dtype or x.dtype))
    out = _load("int8_weight_mm")(*operands, group_size, *names)
    return to_torch(out, x.device).reshape(*x.shape[:-1], N)


# The arguments before out_dtype, which the forms with ``out`` lack. After it comes out_scale.
OUT_DTYPE_AT = {"int8_mm": 6, "int8_linear": 5, "int8_weight_mm": 7}


def _out(function: Any, before: int) -> Any:
    """The form with ``out``, whose dtype wins."""

    def run(*args: Any, out: Tensor) -> None:
        out_scale = {"out_scale": args[before]} if len(args) > before else {}
        out.copy_(function(*args[:before], out_dtype=out.dtype, **out_scale))

    return run


def register() -> None:
    """For both dispatch keys; C++ has left these ops alone."""
    for key in ("CPU", "CUDA"):
        for op in ("quantize_int8", "silu_mul_quantize_int8", "rms_norm_quantize_int8"):
            run, run_out = _quantizer(op)
            library.implement(op, run, key)
            library.implement(f"{op}.out", run_out, key)
        for name, function in {
            "int8_mm": _int8_mm,
            "int8_linear": _int8_linear,
            "int8_linear.inference": _int8_linear,
            "int8_weight_mm": _int8_weight_mm,
            "int8_weight_mm.inference": _int8_weight_mm,
        }.items():
            library.implement(name, function, key)
            if "." not in name:
                library.implement(f"{name}.out", _out(function, OUT_DTYPE_AT[name]), key)
