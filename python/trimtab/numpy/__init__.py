"""trimtab on NumPy arrays: the CPU kernels, with no torch in the process.

Every array may also be any object with ``__dlpack__`` whose memory the CPU can read (a torch or JAX
tensor, say); it is read in place. Copied first are only arrays whose last dimension is not adjacent,
or whose leading dimensions do not walk memory with one stride. bfloat16 is ml_dtypes' where that
package is installed; without it bfloat16 comes and goes through DLPack (``out=``) alone.

A weight is int8 [N, K], or what ``int8_pack`` made of it: packing once saves packing at every call.
``activation`` is "none", "relu", "gelu", "gelu_tanh" or "silu".

The kernels run without the GIL, on trimtab's own threads. The results are the same bits for every
instruction set, batch size and number of threads, and the same as torch's ops of the same names; sparse
products of float values, summed in an order of each instruction set's own, have those of torch's.

A wrong dtype or kind of object raises TypeError, a wrong shape, layout or value ValueError; both say
the function, what was expected and what came. If memory runs out, MemoryError.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _numpy
from .sparse import (
    bitmap_linear,
    bitmap_pack,
    bitmap_unpack,
    block_linear,
    block_pack,
    block_unpack,
)

__all__ = [
    "quantize_int8",
    "rms_norm_quantize_int8",
    "silu_mul_quantize_int8",
    "int8_mm",
    "int8_linear",
    "int8_weight_mm",
    "int8_pack",
    "int8_unpack",
    "bitmap_linear",
    "bitmap_pack",
    "bitmap_unpack",
    "block_linear",
    "block_pack",
    "block_unpack",
    "get_num_threads",
    "set_num_threads",
    "get_isa",
    "set_isa",
    "available_isas",
]

Array = Any  # an np.ndarray, or an object with __dlpack__


def quantize_int8(x: Array) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 with one scale a row: ``x`` is about ``q * scale[..., None]``.

    scale = absmax / 127;  q = clamp(rne(x * (127 / absmax)), -127, 127)

    ``x`` [..., K] float32, bfloat16 or float16. Returns ``q`` [..., K] int8 and ``scale`` [...]
    float32. A row of zeros gives scale 0; a row that holds NaN or Inf gives q = 0, scale = NaN.
    """
    return _numpy.quantize_int8(x)


def rms_norm_quantize_int8(
    x: Array, weight: Array, eps: float = 1e-6
) -> tuple[np.ndarray, np.ndarray]:
    """``quantize_int8`` of ``x`` [..., K] after RMSNorm: (x / sqrt(mean(x^2) + eps)) * weight.

    ``weight`` [K] float32 or of x's dtype. In float32, not rounded to x's dtype in between; the squares
    are added in one fixed order. Returns ``q`` and ``scale`` as ``quantize_int8``.
    """
    return _numpy.rms_norm_quantize_int8(x, weight, eps)


def silu_mul_quantize_int8(gate: Array, up: Array) -> tuple[np.ndarray, np.ndarray]:
    """``quantize_int8`` of silu(``gate``) * ``up``, both [..., K] of one dtype.

    The product is float32, not rounded to that dtype in between. Returns ``q`` and ``scale`` as
    ``quantize_int8``.
    """
    return _numpy.silu_mul_quantize_int8(gate, up)


def int8_mm(
    a: Array,
    b: Array,
    a_scale: Array,
    b_scale: Array,
    bias: Array | None = None,
    activation: str = "none",
    out_dtype: Any = None,
    out: Array | None = None,
    out_scale: Array | None = None,
) -> np.ndarray:
    """Scaled product of int8 ``a`` [M, K] and int8 ``b`` [N, K], transposed; the sum is exact.

    act((a @ b.T) * b_scale * a_scale[:, None] + bias)

    ``a_scale`` [M] and ``b_scale`` [N] float32; ``bias`` [N] float32, bfloat16 or float16; ``b``
    plain or packed. Returns [M, N] of ``out_dtype``, float32 by default (torch's op: bfloat16), or
    fills and returns ``out``, which must be writable and share no memory with the other arguments.
    K above 133144, where the int32 sum could overflow, raises ValueError.

    ``out_dtype`` int8 with ``out_scale`` [1] float32, the next layer's scale, returns that layer's
    input: clamp(rne(t * (1 / out_scale)), -127, 127) of the float result t, 0 where that is NaN.
    """
    return _numpy.int8_mm(a, b, a_scale, b_scale, bias, activation, out_dtype, out, out_scale)


def int8_linear(
    x: Array,
    weight: Array,
    weight_scale: Array,
    bias: Array | None = None,
    activation: str = "none",
    out_dtype: Any = None,
    out: Array | None = None,
    out_scale: Array | None = None,
) -> np.ndarray:
    """A linear layer in one call: ``quantize_int8`` of ``x`` [..., K], then ``int8_mm``.

    ``weight`` [N, K] int8 or packed, ``weight_scale`` [N] float32, ``bias`` [N]. Returns [..., N] of
    ``out_dtype``, by default x's; ``out``, the bound on K, int8 and ``out_scale`` as in ``int8_mm``.
    """
    return _numpy.int8_linear(x, weight, weight_scale, bias, activation, out_dtype, out, out_scale)


def int8_weight_mm(
    x: Array,
    weight: Array,
    weight_scale: Array,
    zero_point: Array | None = None,
    bias: Array | None = None,
    group_size: int | None = None,
    activation: str = "none",
    out_dtype: Any = None,
    out: Array | None = None,
) -> np.ndarray:
    """Float ``x`` [..., K] times int8 ``weight``, which alone is quantized; the sum is fp32.

    act(x @ ((weight - zero_point) * weight_scale).T + bias)

    ``group_size``: columns of K that share a scale, a multiple of 4; None: all of K.
    ``weight_scale`` [groups, N] float32 and ``zero_point`` [groups, N] int8, or [N] for one group.
    Returns [..., N] of ``out_dtype``, by default x's; ``out`` as in ``int8_mm``.
    """
    return _numpy.int8_weight_mm(
        x, weight, weight_scale, zero_point, bias, group_size, activation, out_dtype, out
    )


def int8_pack(b: Array) -> np.ndarray:
    """Lay int8 ``b`` [N, K] out as the kernels read it: int8 [bytes], aligned to 64 bytes.

    The layout is the same for every instruction set; it is not meant for files (save ``b``).
    """
    return _numpy.int8_pack(b)


def int8_unpack(packed: Array, N: int, K: int) -> np.ndarray:
    """The inverse of ``int8_pack``: int8 [N, K]."""
    return _numpy.int8_unpack(packed, N, K)


def get_num_threads() -> int:
    """How many threads the kernels use."""
    return _numpy.get_num_threads()


def set_num_threads(count: int) -> None:
    """Use ``count`` threads from the next call on; 0, the default: one per core of this process."""
    _numpy.set_num_threads(count)


def get_isa() -> str:
    """The instruction set in use: the best this CPU has, unless TRIMTAB_ISA or ``set_isa`` caps it."""
    return _numpy.get_isa()


def set_isa(name: str | None) -> None:
    """Use one of ``available_isas()``; None: back to TRIMTAB_ISA, or the best.

    A name that does not exist, or that this CPU lacks, raises ValueError.
    """
    _numpy.set_isa(name or "")


def available_isas() -> list[str]:
    """The instruction sets of this CPU, in rising order: "scalar" … "amx"."""
    return _numpy.available_isas()
