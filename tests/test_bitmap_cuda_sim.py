"""bitmap_linear's CUDA kernel in the simulator: float64 and int8_linear's bits, corrupt weights, bad input."""

import cases
import cuda_sim
import numpy as np
import pytest
import torch

from trimtab import ops
from trimtab.reference import bitmap_linear as reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# (M, N, K, share kept): no rows, columns or words; a word and one more; several turns and shares of a warp;
# one and two tiles of weight rows, every number of tokens' tiles.
SHAPES = [
    (0, 5, 8, 0.5),
    (3, 0, 7, 0.5),
    (2, 3, 0, 0.5),
    (1, 1, 1, 1.0),
    (1, 33, 70, 0.0),
    (8, 17, 64, 0.5),
    (5, 16, 2177, 0.1),
    (16, 49, 321, 0.9),
    (17, 31, 700, 0.3),
    (32, 33, 136, 1.0),
]


def sparse(N: int, K: int, kept: float, generator: torch.Generator) -> torch.Tensor:
    """A weight with that share kept, its first row empty and its last one whole where there is room."""
    weight = torch.randn(N, K, generator=generator)
    weight[torch.rand(N, K, generator=generator) >= kept] = 0
    if N > 2 and 0 < kept < 1:
        weight[0], weight[-1] = 0, torch.randn(K, generator=generator)
    return weight


def assert_close(got: torch.Tensor, x: torch.Tensor, parts) -> None:
    """NUMERICS.md section 7, row by row of x."""
    want = reference.float64_product(*map(cases.to_numpy, (x, parts[0], parts[1])))
    bound = 2 * max(x.shape[1], 1) ** 0.5 * 2.0**-24 + torch.finfo(got.dtype).eps / 2
    error = np.linalg.norm(got.double().numpy() - want, axis=1)
    assert (error <= bound * np.linalg.norm(want, axis=1)).all()


@pytest.mark.parametrize("shape", SHAPES, ids=cases.ident)
@pytest.mark.parametrize("dtype", FLOATS, ids=cases.ident)
def test_float(dtype, shape, generator) -> None:
    M, N, K, kept = shape
    x = torch.randn(M, K, generator=generator).to(dtype)
    parts = ops.bitmap_pack(sparse(N, K, kept, generator).to(dtype))
    got = cuda_sim.Simulator(seed=1).bitmap_linear(x, *parts)
    assert got.shape == (M, N) and got.dtype == dtype
    assert_close(got, x, parts)
    # The order of a fragment's sum is the device's (here the seed's); that of everything else is fixed.
    again = cuda_sim.Simulator(arch=90, seed=1, policy="late").bitmap_linear(x, *parts)
    cases.assert_same_bits(again, got)


@pytest.mark.parametrize("shape", SHAPES, ids=cases.ident)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.ident)
def test_int8_has_the_bits_of_the_cpu(dtype, shape, generator) -> None:
    M, N, K, kept = shape
    x = cases.awkward_rows(M, K, dtype, generator)
    weight = sparse(N, K, kept, generator)
    codes, scale = ops.quantize_int8(weight)
    parts = ops.bitmap_pack(codes, weight != 0)  # some codes are zero and yet kept
    bias = cases.awkward_bias(N, generator).to(dtype)
    got = cuda_sim.Simulator(seed=2).bitmap_linear(x, *parts, scale, bias, 4)
    cases.assert_same_bits(got, ops.bitmap_linear(x, *parts, scale, bias, "silu"))


@pytest.mark.parametrize("dtype", FLOATS, ids=cases.ident)
def test_epilogue_and_strides(dtype, generator) -> None:
    """Bias and activation as on the CPU; rows of x at any address, expanded, of any rank."""
    parts = ops.bitmap_pack(sparse(20, 72, 0.4, generator).to(dtype))
    bias = torch.randn(20, generator=generator)
    wide = torch.randn(2, 9, 80, generator=generator).to(dtype)
    for x in (wide[..., 3:75], wide[..., 8:], wide[:, :1, 8:].expand(2, 3, 72)):
        got = cuda_sim.Simulator(seed=3).bitmap_linear(x, *parts, None, bias, 2)
        want = ops.bitmap_linear(x, *parts, None, bias, "gelu")
        assert got.shape == (*x.shape[:-1], 20)
        eps = torch.finfo(dtype).eps
        assert (got.double() - want.double()).norm() <= (2e-6 + 2 * eps) * want.double().norm()
        copied = cuda_sim.Simulator(seed=3).bitmap_linear(x.clone(), *parts, None, bias, 2)
        cases.assert_same_bits(got, copied)


