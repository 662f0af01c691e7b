"""rms_norm_quantize_int8's Triton kernel, interpreted, against the reference: the same bits everywhere.

Run by test_triton_rms_norm_quantize_int8.py, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from triton_interpret import mend_interpreter, same, to_array

from trimtab import kernels
from trimtab.kernels.rms_norm_quantize_int8 import rms_norm_quantize_int8
from trimtab.reference.rms_norm_quantize_int8 import rms_norm_quantize_int8 as reference

mend_interpreter()
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, for 127 / 0

DTYPES = ["float32", "bfloat16", "float16"]
SHAPES = [(0, 5), (3, 0), (1, 1), (5, 64), (7, 67), (2, 1023), (2, 2049), (1, 9001)]


def check(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> None:
    q, scale = rms_norm_quantize_int8(x, weight, eps)
    want_q, want_scale = reference(to_array(x), to_array(weight), eps)
    assert np.array_equal(q.numpy(), want_q)
    assert same(scale, want_scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_shapes(shape: tuple[int, int], dtype: str) -> None:
    torch.manual_seed(shape[1])
    x = (torch.randn(shape) * 3).to(getattr(torch, dtype))
    weight = torch.rand(shape[1]) + 0.5
    check(x, weight)
    check(x, weight.to(x.dtype), 0.0)


def test_awkward_rows() -> None:
    x = torch.randn(6, 40)
    x[0], x[1, 3], x[2, 0] = 0, float("nan"), float("inf")
    x[3] *= 1e30  # the squares overflow
    x[4] *= 1e-40
    for eps in (0.0, 1e-6):
        check(x, torch.randn(40), eps)


def test_strides() -> None:
    x = torch.randn(64, 96)
    check(x.t(), torch.randn(128)[::2])
    check(x[::3, 1:50], torch.randn(50)[1:])


def test_available() -> None:
    assert kernels.load("rms_norm_quantize_int8") is rms_norm_quantize_int8


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"expected weight .* \(4,\) on cpu, got float32 \(3,\)"):
        rms_norm_quantize_int8(torch.ones(3, 4), torch.ones(3))
