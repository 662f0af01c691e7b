"""silu_mul_quantize_int8's Triton kernel, interpreted, against the reference: the same bits everywhere.

Run by test_triton_silu_mul_quantize_int8.py, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from triton_interpret import mend_interpreter, same, to_array

from trimtab import kernels
from trimtab.kernels.silu_mul_quantize_int8 import silu_mul_quantize_int8
from trimtab.reference.silu_mul_quantize_int8 import silu_mul_quantize_int8 as reference

mend_interpreter()
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, for 127 / 0

DTYPES = ["float32", "bfloat16", "float16"]
SHAPES = [(0, 5), (3, 0), (1, 1), (5, 64), (17, 67), (2, 1023), (1, 4097)]


def check(gate: torch.Tensor, up: torch.Tensor) -> None:
    q, scale = silu_mul_quantize_int8(gate, up)
    want_q, want_scale = reference(to_array(gate), to_array(up))
    assert np.array_equal(q.numpy(), want_q)
    assert same(scale, want_scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_shapes(shape: tuple[int, int], dtype: str) -> None:
    torch.manual_seed(shape[1])
    gate, up = ((torch.randn(shape) * 3).to(getattr(torch, dtype)) for _ in range(2))
    check(gate, up)


def test_awkward_rows() -> None:
    gate = torch.randn(6, 40) * 50
    gate[0], gate[1, 3], gate[2, 0] = 0, float("nan"), float("inf")
    gate[3] = float("-inf")
    gate[4] *= 1e-40
    check(gate, torch.randn(6, 40))


def test_strides() -> None:
    gate, up = torch.randn(64, 96), torch.randn(96, 64)
    check(gate, up.t())
    check(gate[::3, 1:50], up.t()[::3, 1:50])


def test_available() -> None:
    assert kernels.load("silu_mul_quantize_int8") is silu_mul_quantize_int8


def test_refusals() -> None:
    with pytest.raises(
        ValueError, match=r"expected up float32 \(3, 4\) on cpu, got float32 \(3, 3\)"
    ):
        silu_mul_quantize_int8(torch.ones(3, 4), torch.ones(3, 3))
