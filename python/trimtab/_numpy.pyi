"""csrc/numpy/module.cpp; documented in numpy/__init__.py."""

from typing import Any

import numpy as np

def quantize_int8(x: Any) -> tuple[np.ndarray, np.ndarray]: ...
def rms_norm_quantize_int8(x: Any, weight: Any, eps: float) -> tuple[np.ndarray, np.ndarray]: ...
def silu_mul_quantize_int8(gate: Any, up: Any) -> tuple[np.ndarray, np.ndarray]: ...
def int8_pack(b: Any) -> np.ndarray: ...
def int8_unpack(packed: Any, N: int, K: int) -> np.ndarray: ...
def int8_mm(
    a: Any,
    b: Any,
    a_scale: Any,
    b_scale: Any,
    bias: Any | None,
    activation: str,
    out_dtype: Any | None,
    out: Any | None,
    out_scale: Any | None,
) -> Any: ...
def int8_linear(
    x: Any,
    weight: Any,
    weight_scale: Any,
    bias: Any | None,
    activation: str,
    out_dtype: Any | None,
    out: Any | None,
    out_scale: Any | None,
) -> Any: ...
def int8_weight_mm(
    x: Any,
    weight: Any,
    weight_scale: Any,
    zero_point: Any | None,
    bias: Any | None,
    group_size: int | None,
    activation: str,
    out_dtype: Any | None,
    out: Any | None,
) -> Any: ...
def bitmap_row_start(values: Any, bitmap: Any, K: int) -> np.ndarray: ...
def bitmap_linear(
    x: Any,
    values: Any,
    bitmap: Any,
    row_start: Any | None,
    weight_scale: Any | None,
    bias: Any | None,
    activation: str,
    out_dtype: Any | None,
    out: Any | None,
) -> Any: ...
def block_linear(
    x: Any,
    values: Any,
    crow: Any,
    col: Any,
    N: int,
    weight_scale: Any | None,
    bias: Any | None,
    activation: str,
    out_dtype: Any | None,
    out: Any | None,
) -> Any: ...
def abi_version() -> int: ...
def get_isa() -> str: ...
def set_isa(name: str) -> None: ...
def available_isas() -> list[str]: ...
def get_num_threads() -> int: ...
def set_num_threads(count: int) -> None: ...
