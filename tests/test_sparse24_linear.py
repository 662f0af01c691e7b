"""2:4 weights on a CUDA device: the kernels in the simulator, the metadata, the op's checks."""

import cuda_sim
import numpy as np
import pytest
import torch

from trimtab import ops
from trimtab.ops.sparse24_compress import sparse24_mask
from trimtab.ops.sparse24_linear import sparse24_indices, sparse24_metadata, sparse24_rows
from trimtab.reference.bitmap_linear import float64_product
from trimtab.reference.int8_linear import int8_linear as reference_int8_linear
from trimtab.reference.sparse24_compress import sparse24_mask as unpack_mask
from trimtab.reference.sparse24_linear import sparse24_linear as reference

DTYPES = (torch.bfloat16, torch.float16, torch.int8)
# M, N, K: one tile and many, ends of tiles in every direction, K of one group and of odd length. From 33
# tokens on with rows on 16 bytes sm_90 has a kernel of its own.
SHAPES = [(1, 1, 4), (3, 17, 64), (9, 33, 100), (16, 64, 257), (70, 130, 192), (130, 40, 328)]
# Its tiles of 64, 128 and 256 tokens, alone and in pairs; more tiles than blocks, and stages than steps.
SM90_SHAPES = [(33, 5, 8), (64, 300, 136), (200, 260, 712), (300, 700, 72), (256, 1000, 136)]


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def random_weight(N: int, K: int, dtype: torch.dtype, g: torch.Generator):
    """(values [N, K4 / 2], indices): every pair of positions occurs."""
    groups = -(-K // 4)
    pairs = torch.tensor([a | b << 2 for a in range(4) for b in range(a + 1, 4)], dtype=torch.uint8)
    nibbles = torch.zeros(N, -(-groups // 2) * 2, dtype=torch.uint8)
    nibbles[:, :groups] = pairs[torch.randint(6, (N, groups), generator=g)]
    indices = nibbles[:, ::2] | nibbles[:, 1::2] << 4
    if dtype == torch.int8:
        values = torch.randint(-127, 128, (N, 2 * groups), generator=g).to(torch.int8)
    else:
        values = torch.randn(N, 2 * groups, generator=g).to(dtype)
    outside = torch.from_numpy(np.nonzero(unpack_mask(indices.numpy(), K))[1].reshape(N, -1) >= K)
    return values.masked_fill(outside, 0), indices


def as_numpy(t: torch.Tensor) -> np.ndarray:
    return t.contiguous().view(torch.uint16).numpy() if t.dtype == torch.bfloat16 else t.numpy()


def run(arch, seed, x, values, indices, scale=None, bias=None, activation=0):
    metadata = sparse24_metadata(indices, x.shape[-1], values.dtype)
    sim = cuda_sim.Simulator(arch=arch, seed=seed)
    return sim.sparse24_linear(x, sparse24_rows(values), metadata, scale, bias, activation)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_metadata_goes_there_and_back(shape, dtype, generator) -> None:
    _, N, K = shape
    values, indices = random_weight(N, K, dtype, generator)
    metadata = sparse24_metadata(indices, K, dtype)
    assert torch.equal(sparse24_indices(metadata, N, K, dtype), indices)
    mask = sparse24_mask(indices, K)
    np.testing.assert_array_equal(mask.numpy(), unpack_mask(indices.numpy(), K))
    assert int(mask.sum()) == values.numel()


def test_metadata_of_one_group() -> None:
    """Where the four bits of a group go, written out (PTX ISA, fragments of mma.sp)."""
    indices = torch.full((16, 8), 0x44, dtype=torch.uint8)  # positions 0 and 1 everywhere
    indices[9, 5] = 0x4E  # row 9, columns 40 to 43: positions 2 and 3
    even = torch.full((1, 1, 32), 0x44444444, dtype=torch.int32)
    bf16 = even.clone()
    bf16[0, 0, 4 * 1 + 2] = 0x4E444444 - (0 if 0x4E444444 < 2**31 else 2**32)
    # columns 32 to 47 are lane 2's of its quad, 40 the third group there, row 1 + 8 in the upper half
    assert torch.equal(sparse24_metadata(indices, 64, torch.bfloat16), bf16)
    int8 = even.clone()
    int8[0, 0, 4 * 1 + 2 + 1] = (
        0x44444E44  # columns 32 to 63: lanes 2 and 3; row 1 + 8: the odd one
    )
    assert torch.equal(sparse24_metadata(indices, 64, torch.int8), int8)


def strided(index: int, *parts: tuple[int, int]) -> int:
    """A CuTe layout at one index: (size, stride) pairs, the first size counting fastest."""
    place = 0
    for size, stride in parts:
        index, at = divmod(index, size)
        place += at * stride
    return place


# Thread of a warpgroup, and bit of its word -> place m + 64 k in a [64 x K] operand: a bit a column. Shapes
# and strides of ELayout_64x32 and ELayout_64x64 in CUTLASS, cute/atom/mma_traits_sm90_gmma_sparse.hpp.
CUTE_LAYOUTS = {
    torch.bfloat16: (((2, 1024), (2, 0), (8, 1), (4, 16)), ((16, 64), (2, 8)), 32),
    torch.int8: (((2, 8), (2, 2048), (8, 1), (4, 16)), ((32, 64),), 64),
}


@pytest.mark.parametrize("dtype", CUTE_LAYOUTS, ids=name)
def test_metadata_is_where_cutlass_puts_it(dtype, generator) -> None:
    threads, bits, width = CUTE_LAYOUTS[dtype]
    _, indices = random_weight(64, 64, dtype, generator)
    codes = np.stack([indices & 15, indices >> 4], -1).reshape(64, 16)
    words = sparse24_metadata(indices, 64, dtype).numpy().astype(np.uint32)
    for product in range(64 // width):  # selector `product`: lanes 2 product and 2 product + 1
        for thread in range(128):
            if width == 32 and thread % 4 // 2 != product:
                continue
            word = int(words[thread // 32, 0, thread % 32])
            for bit in range(0, 32, 4):
                k, m = divmod(strided(thread, *threads) + strided(bit, *bits), 64)
                assert word >> bit & 15 == codes[m, (product * width + k) // 4], (thread, bit)


@pytest.mark.parametrize("arch,shape", [(80, s) for s in SHAPES] + [(90, s) for s in SM90_SHAPES])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name)
def test_float_in_the_simulator(arch, shape, dtype, generator) -> None:
    M, N, K = shape
    values, indices = random_weight(N, K, dtype, generator)
    x = torch.randn(M, K, generator=generator).to(dtype)
    bias = torch.randn(N, generator=generator)
    got = run(arch, 1, x, values, indices, None, bias)
    if M < 99:  # the same sums in every run
        assert torch.equal(got, run(arch, 1, x, values, indices, None, bias))
    mask = torch.zeros(N, -(-K // 64) * 64, dtype=torch.bool)
    mask[:, :K] = sparse24_mask(indices, K)[:, :K]
    kept = torch.from_numpy(np.nonzero(unpack_mask(indices.numpy(), K))[1].reshape(N, -1) < K)
    bitmap = torch.from_numpy(np.packbits(mask.numpy(), axis=1, bitorder="little"))
    want = float64_product(as_numpy(x), as_numpy(values[kept]), bitmap.numpy()) + bias.numpy()
    # NUMERICS.md section 7: fp32 sums, then one rounding of the output
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    bound = 2 * K**0.5 * 2.0**-24 + rounding
    error = np.linalg.norm(got.double().numpy() - want) / max(np.linalg.norm(want), 1e-30)
    assert error <= bound


@pytest.mark.parametrize("arch,shape", [(80, s) for s in SHAPES] + [(90, s) for s in SM90_SHAPES])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=name)
def test_int8_in_the_simulator(arch, shape, x_dtype, generator) -> None:
    """The bits of int8_linear with the dense weight."""
    M, N, K = shape
    values, indices = random_weight(N, K, torch.int8, generator)
    x = torch.randn(M, K, generator=generator).to(x_dtype)
    scale, bias = torch.rand(N, generator=generator) + 0.1, torch.randn(N, generator=generator)
    got = run(arch, 2, x, values, indices, scale, bias, 4)
    mask = sparse24_mask(indices, K)
    weight = torch.zeros(mask.shape, dtype=torch.int8).masked_scatter(mask, values)[:, :K]
    want = reference_int8_linear(
        as_numpy(x), weight.numpy(), scale.numpy(), bias.numpy(), "silu", name(x_dtype)
    )
    np.testing.assert_array_equal(as_numpy(got), want)
    again = reference(
        as_numpy(x), values.numpy(), indices.numpy(), scale.numpy(), bias.numpy(), "silu"
    )
    np.testing.assert_array_equal(again, want)


def test_strided_and_unaligned_x(generator) -> None:
    values, indices = random_weight(40, 72, torch.bfloat16, generator)
    wide = torch.randn(2, 9, 80, generator=generator).to(torch.bfloat16)
    for x in (wide[..., 3:75], wide[..., 8:], wide[:, :1, 8:].expand(2, 3, 72)):
        got = run(80, 3, x, values, indices)
        assert got.shape == (*x.shape[:-1], 40)
        assert torch.equal(got, run(80, 3, x.clone(), values, indices))


def test_pruned_weights_meet_no_inf(generator) -> None:
    """0 * Inf is not evaluated; a kept weight carries it."""
    values, indices = random_weight(16, 64, torch.bfloat16, generator)
    x = torch.randn(8, 64, generator=generator).to(torch.bfloat16)
    x[3, 10] = float("inf")
    got = run(80, 4, x, values, indices)
    keeps = sparse24_mask(indices, 64)[:, 10]
    assert torch.equal(~got[3].isfinite(), keeps)
    assert got[[0, 1, 2, 4, 5, 6, 7]].isfinite().all()


def test_invalid_metadata_is_a_fault(generator) -> None:
    values, indices = random_weight(16, 64, torch.bfloat16, generator)
    metadata = sparse24_metadata(indices, 64, torch.bfloat16)
    metadata[0, 0, 5] = 0
    x = torch.randn(8, 64, generator=generator).to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="metadata of positions 0, 0, expected rising ones"):
        cuda_sim.Simulator().sparse24_linear(x, values, metadata)
    with pytest.raises(RuntimeError, match="wgmma_sp: metadata of positions 0, 0"):
        cuda_sim.Simulator(arch=90).sparse24_linear(x.repeat(8, 1), values, metadata)


BAD_CALLS = {
    "values dtype": ({"values": torch.zeros(16, 32)}, "values of bfloat16, float16 or int8"),
    "values rows": (
        {"values": torch.zeros(16, 33, dtype=torch.bfloat16)[:, :32]},
        "a multiple of 16 bytes apart",
    ),
    "x dtype": ({"x": torch.zeros(3, 64)}, "expected x of the dtype of values"),
    "scale": ({"weight_scale": torch.ones(16)}, "expected b_scale with int8 values alone"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_of_the_kernel(case) -> None:
    change, message = BAD_CALLS[case]
    indices = torch.full((16, 8), 0x44, dtype=torch.uint8)
    call = {
        "x": torch.zeros(3, 64, dtype=torch.bfloat16),
        "values": torch.zeros(16, 32, dtype=torch.bfloat16),
        "metadata": sparse24_metadata(indices, 64, torch.bfloat16),
        **change,
    }
    with pytest.raises(RuntimeError, match=message):
        cuda_sim.Simulator().sparse24_linear(**call)


def test_bad_input_of_the_metadata() -> None:
    good = torch.full((2, 8), 0x44, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"expected indices \[N, 9\] uint8 for K=72"):
        sparse24_metadata(good, 72, torch.bfloat16)
    with pytest.raises(
        RuntimeError, match="expected dtype bfloat16, float16 or int8, got torch.float32"
    ):
        sparse24_metadata(good, 64, torch.float32)
    good[1, 2] = 0x45
    with pytest.raises(RuntimeError, match="got 1 and 1 in row 1, columns 16 to 19"):
        sparse24_metadata(good, 64, torch.bfloat16)


def meta_call(**change):
    call = {
        "x": torch.zeros(3, 5, 64, dtype=torch.bfloat16, device="meta"),
        "values": torch.zeros(16, 32, dtype=torch.bfloat16, device="meta"),
        "metadata": torch.zeros(1, 1, 32, dtype=torch.int32, device="meta"),
        **change,
    }
    return ops.sparse24_linear(**call)


def test_fake() -> None:
    out = meta_call()
    assert out.shape == (3, 5, 16) and out.dtype == torch.bfloat16 and out.device.type == "meta"
    bad = torch.zeros(1, 2, 32, dtype=torch.int32, device="meta")
    with pytest.raises(RuntimeError, match=r"expected contiguous metadata \[1, 1, 32\] int32"):
        meta_call(metadata=bad)
    with pytest.raises(ValueError, match="sparse24_linear: expected activation"):
        meta_call(activation="swish")


def test_cpu_tensors_are_refused() -> None:
    metadata = torch.full((1, 1, 32), 0x44444444, dtype=torch.int32)
    half = torch.bfloat16
    with pytest.raises(RuntimeError, match="expected tensors on a GPU, got them on the CPU"):
        ops.sparse24_linear(
            torch.zeros(3, 64, dtype=half), torch.zeros(16, 32, dtype=half), metadata
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_gradients(dtype, generator) -> None:
    """Against autograd of the dense product, the kernel in the simulator."""
    N, K = 20, 70
    values, indices = random_weight(N, K, dtype, generator)
    metadata, mask = sparse24_metadata(indices, K, dtype), sparse24_mask(indices, K)
    x_dtype = torch.bfloat16 if dtype == torch.int8 else dtype
    x = torch.randn(6, K, generator=generator).to(x_dtype).requires_grad_()
    bias = torch.randn(N, generator=generator).to(x_dtype).requires_grad_()
    scale = torch.full((N,), 0.01) if dtype == torch.int8 else None
    kept = values if dtype == torch.int8 else values.clone().requires_grad_()
    with cuda_sim.as_cpu(cuda_sim.Simulator(seed=5)):
        out = ops.sparse24_linear(x, sparse24_rows(kept), metadata, scale, bias)
        out.float().square().sum().backward()
    grads = [x.grad, bias.grad] + ([] if dtype == torch.int8 else [kept.grad])
    x64 = x.detach().double().requires_grad_()
    kept64 = kept.detach().double().requires_grad_()
    weight = torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, kept64)[:, :K]
    weight = weight if scale is None else weight * scale[:, None]
    bias64 = bias.detach().double().requires_grad_()
    (x64 @ weight.t() + bias64).square().sum().backward()
    for got, want in zip(grads, (x64.grad, bias64.grad, kept64.grad), strict=False):
        assert (got.double() - want).norm() <= 0.02 * want.norm()