@pytest.mark.parametrize("M", [3, 20])
@pytest.mark.parametrize("dtype", FLOATS, ids=cases.ident)
def test_pruned_weights_meet_no_inf(M, dtype, generator) -> None:
    """0 * Inf is not evaluated; a kept weight carries it. Other rows of x keep their bits."""
    parts = ops.bitmap_pack(sparse(40, 200, 0.5, generator).to(dtype))
    x = torch.randn(M, 200, generator=generator).to(dtype)
    clean = cuda_sim.Simulator(seed=4).bitmap_linear(x, *parts)
    x[2, 70], x[1, 7] = float("inf"), float("nan")
    got = cuda_sim.Simulator(seed=4).bitmap_linear(x, *parts)
    keeps = ops.bitmap_unpack(*parts[:2], 200) != 0
    assert torch.equal(~got[2].isfinite(), keeps[:, 70])
    assert torch.equal(got[1].isnan(), keeps[:, 7])
    assert torch.equal(got[2].isposinf(), ops.bitmap_unpack(*parts[:2], 200)[:, 70] > 0)
    others = [m for m in range(M) if m not in (1, 2)]
    assert_close(got[others], x[others], parts)
    assert_close(clean[others], x[others], parts)


def test_inf_in_the_second_turn_of_a_warp(generator) -> None:
    parts = ops.bitmap_pack(sparse(20, 2300, 0.3, generator).bfloat16())
    x = torch.randn(9, 2300, generator=generator).bfloat16()
    x[4, 100] = float("inf")
    for policy in ("late", "random"):
        got = cuda_sim.Simulator(seed=7, policy=policy).bitmap_linear(x, *parts)
        assert torch.equal(~got[4].isfinite(), ops.bitmap_unpack(*parts[:2], 2300)[:, 100] != 0)
        others = [m for m in range(9) if m != 4]
        assert_close(got[others], x[others], parts)


def test_corrupt_weights_read_nothing_else(generator) -> None:
    """Bits that disagree with row_start, positions outside, bits past K: any result, no fault."""
    x = torch.randn(4, 100, generator=generator).bfloat16()
    values, bitmap, row_start = ops.bitmap_pack(sparse(20, 100, 0.3, generator).bfloat16())
    sim = cuda_sim.Simulator(seed=5)
    full = torch.full_like(bitmap, 255)
    for start in (row_start, row_start + 50, row_start - 50, row_start * 2**40, -row_start - 1):
        for bits in (bitmap, full):
            assert sim.bitmap_linear(x, values, bits, start).shape == (4, 20)
    assert sim.bitmap_linear(x, values[:0], full, row_start).shape == (4, 20)
    assert sim.bitmap_linear(x, values[:13], bitmap, row_start).shape == (4, 20)


BAD_CALLS = {
    "rows": ({"x": torch.zeros(33, 64)}, "expected at most 32 rows on a CUDA device, got M=33"),
    "dtype": ({"x": torch.zeros(2, 64).bfloat16()}, "expected x of .* and values of its dtype"),
    "scale": ({"weight_scale": torch.ones(16)}, "b_scale with int8 values alone"),
    "alignment": ({"values": torch.zeros(1025)[1:]}, "expected values aligned to 16 bytes"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input(case) -> None:
    change, message = BAD_CALLS[case]
    values, bitmap, row_start = ops.bitmap_pack(torch.ones(16, 64))
    call = {"x": torch.zeros(2, 64), "values": values, "bitmap": bitmap, "row_start": row_start}
    with pytest.raises(RuntimeError, match=message):
        cuda_sim.Simulator().bitmap_linear(**call | change)


def test_layer_in_the_simulator(generator) -> None:
    """The op as a layer calls it, gradients included, with the kernel as its forward."""
    weight = sparse(24, 90, 0.4, generator)
    values, bitmap, row_start = ops.bitmap_pack(weight)
    x = torch.randn(2, 3, 90, generator=generator).requires_grad_()
    values.requires_grad_()
    with cuda_sim.as_cpu(cuda_sim.Simulator(seed=6)):
        out = ops.bitmap_linear(x, values, bitmap, row_start, activation="relu")
        out.square().sum().backward()
    x64 = x.detach().double().requires_grad_()
    w64 = weight.double().requires_grad_()
    (x64 @ w64.t()).relu().square().sum().backward()
    want = w64.grad[weight != 0]
    assert (x.grad.double() - x64.grad).norm() <= 1e-5 * x64.grad.norm()
    assert (values.grad.double() - want).norm() <= 1e-5 * want.norm()
