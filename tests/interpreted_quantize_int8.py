"""quantize_int8's Triton kernel, interpreted, against the reference: the same bits everywhere.

Run by test_triton_quantize_int8.py, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from triton_interpret import from_bits, mend_interpreter, same, to_array

from trimtab import kernels
from trimtab.kernels import tuning
from trimtab.kernels.quantize_int8 import quantize_int8
from trimtab.reference.quantize_int8 import quantize_int8 as reference

mend_interpreter()
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, for 127 / 0

DTYPES = ["float32", "bfloat16", "float16"]
SHAPES = [(0, 5), (3, 0), (1, 1), (2, 31), (5, 64), (17, 67), (3, 257), (2, 1023), (1, 4097)]

# float32 bits of rows that are awkward. The narrower dtypes take what they round to.
NAN, INF, ONE, TINY = 0x7FC00000, 0x7F800000, 0x3F800000, 0x00000001
ROWS = {
    "zeros": [0, 0x80000000, 0, 0],
    "nan": [ONE, NAN, ONE, ONE],
    "negative_nan_with_payload": [ONE, 0xFFC12345, ONE, ONE],
    "inf": [ONE, INF, ONE, 0],
    "minus_inf_and_nan": [0xFF800000, NAN, ONE, 0],
    "smallest_subnormal": [TINY, 0x80000001, 0, 0],
    # 127 * 2^-128: its reciprocal times 127 is 2^128, one step past the largest float.
    "largest_without_reciprocal": [0x02FE0000, 0, 0, TINY],
    "smallest_with_reciprocal": [0x02FE0001, 0x827E0000, 0, TINY],
    "largest_finite": [0x7F7FFFFF, 0xFF7FFFFF, 0x7F000000, ONE],
    "subnormal_elements": [0x03800000, 0x007FFFFF, 0x807FFFFF, TINY],
}


def check(x: torch.Tensor, **arguments: object) -> None:
    q, scale = quantize_int8(x, **arguments)
    want_q, want_scale = reference(to_array(x))
    assert np.array_equal(q.numpy(), want_q)
    assert same(scale, want_scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_shapes(shape: tuple[int, int], dtype: str) -> None:
    torch.manual_seed(shape[1])
    check((torch.randn(shape) * 3).to(getattr(torch, dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_awkward_rows(row: str, dtype: str) -> None:
    x = from_bits(ROWS[row]).to(getattr(torch, dtype))
    others = torch.randn(2, 4).to(x.dtype)
    check(torch.stack([others[0], x, others[1]]))


def test_every_bfloat16() -> None:
    """One row a value, beside 1.0; and one row of all finite values."""
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    check(torch.stack([values, torch.ones_like(values)], dim=1), config=BIG)
    check(values[values.isfinite()][None, :])


def test_halves_round_to_even() -> None:
    """absmax 127 makes r = 1, so x itself is rounded: 0.5 -> 0, 1.5 -> 2, 2.5 -> 2."""
    x = torch.arange(-127, 127.5, 0.5)[None, :]
    q, _ = quantize_int8(x)
    assert torch.equal(q, x.round().to(torch.int8))
    check(x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype: str) -> None:
    """An offset, every other element, a transpose, one row repeated; q and scale too."""
    base = torch.randn(64, 96).to(getattr(torch, dtype))
    for x in (base[:, 3:50], base[::3, ::2], base.t(), base[:1].expand(5, 96)):
        check(x)
        q = torch.full((x.shape[1], x.shape[0]), 55, dtype=torch.int8).t()
        scale = torch.full((2 * x.shape[0],), 55.0)[::2]
        check(x, q=q, scale=scale)


def test_wider_q_is_filled_with_zeros() -> None:
    x = torch.randn(5, 37)
    q = torch.full((5, 64), 55, dtype=torch.int8)
    _, scale = quantize_int8(x, q[:, :48])
    want_q, want_scale = reference(x.numpy())
    assert np.array_equal(q[:, :37].numpy(), want_q) and same(scale, want_scale)
    assert (q[:, 37:48] == 0).all() and (q[:, 48:] == 55).all()


CONFIGS = {row.config for rows in tuning.QUANTIZE_INT8.values() for row in rows}
BIG = tuning.QuantizeConfig(BLOCK_M=4096, BLOCK_K=16, num_warps=4)


@pytest.mark.parametrize("config", sorted(CONFIGS), ids=str)
def test_every_config(config: tuning.QuantizeConfig) -> None:
    check(torch.randn(19, 4100), config=config)


def test_refusals() -> None:
    with pytest.raises(
        ValueError, match=r"quantize_int8: expected x .* of rank 2, got float32 \(3,\)"
    ):
        quantize_int8(torch.ones(3))
    with pytest.raises(ValueError, match=r"expected x float32 or bfloat16 or float16 .* got int64"):
        quantize_int8(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected q int8 \(3, 4\) on cpu, got int8 \(3, 3\)"):
        quantize_int8(torch.ones(3, 4), torch.empty(3, 3, dtype=torch.int8))
    with pytest.raises(ValueError, match="expected scale float32"):
        quantize_int8(torch.ones(3, 4), scale=torch.empty(3, dtype=torch.float64))


def test_available() -> None:
    availability = kernels.is_available()
    assert availability and "interpreted" in availability.reason
    assert kernels.load("quantize_int8") is quantize_int8
    with pytest.raises(ValueError, match=r"expected one of quantize_int8, .* got 'int9_mm'"):
        kernels.load("int9_mm")
