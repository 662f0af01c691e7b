"""Affine quantization to 2..8 bits with a zero point, one scale a row or a group of it."""

import torch
from torch import Tensor

from . import library


def quantize_affine(
    x: Tensor,
    bits: int = 8,
    group_size: int | None = None,
    *,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes groups of ``group_size`` adjacent elements of each row of ``x`` [..., K].

    ``lo = min(0, min x)``, ``hi = max(0, max x)``, ``levels = 2**bits - 1``:
    ``scale = (hi - lo) / levels``, ``zero_point = round(-lo * (levels / (hi - lo)))``,
    ``q = min(round(x * (levels / (hi - lo))) + zero_point, levels)``, halves to even. The range takes
    in 0, so 0 comes back as exactly 0. The same bits on every device and instruction set.

    A group of zeros gets scale 0 and zero point 0. A constant group comes back as its constant, but
    for the rounding of ``scale``. A group with a NaN or Inf gets q = 0, zero point 0 and scale NaN, so
    that it is seen downstream.

    Args:
        x: float32, bfloat16 or float16, any rank >= 1, any strides.
        bits: 2 to 8. A code takes a byte whatever ``bits`` is.
        group_size: at least 1; the last group of a row is shorter where it does not divide K. None:
            the row is one group.
        out: optional (q, scale, zero_point) to write to, contiguous, as below.

    Returns:
        q uint8 [..., K], scale float32 [..., groups] and zero_point uint8 [..., groups].

    Raises:
        RuntimeError: wrong dtype or rank, ``bits`` or ``group_size`` out of range, or ``x`` requires
            grad (rounding has none).
    """
    if torch.is_grad_enabled():
        library.refuse_grad("quantize_affine", x=x)
    if out is not None:
        q, scale, zero_point = out
        torch.ops.trimtab.quantize_affine.out(
            x, bits, group_size, q=q, scale=scale, zero_point=zero_point
        )
        return out
    return torch.ops.trimtab.quantize_affine.default(x, bits, group_size)


def dequantize_affine(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_size: int | None = None,
    out_dtype: torch.dtype = torch.float32,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """``(q - zero_point) * scale``, rounded to float32 and then once to ``out_dtype``.

    Args:
        q: uint8 [..., K], any strides.
        scale: contiguous float32 [..., groups].
        zero_point: contiguous uint8 [..., groups].
        group_size: as quantize_affine was given it.
        out_dtype: float32, bfloat16 or float16.
        out: optional contiguous [..., K] to write to; its dtype wins over ``out_dtype``.

    Where the range reaches the largest finite number of a dtype, its end may round to Inf.

    Raises:
        RuntimeError: wrong dtype, shape, group count, or ``scale`` requires grad.
    """
    if torch.is_grad_enabled():
        library.refuse_grad("dequantize_affine", scale=scale)
    op = torch.ops.trimtab.dequantize_affine
    if out is not None:
        op.out(q, scale, zero_point, group_size, out=out)
        return out
    return op.default(q, scale, zero_point, group_size, out_dtype)


def group_count(K: int, group_size: int | None) -> int:
    """Groups of a row of K elements, as tt_affine_groups counts them."""
    if group_size is None or K == 0:
        return 1
    return (K + group_size - 1) // group_size


def _group_shape(op: str, name: str, x: Tensor, group_size: int | None) -> list[int]:
    """The shape of scale and zero_point."""
    library.expect(
        x.dim() >= 1,
        f"{op}: expected {name} of at least one dimension, got {library.describe(x)}",
    )
    library.expect(
        group_size is None or group_size >= 1,
        f"{op}: expected group_size >= 1 or None, got {group_size}",
    )
    return [*x.shape[:-1], group_count(x.shape[-1], group_size)]


def _fake_shape(x: Tensor, bits: int, group_size: int | None) -> list[int]:
    library.expect_float("quantize_affine", "x", x)
    library.expect(2 <= bits <= 8, f"quantize_affine: expected bits in 2..8, got {bits}")
    return _group_shape("quantize_affine", "x", x, group_size)


@library.register_fake("trimtab::quantize_affine")
def _(x: Tensor, bits: int = 8, group_size: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    groups = _fake_shape(x, bits, group_size)
    return (
        x.new_empty(x.shape, dtype=torch.uint8),
        x.new_empty(groups, dtype=torch.float32),
        x.new_empty(groups, dtype=torch.uint8),
    )


@library.register_fake("trimtab::quantize_affine.out")
def _(
    x: Tensor,
    bits: int = 8,
    group_size: int | None = None,
    *,
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
) -> None:
    _fake_shape(x, bits, group_size)


def _check_fake_codes(q: Tensor, scale: Tensor, zero_point: Tensor, group_size: int | None) -> None:
    op = "dequantize_affine"
    library.expect(
        q.dtype == torch.uint8, f"{op}: expected q of any rank uint8, got {library.describe(q)}"
    )
    shape = _group_shape(op, "q", q, group_size)
    for name, tensor, dtype in (
        ("scale", scale, torch.float32),
        ("zero_point", zero_point, torch.uint8),
    ):
        library.expect(
            list(tensor.shape) == shape and tensor.dtype == dtype,
            f"{op}: expected contiguous {name} with {shape[-1]} groups a row for q "
            f"{library.describe(q)}, got {library.describe(tensor)}",
        )


@library.register_fake("trimtab::dequantize_affine")
def _(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_size: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    _check_fake_codes(q, scale, zero_point, group_size)
    return q.new_empty(q.shape, dtype=out_dtype or torch.float32)


@library.register_fake("trimtab::dequantize_affine.out")
def _(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_size: int | None = None,
    *,
    out: Tensor,
) -> None:
    _check_fake_codes(q, scale, zero_point, group_size)
