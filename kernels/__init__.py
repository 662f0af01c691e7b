"""trimtab's Triton kernels: a file an op, the same formulas as csrc/math, line for line.

Importing this package imports neither Triton nor torch; ``load`` does:

    from trimtab import kernels
    if kernels.is_available():
        q, scale = kernels.load("quantize_int8")(x)

A launcher and its module share the op's name, so the package does not re-export the launchers:
Python would rebind ``kernels.int8_mm`` to the module whenever that is first imported.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

OPS = (
    "quantize_int8",
    "int8_mm",
    "int8_linear",
    "int8_weight_mm",
    "sparse24_linear",
    "bitmap_linear",
    "block_linear",
    "block_grad_values",
    "quantize_affine",
    "silu_mul_quantize_int8",
    "rms_norm_quantize_int8",
    "optim_step",
    "adafactor",
)

__all__ = ["OPS", "Availability", "is_available", "load"]


class Availability(NamedTuple):
    """Truthy if the kernels can run here; ``reason`` says why, or why not."""

    ok: bool
    reason: str

    def __bool__(self) -> bool:
        return self.ok


@functools.cache
def is_available() -> Availability:
    """Whether Triton kernels can run in this process, and the reason."""
    try:
        triton = importlib.import_module("triton")
        torch = importlib.import_module("torch")
    except ImportError as error:
        return Availability(False, f"{error.name or 'triton'} cannot be imported: {error}")
    if triton.knobs.runtime.interpret:
        return Availability(True, f"triton {triton.__version__}, interpreted (TRITON_INTERPRET)")
    if not torch.cuda.is_available():
        return Availability(False, "torch sees no GPU, and TRITON_INTERPRET is not set")
    return Availability(True, f"triton {triton.__version__} on {torch.cuda.get_device_name()}")


@functools.cache
def load(op: str) -> Callable[..., Any]:
    """The launcher of ``op``, one of ``OPS``; an ImportError that names it if Triton is missing."""
    if op not in OPS:
        raise ValueError(f"kernels.load: expected one of {', '.join(OPS)}, got {op!r}")
    try:
        module = importlib.import_module(f".{op}", __name__)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        raise ImportError(
            f"trimtab.kernels.{op} needs triton, which is not installed: pip install triton"
        ) from error
    return getattr(module, op)
