"""sparse24_compress: every instruction set and the CUDA kernel against the NumPy reference, bit for bit."""

import ctypes

import cases
import cuda_sim
import numpy as np
import pytest
import sim_sparse
import torch

from trimtab import ops
from trimtab.ops.sparse24_compress import compress_in_torch
from trimtab.ops.sparse24_linear import sparse24_metadata
from trimtab.reference.sparse24_compress import sparse24_compress as reference

DTYPES = [*cases.DTYPES, torch.int8]
# None, one, ends of groups, vectors (8 to 64) and tiles (32 to 128).
SHAPES = [(0, 8), (3, 0), (4, 1), (2, 5), (3, 8), (7, 12), (6, 67), (3, 130), (130, 140), (65, 257)]


def random_weight(N: int, K: int, dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    """Few different magnitudes, so that most groups have ties; zeros of both signs; Inf."""
    weight = torch.randint(-3, 4, (N, K), generator=g).float()
    weight[torch.rand(N, K, generator=g) < 0.2] *= -0.0
    if dtype == torch.int8:
        return torch.where(weight == 3, -128, weight * 42 + 1).to(dtype)
    weight[torch.rand(N, K, generator=g) < 0.1] = float("-inf")
    small = torch.finfo(dtype).smallest_normal / 4  # subnormal
    return torch.where(weight == 1, small, weight).to(dtype)


def expected(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    bits = weight.contiguous().view(
        {4: torch.int32, 2: torch.int16, 1: torch.int8}[weight.element_size()]
    )
    values, indices = reference(weight.double().abs().numpy(), bits.numpy())
    return torch.from_numpy(values).view(weight.dtype), torch.from_numpy(indices)


def check(got: tuple[torch.Tensor, torch.Tensor], weight: torch.Tensor) -> None:
    values, indices = expected(weight)
    cases.assert_same_bits(got[0], values)
    assert torch.equal(got[1], indices)


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ident)
def test_on_a_cpu(dtype, isa, generator) -> None:
    for N, K in SHAPES:
        weight = random_weight(N, K, dtype, generator)
        check(ops.sparse24_compress(weight), weight)
    wide = random_weight(9, 300, dtype, generator)
    for weight in (wide[:, 3:201], wide[::2], wide.t(), wide[:1].expand(5, 300)):
        check(ops.sparse24_compress(weight), weight)
    check(compress_in_torch(wide), wide)


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ident)
def test_all_orders_of_a_group(dtype, isa) -> None:
    """Four magnitudes in every order and every pattern of ties, in each group of a vector's length."""
    group = torch.cartesian_prod(*[torch.tensor([0, 1, 2, 3])] * 4)  # [256, 4]
    signs = torch.tensor([1, -1, 1, -1])
    weight = (group * signs).reshape(8, 128).to(dtype)
    check(ops.sparse24_compress(weight), weight)
    # Neighbours: the next number of the type is larger, if by the last bit.
    if dtype == torch.int8:
        weight = ((100 + group) * signs).reshape(8, 128).to(dtype)
    else:
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        one = torch.ones(1, dtype=dtype).view(bits)
        weight = (group.to(bits) + one).view(dtype).mul(signs).reshape(8, 128)
    check(ops.sparse24_compress(weight), weight)


