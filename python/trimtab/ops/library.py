"""Loads the C++ operators and holds what every op module shares."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

torch.ops.load_library(Path(__file__).parent.parent / "lib" / "libtrimtab_torch.so")

# The numbers of tt_activation in csrc/include/trimtab/trimtab.h.
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
ACTIVATION_NAMES = {code: name for name, code in ACTIVATIONS.items()}

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# K above this could overflow the int32 sum: 127 * 127 * K < 2^31 (NUMERICS.md section 3).
MAX_K = 133_144


def activation_code(op: str, activation: str) -> int:
    """The C++ number of an activation name; ValueError for a name that is none of ours."""
    code = ACTIVATIONS.get(activation)
    if code is None:
        raise ValueError(f"{op}: expected activation in {list(ACTIVATIONS)}, got {activation!r}")
    return code


def describe(tensor: torch.Tensor) -> str:
    """``[2, 3] bfloat16``, as in the C++ messages."""
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def expect(condition: bool, message: str) -> None:
    """RuntimeError(message) unless condition, like a check of the C++ op; for fakes."""
    if not condition:
        raise RuntimeError(message)


def expect_float(op: str, name: str, tensor: torch.Tensor) -> None:
    expect(
        tensor.dtype in FLOAT_DTYPES,
        f"{op}: expected {name} of float32, bfloat16 or float16, got {describe(tensor)}",
    )


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """True if a gradient may be asked for with respect to one of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def refuse_grad(op: str, **tensors: torch.Tensor | None) -> None:
    """RuntimeError if a tensor that has no gradient asks for one."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"{op}: {name} requires grad, but the op has no gradient for it; "
                f"pass {name}.detach()"
            )


_fragment = torch.library.Library("trimtab", "FRAGMENT")


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """torch.library.register_fake, called from here alone: for each file that calls it, torch looks
    through all modules there are, 2 ms a file."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.register_fake(name, function, lib=_fragment)
        return function

    return register


def register_autocast(op: torch._ops.OpOverload, weight: bool = False) -> None:
    """Under autocast the op's first tensor, and so its result, takes the autocast dtype.

    torch.library.register_autocast would cast every tensor, scales too, which must stay float32.
    ``weight``: the second tensor too, unless it is int8.
    """
    for device in ("cpu", "cuda"):
        key = f"Autocast{device.upper()}"
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def cast(x: torch.Tensor, *args: Any, device: str = device, keys: Any = keys) -> Any:
            dtype = torch.get_autocast_dtype(device)
            if weight and args[0].is_floating_point():
                args = (args[0].to(dtype), *args[1:])
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return op(x.to(dtype), *args)

        _fragment.impl(op, cast, key)


def implement(name: str, function: Any, key: str) -> None:
    """Registers a Python function as the implementation of an op for a dispatch key."""
    _fragment.impl(name, function, key)


# What triton_backend has: implementations of its own for a GPU, and overloads that C++ calls.
TRITON = (
    "quantize_int8.triton",
    "silu_mul_quantize_int8.triton",
    "rms_norm_quantize_int8.triton",
    "int8_mm.triton",
    "int8_linear.triton",
    "int8_weight_mm.triton",
    "int8_weight_mm.dequantized",
    "sparse24_linear.triton",
    "bitmap_linear.triton",
    "block_linear.triton",
    "block_grad_values.triton",
    "quantize_affine",
    "quantize_affine.out",
    "dequantize_affine",
    "dequantize_affine.out",
)


def implement_in_triton() -> None:
    """Registers TRITON, whose module is imported by the first call: most processes make none."""
    for name in TRITON:

        def run(*args: Any, name: str = name, **kwargs: Any) -> Any:
            from . import triton_backend

            return triton_backend.implementation(name)(*args, **kwargs)

        implement(name, run, "CUDA")
