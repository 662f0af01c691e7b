"""What the tests of SparseLinear share: a layer of each format beside the dense one."""

from __future__ import annotations

import cases
import pytest
import torch
from sparse_cases import BLOCK, PATTERNS, pruned
from torch import Tensor, nn

from trimtab.nn import SparseLinear

FORMATS = [(pattern, int8) for pattern in PATTERNS for int8 in (False, True)]


def format_id(value: tuple) -> str:
    return value[0] + ("-int8" if value[1] else "")


each_format = pytest.mark.parametrize("form", FORMATS, ids=format_id)
each_pattern = pytest.mark.parametrize("pattern", PATTERNS)


def make(
    form: tuple[str, bool] = ("bitmap", False),
    K: int = 80,
    N: int = 52,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    activation: str = "none",
) -> tuple[nn.Linear, SparseLinear]:
    torch.manual_seed(0)
    dense = pruned(nn.Linear(K, N, bias=bias, dtype=dtype), form[0])
    options = {"pattern": form[0], "block": BLOCK, "int8": form[1]}
    return dense, SparseLinear.from_float(dense, activation, **options)


def inputs(K: int = 80, dtype: torch.dtype = torch.float32, rows: int = 5) -> Tensor:
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(1)).to(dtype)


def same(a: SparseLinear, b: SparseLinear, K: int = 80) -> None:
    x = inputs(K, a.dtype)
    with torch.no_grad():
        cases.assert_same_bits(a(x), b(x))


def blank(like: SparseLinear) -> SparseLinear:
    return SparseLinear(
        like.in_features, like.out_features, like.bias is not None, dtype=like.dtype,
        pattern=like.pattern, block=like.block, int8=like.int8,
    )  # fmt: skip