def test_few_nonzeros_keep_the_lowest_zeros() -> None:
    weight = torch.tensor([[0, 0, 5.0, 0, -0.0, 0, 0, 0, 1, 2, 2, -2]])
    values, indices = ops.sparse24_compress(weight)
    assert values.tolist() == [[0, 5, 0, 0, 2, 2]]
    assert indices.tolist() == [[(0 | 2 << 2) | (0 | 1 << 2) << 4, 1 | 2 << 2]]
    assert torch.equal(
        ops.sparse24_unpack(values, indices, 12)[0, 8:], torch.tensor([0, 2.0, 2, 0])
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ident)
@pytest.mark.parametrize("arch", [80, 90])
def test_on_the_simt_machine(arch, dtype, generator) -> None:
    """Both ways at once, and one way; with metadata, and zeros behind the values."""
    sim = cuda_sim.Simulator(arch=arch, seed=arch)
    for N, K in ((1, 4), (5, 7), (66, 40), (17, 130), (140, 260)):
        weight = random_weight(N, K, dtype, generator)
        got = sim.sparse24_compress(weight, both=True)
        for part, want in zip((got[:3], got[3:]), (weight, weight.t()), strict=True):
            values, indices, metadata = part
            kept = -(-want.shape[1] // 4) * 2
            check((values[:, :kept].contiguous(), indices), want)
            assert not values[:, kept:].any()
            if metadata is not None:
                assert torch.equal(metadata, sparse24_metadata(indices, want.shape[1], dtype))
        for one, other in zip(sim.sparse24_compress(weight), got, strict=False):
            assert one is None or torch.equal(one.nan_to_num(), other.nan_to_num())
    weight = random_weight(40, 300, dtype, generator)
    for part in (weight[:, 3:259], weight[:, 16:272], weight[1:, :64]):  # rows at any address
        got = sim.sparse24_compress(part)
        check((got[0][:, : part.shape[1] // 2].contiguous(), got[1]), part)


def test_on_the_simt_machine_a_nan_stays() -> None:
    weight = torch.ones(3, 8, dtype=torch.bfloat16)
    weight[1, 6] = float("nan")
    weight[1, 5] = weight[1, 4] = float("inf")
    values, *_ = cuda_sim.Simulator().sparse24_compress(weight)
    assert values.isnan().nonzero().tolist() == [[1, 3]]
    assert compress_in_torch(weight)[0].isnan().nonzero().tolist() == [[1, 3]]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=cases.ident)
def test_pack(dtype, generator) -> None:
    weight = random_weight(20, 90, dtype, generator)
    both = ops.sparse24_pack_both(weight)
    for want, values, metadata in ((weight, *both[:2]), (weight.t(), *both[2:])):
        kept, indices = expected(want)
        cases.assert_same_bits(values.contiguous(), kept)
        assert values.stride(0) * values.element_size() % 16 == 0
        assert torch.equal(metadata, sparse24_metadata(indices, want.shape[1], dtype))
    for got, want in zip(ops.sparse24_pack(weight), both, strict=False):
        assert torch.equal(got.nan_to_num(), want.nan_to_num())


def test_opcheck(generator) -> None:
    weight = random_weight(5, 13, torch.bfloat16, generator)
    for op in ("sparse24_compress", "sparse24_pack", "sparse24_pack_both"):
        torch.library.opcheck(getattr(torch.ops.trimtab, op).default, (weight,))


def test_any_number_of_threads(generator) -> None:
    weight = torch.randn(3000, 72, generator=generator)
    results = []
    for count in (1, 2, 3):
        with cases.threads(count):
            results.append(ops.sparse24_compress(weight))
    for values, indices in results:
        assert torch.equal(values, results[0][0]) and torch.equal(indices, results[0][1])


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ident)
def test_a_nan_is_named(dtype, isa) -> None:
    for at in ([1, 2], [0, 64], [2, 130]):  # in a vector, and after the last one
        weight = torch.zeros(3, 131, dtype=dtype)
        weight[at[0], at[1]] = float("nan")
        weight[2, 130] = -float("nan")
        message = (
            rf"sparse24_compress: expected a weight without NaN, got one at \[{at[0]}, {at[1]}\]"
        )
        with pytest.raises(RuntimeError, match=message):
            ops.sparse24_compress(weight)


def test_bad_input() -> None:
    message = r"sparse24_compress: expected weight \[N, K\] of float32, .* got \[4\] float32"
    for weight in (torch.zeros(4), torch.zeros(4, device="meta")):
        with pytest.raises(RuntimeError, match=message):
            ops.sparse24_compress(weight)
    with pytest.raises(RuntimeError, match=r"got \[2, 2\] float64"):
        ops.sparse24_compress(torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="sparse24_compress: weight requires grad"):
        ops.sparse24_compress(torch.zeros(2, 2, requires_grad=True))
    with pytest.raises(RuntimeError, match="sparse24_pack: expected weight .* got .* float32"):
        ops.sparse24_pack(torch.zeros(2, 2))
    sim, values = cuda_sim.Simulator(), np.zeros(1)
    weight = torch.zeros(4, 8)
    out = sim_sparse.Sparse24Compressed(values.ctypes.data, 8, None, None)
    arguments = (weight, weight.dtype, 8, 4, 8, ctypes.byref(out), None, None)
    with pytest.raises(RuntimeError, match="values in rows of at least 16 bytes, a multiple of 16"):
        sim.call("tt_sparse24_compress_cuda", *arguments, reads=[weight], writes=[])
