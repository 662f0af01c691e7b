"""The CUDA implementation against the CPU: the same bits. Runs where there is a GPU (`make gpu`)."""

from __future__ import annotations

import cases
import pytest
import torch

from trimtab import ops

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("shape", cases.SHAPES, ids=cases.ident)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ident)
@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
def test_same_bits_as_the_cpu(shape, dtype, activation: str, generator) -> None:
    M, N, K = shape
    x = cases.awkward_rows(M, K, dtype, generator)
    weight, scale = ops.quantize_int8(torch.randn(N, K, generator=generator))
    bias = torch.randn(N, generator=generator)
    on_gpu = [t.cuda() for t in (x, weight, scale, bias)]
    want = ops.int8_linear(x, weight, scale, bias, activation)
    cases.assert_same_bits(ops.int8_linear(*on_gpu, activation), want)
    out = torch.full((M, N), float("nan"), dtype=dtype, device="cuda")
    ops.int8_linear(*on_gpu, activation, out=out)
    cases.assert_same_bits(out, want)


def test_quantize_same_bits_as_the_cpu(generator) -> None:
    for dtype in cases.DTYPES:
        x = cases.awkward_rows(300, 1001, dtype, generator)
        for got, want in zip(ops.quantize_int8(x.cuda()), ops.quantize_int8(x), strict=True):
            cases.assert_same_bits(got, want)
