"""quantize_affine, the obvious way: the oracle for the zero-point scheme of NUMERICS.md section 2."""

from __future__ import annotations

import numpy as np

from .dtypes import round_to, to_float32


def groups_of(array: np.ndarray, group_size: int | None) -> list[np.ndarray]:
    """The groups of each row of ``array`` [..., K]: views [..., group_size], the last one shorter."""
    K = array.shape[-1]
    size = max(K, 1) if group_size is None else group_size
    return [array[..., k : k + size] for k in range(0, max(K, 1), size)]


def quantize_affine(
    x: np.ndarray, bits: int = 8, group_size: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Min/max quantization to ``bits`` bits with a zero point, one scale a group.

    ``x`` [..., K] is float32, float16 or bfloat16 bits (uint16). Returns ``q`` [..., K] uint8,
    ``scale`` [..., groups] float32 and ``zero_point`` [..., groups] uint8.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"quantize_affine: expected bits in 2..8, got {bits}")
    if group_size is not None and group_size < 1:
        raise ValueError(f"quantize_affine: expected group_size >= 1 or None, got {group_size}")
    parts = [_group(part, np.float32(2**bits - 1)) for part in groups_of(to_float32(x), group_size)]
    q, scale, zero = zip(*parts)
    return (
        np.concatenate(q, axis=-1).astype(np.uint8),
        np.stack(scale, axis=-1).astype(np.float32),
        np.stack(zero, axis=-1).astype(np.uint8),
    )


def _group(x: np.ndarray, levels: np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q [..., n], scale [...] and zero point [...] of one group a row, as float32."""
    one, half, nothing = np.float32(1), np.float32(0.5), np.float32(0)
    finite = np.isfinite(x).all(axis=-1)
    x = np.where(finite[..., None], x, nothing)
    lo = np.min(x, axis=-1, initial=nothing)
    hi = np.max(x, axis=-1, initial=nothing)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore", under="ignore"):
        span = hi - lo
        overflows = np.isinf(span)
        # Half the range does not overflow; unit says what span stands for: span / unit.
        unit = np.where(overflows, half, one)
        span = np.where(overflows, hi * half - lo * half, span)
        inverse = levels / span * unit
        scale = span / levels / unit
        vanishes = np.isinf(inverse) | (span == 0)
        inverse = np.where(vanishes, nothing, inverse)
        zero = np.rint(-lo * inverse)
        q = np.minimum(np.rint(x * inverse[..., None]) + zero[..., None], levels)
    scale = np.where(vanishes, nothing, scale)
    scale = np.where(finite, scale, np.float32(np.nan))
    return q, scale, zero


def dequantize_affine(
    q: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    group_size: int | None = None,
    out_dtype: str = "float32",
) -> np.ndarray:
    """``(q - zero_point) * scale`` of ``out_dtype`` (bfloat16 as uint16 bits), [..., K]."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        parts = [
            (part.astype(np.float32) - zero_point[..., g, None].astype(np.float32))
            * scale[..., g, None]
            for g, part in enumerate(groups_of(q, group_size))
        ]
    return round_to(np.concatenate(parts, axis=-1), out_dtype)
