"""The references' bfloat16 and float16 against torch's: the oracle's own rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trimtab.reference.dtypes import dtype_name, round_to, to_float32


def floats() -> np.ndarray:
    """Float32 of all sizes, and those half way between two bfloat16 or float16, and beside those."""
    bits = np.random.default_rng(0).integers(0, 2**32, 2**18, dtype=np.uint32)
    halves = [(bits & ~np.uint32(2 * half - 1)) + np.uint32(half) for half in (2**15, 2**12)]
    near = [h + np.uint32(d) for h in halves for d in (2**32 - 1, 0, 1)]
    return np.concatenate([bits, *near]).view(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rounds_as_torch_does(dtype: str) -> None:
    x = floats()
    got = round_to(x, dtype)
    assert dtype_name(got) == dtype
    want = torch.from_numpy(x).to(getattr(torch, dtype))
    assert torch.equal(
        torch.from_numpy(to_float32(got)).nan_to_num(7.0), want.float().nan_to_num(7.0)
    )
    signs = np.signbit(to_float32(got)) == np.signbit(want.float().numpy())
    assert signs[~np.isnan(x)].all()


def test_every_bfloat16_comes_back() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    nan = np.isnan(to_float32(bits))
    assert nan.sum() == 2 * 127
    assert np.array_equal(round_to(to_float32(bits), "bfloat16")[~nan], bits[~nan])
    assert (round_to(to_float32(bits), "bfloat16")[nan] == 0x7FC0).all()


def test_refusals() -> None:
    with pytest.raises(TypeError, match="expected a float32, float16 or uint16"):
        to_float32(np.zeros(3))
    with pytest.raises(TypeError, match="expected bfloat16, got an array of float32"):
        to_float32(np.zeros(3, np.float32), "bfloat16")
    with pytest.raises(ValueError, match="expected one of"):
        round_to(np.zeros(3, np.float32), "float64")
