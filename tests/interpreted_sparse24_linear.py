"""sparse24_linear's Triton kernel, interpreted, against the NumPy reference.

Run by test_triton_sparse24_linear.py, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import pytest
import torch
from triton_interpret import mend_interpreter, same, to_array

from trimtab import ops
from trimtab.kernels.sparse24_linear import sparse24_linear
from trimtab.ops.sparse24_linear import sparse24_metadata, sparse24_rows
from trimtab.reference.int8_linear import int8_linear as reference

mend_interpreter()

SHAPES = [(1, 1, 4), (5, 17, 70), (16, 33, 130), (40, 20, 257), (70, 130, 64)]


def weight_of(N: int, K: int, dtype: torch.dtype):
    """(values, metadata, the pruned weight)."""
    dense = (40 * torch.randn(N, K)).clamp(-127, 127).to(dtype)
    values, indices = ops.sparse24_compress(dense)
    metadata = sparse24_metadata(indices, K, dtype)
    return sparse24_rows(values), metadata, ops.sparse24_unpack(values, indices, K)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float(shape, dtype) -> None:
    M, N, K = shape
    torch.manual_seed(K)
    values, metadata, weight = weight_of(N, K, dtype)
    x, bias = torch.randn(2 * M, K).to(dtype)[::2], torch.randn(N)
    got = sparse24_linear(x, values, metadata, None, bias).double()
    want = x.double() @ weight.double().t() + bias.double()
    limit = 2 * K**0.5 * 2.0**-24 + (2.0**-8 if dtype == torch.bfloat16 else 2.0**-11)
    assert (got - want).norm() <= limit * want.norm()


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_is_exact(shape, x_dtype) -> None:
    M, N, K = shape
    torch.manual_seed(K)
    values, metadata, weight = weight_of(N, K, torch.int8)
    x, scale, bias = torch.randn(M, K).to(x_dtype), torch.rand(N) + 0.1, torch.randn(N)
    got = sparse24_linear(x, values, metadata, scale, bias, "gelu")
    name = str(x_dtype).removeprefix("torch.")
    arrays = (to_array(t) for t in (x, weight, scale, bias))
    assert same(got, reference(*arrays, "gelu", name))


def test_bad_input() -> None:
    values, metadata, _ = weight_of(16, 64, torch.bfloat16)
    x = torch.randn(3, 64).bfloat16()
    assert sparse24_linear(x[:0], values, metadata).shape == (0, 16)
    with pytest.raises(ValueError, match="sparse24_linear: expected values"):
        sparse24_linear(x[:, :60], values, metadata)
    with pytest.raises(ValueError, match="sparse24_linear: expected metadata"):
        sparse24_linear(x, values, metadata[:, :0])
    with pytest.raises(ValueError, match="sparse24_linear: expected x bfloat16 of rank 2"):
        sparse24_linear(x.float(), values, metadata)
