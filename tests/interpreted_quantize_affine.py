"""quantize_affine's Triton kernel, interpreted, against the reference: the same bits everywhere.

Run by test_triton_quantize_affine.py, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from triton_interpret import from_bits, mend_interpreter, same, to_array

from trimtab import kernels
from trimtab.kernels import tuning
from trimtab.kernels.quantize_affine import quantize_affine
from trimtab.reference.quantize_affine import quantize_affine as reference

mend_interpreter()
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, for 255 / 0

DTYPES = ["float32", "bfloat16", "float16"]
# (M, K), group size
SHAPES = [
    ((0, 5), None),
    ((3, 0), None),
    ((1, 1), None),
    ((5, 31), None),
    ((3, 97), 13),
    ((2, 257), 64),
    ((7, 40), 1),
    ((2, 4097), None),
]
NAN, INF, ONE, TINY, MAX, SIGN = 0x7FC00000, 0x7F800000, 0x3F800000, 1, 0x7F7FFFFF, 0x80000000
ROWS = {
    "zeros": [0, SIGN, 0, 0],
    "nan": [ONE, NAN, ONE, 0],
    "minus_inf": [ONE, SIGN | INF, 0, 0],
    "constant": [ONE, ONE, ONE, ONE],
    "negative_constant": [SIGN | ONE] * 4,
    "range_without_reciprocal": [TINY, SIGN | TINY, 0x00800000, 0],
    "smallest_range_with_reciprocal": [0x037F0001, 0, 0, TINY],
    "range_overflows": [MAX, SIGN | MAX, ONE, SIGN | 0x7E800000],
    "ends_both_round_up": [0x42FF0000, SIGN | 0x42FF0000, ONE, 0],
}


def check(x: torch.Tensor, bits: int = 8, group_size: int | None = None, **options: object) -> None:
    q, scale, zero = quantize_affine(x, bits, group_size, **options)
    want_q, want_scale, want_zero = reference(to_array(x), bits, group_size)
    assert np.array_equal(q.numpy(), want_q)
    assert same(scale, want_scale)
    assert np.array_equal(zero.numpy(), want_zero)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "group_size"), SHAPES, ids=lambda v: str(v).replace(" ", ""))
def test_shapes(shape: tuple[int, int], group_size: int | None, dtype: str) -> None:
    torch.manual_seed(shape[1])
    for bits in (2, 5, 8):
        check((torch.randn(shape) * 3).to(getattr(torch, dtype)), bits, group_size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_awkward_rows(row: str, dtype: str) -> None:
    x = from_bits(ROWS[row]).to(getattr(torch, dtype))
    others = torch.randn(2, 4).to(x.dtype)
    for bits in (2, 8):
        check(torch.stack([others[0], x, others[1]]), bits)
        check(torch.cat([others[0], x, others[1]])[None], bits, 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype: str) -> None:
    base = torch.randn(64, 96).to(getattr(torch, dtype))
    for x in (base[:, 3:50], base[::3, ::2], base.t(), base[:1].expand(5, 96)):
        check(x, 8, 20)


CONFIGS = {row.config for rows in tuning.QUANTIZE_INT8.values() for row in rows}


@pytest.mark.parametrize("config", sorted(CONFIGS), ids=str)
def test_every_config(config: tuning.QuantizeConfig) -> None:
    check(torch.randn(19, 4100), 8, 700, config=config)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"quantize_affine: expected x .* of rank 2"):
        quantize_affine(torch.ones(3))
    with pytest.raises(ValueError, match=r"quantize_affine: expected bits in 2\.\.8, got 9"):
        quantize_affine(torch.ones(3, 3), 9)
    with pytest.raises(ValueError, match="expected group_size >= 1 or None, got 0"):
        quantize_affine(torch.ones(3, 3), 8, 0)


def test_available() -> None:
    assert kernels.load("quantize_affine") is quantize_affine
