"""The three float dtypes as NumPy arrays. NumPy has no bfloat16: its bit patterns travel as uint16.

float32  -> np.float32        float16 -> np.float16        bfloat16 -> np.uint16 (the bits)
"""

from __future__ import annotations

from typing import Any

import numpy as np

_STORAGE: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
}
_NAMES = {storage: name for name, storage in _STORAGE.items()}

# What every NaN becomes when it is rounded to a dtype: quiet, positive, no payload.
_QUIET_NAN = {"float32": 0x7FC00000, "float16": 0x7E00, "bfloat16": 0x7FC0}


def dtype_name(array: np.ndarray) -> str:
    """The dtype that ``array`` stands for: "float32", "float16", or "bfloat16" for uint16."""
    try:
        return _NAMES[array.dtype]
    except KeyError:
        raise TypeError(
            f"expected a float32, float16 or uint16 (bfloat16 bits) array, got {array.dtype}"
        ) from None


def to_float32(array: np.ndarray, dtype: str | None = None) -> np.ndarray:
    """Widen ``array`` to float32, exactly. ``dtype`` is read off the array if it is not given."""
    array = np.asarray(array)
    name = dtype_name(array)
    if dtype is not None and dtype != name:
        raise TypeError(f"expected {dtype}, got an array of {name}")
    if name == "bfloat16":
        # A bfloat16 is the upper half of a float32.
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array.astype(np.float32)


def round_to(array: np.ndarray, dtype: str) -> np.ndarray:
    """Round float32 ``array`` to ``dtype`` once, to nearest even. Any NaN becomes the quiet one."""
    if dtype not in _STORAGE:
        raise ValueError(f"expected one of {sorted(_STORAGE)}, got {dtype!r}")
    array = np.ascontiguousarray(array, dtype=np.float32)
    if dtype == "bfloat16":
        bits = array.view(np.uint32)
        # Add just under half of the last place kept, and the rest if the place kept is odd: a carry
        # moves into the exponent, and past the largest exponent into Inf, as it should.
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        out = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    else:
        with np.errstate(over="ignore"):  # beyond float16's range is Inf
            out = array.astype(_STORAGE[dtype])
    integer = np.dtype(f"uint{8 * out.itemsize}")
    return np.where(np.isnan(array), integer.type(_QUIET_NAN[dtype]), out.view(integer)).view(
        _STORAGE[dtype]
    )
