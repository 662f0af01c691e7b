"""block_linear's CUDA kernels in the simulator: float64 and the CPU's int8 bits, corrupt weights, bad input."""

import cases
import cuda_sim
import pytest
import torch

from trimtab import ops

DTYPES = (torch.bfloat16, torch.float16, torch.int8)
# (M, N, K, share of blocks kept): no rows, no columns, no blocks; ends of tiles in every direction; many steps,
# which parts share; 33 rows and more take the tiles of 128 tokens.
SHAPES = [
    (0, 5, 64, 0.5),
    (5, 40, 0, 0.5),
    (5, 40, 128, 0.0),
    (1, 64, 8, 1.0),
    (17, 70, 200, 0.5),
    (3, 64, 1024, 0.7),
    (33, 100, 136, 0.6),
    (130, 129, 72, 0.6),
]


# Block and shapes of the multiply-adds: float32, thin blocks, sides that divide neither 16 bytes nor 8 outputs,
# rows of x at any address; parts; more than 128 tokens.
BLOCKS_BY_FMA = [
    (torch.float32, (16, 16)),
    (torch.float32, (64, 64)),
    *((dtype, (1, 16)) for dtype in (torch.float32, *DTYPES)),
    (torch.bfloat16, (8, 24)),
    (torch.float16, (3, 5)),
    (torch.int8, (16, 3)),
]
SHAPES_BY_FMA = [
    (0, 5, 64, 0.5),
    (5, 40, 0, 0.5),
    (5, 40, 128, 0.0),
    (3, 70, 201, 0.6),
    (130, 33, 72, 0.6),
    (9, 20, 1900, 0.8),
]


def blocks(
    N: int, K: int, block: tuple[int, int], kept: float, generator: torch.Generator
) -> torch.Tensor:
    """A weight of blocks, its first row of blocks empty where there are more."""
    rows, columns = -(-N // block[0]), -(-K // block[1])
    mask = torch.rand(rows, columns, generator=generator) < kept
    if rows > 1:
        mask[0] = False
    mask = mask.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return torch.randn(N, K, generator=generator) * mask[:N, :K]


def operands(shape, size: int | tuple[int, int], dtype: torch.dtype, generator: torch.Generator):
    """(x, values, crow, col, scale, bias)"""
    M, N, K, kept = shape
    block = (size, size) if isinstance(size, int) else size
    weight, scale = blocks(N, K, block, kept, generator), None
    if dtype == torch.int8:
        weight, scale = ops.quantize_int8(weight)
        x = cases.awkward_rows(M, K, torch.bfloat16, generator)
    else:
        weight, x = weight.to(dtype), torch.randn(M, K, generator=generator).to(dtype)
    parts = ops.block_pack(weight, block, refuse_larger=False)
    return x, *parts, scale, torch.randn(N, generator=generator)


def check_product(shape, block: int | tuple[int, int], dtype: torch.dtype, generator) -> None:
    M, N, K, _ = shape
    x, *parts, scale, bias = operands(shape, block, dtype, generator)
    got = cuda_sim.Simulator(seed=1).block_linear(x, *parts, scale, bias, 4, N)
    assert got.shape == (M, N) and got.dtype == x.dtype
    if dtype == torch.int8:
        want = ops.block_linear(x, *parts, scale, bias, "silu", N=N)
        cases.assert_same_bits(got, want)
        return
    weight = ops.block_unpack(*parts, N, K).double()
    want = torch.nn.functional.silu(x.double() @ weight.t() + bias.double())
    # NUMERICS.md section 7, row by row, of sums as large as those here
    bound = 4 * max(K, 1) ** 0.5 * 2.0**-24 + torch.finfo(dtype).eps / 2
    assert ((got.double() - want).norm(dim=1) <= bound * want.norm(dim=1)).all()


@pytest.mark.parametrize("shape", SHAPES, ids=cases.ident)
@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ident)
def test_product(dtype, size, shape, generator) -> None:
    check_product(shape, size, dtype, generator)


@pytest.mark.parametrize("shape", SHAPES_BY_FMA, ids=cases.ident)
@pytest.mark.parametrize("dtype,block", BLOCKS_BY_FMA, ids=cases.ident)
def test_product_by_multiply_adds(dtype, block, shape, generator) -> None:
    check_product(shape, block, dtype, generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ident)
def test_every_run_has_the_same_bits(dtype, generator) -> None:
    """Parts in their order, whichever block comes first; on every architecture."""
    x, *parts, scale, bias = operands((20, 130, 1500, 0.8), 32, dtype, generator)
    x = x.clone() if x.shape[1] % 8 == 0 else x[:, :1496].contiguous()
    parts = ops.block_pack(
        ops.block_unpack(*parts, 130, 1500)[:, :1496], (32, 32), refuse_larger=False
    )
    sim = cuda_sim.Simulator(seed=2)
    got = sim.block_linear(x, *parts, scale, bias, 1, 130)
    assert sim.launches == (3 if dtype == torch.int8 else 2)  # the last one adds the parts
    for policy in ("late", "random", "early"):
        other = cuda_sim.Simulator(arch=90, seed=2, policy=policy)
        cases.assert_same_bits(other.block_linear(x, *parts, scale, bias, 1, 130), got)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=cases.ident)
@pytest.mark.parametrize("M", [3, 40])
def test_pruned_blocks_meet_no_inf(M, dtype, generator) -> None:
    x, *parts, _, _ = operands((M, 96, 128, 0.5), 32, dtype, generator)
    x[2, 70] = float("inf")
    got = cuda_sim.Simulator(seed=3).block_linear(x, *parts, None, None, 0, 96)
    keeps = ops.block_unpack(*parts, 96, 128)[:, 70] != 0
    assert torch.equal(~got[2].isfinite(), keeps) and keeps.any() and not keeps.all()
    assert got[[0, 1]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=cases.ident)
def test_an_infinite_weight_stays_in_its_row(dtype, generator) -> None:
    """Rows whose blocks fill no step are filled up with zeros, not with other blocks."""
    x, values, *rest = operands((5, 96, 160, 0.5), 32, dtype, generator)
    values[0, 0, 0] = float("inf")
    got = cuda_sim.Simulator(seed=5).block_linear(x, values, *rest[:2], None, None, 0, 96)
    first = int((rest[0] > 0).nonzero()[0]) - 1  # the row of blocks that holds it
    assert torch.equal((~got.isfinite()).any(0).nonzero()[:, 0], torch.tensor([32 * first]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=cases.ident)
def test_corrupt_weights_read_nothing_else(dtype, generator) -> None:
    """Indices out of range or falling: any result, no fault."""
    x, values, crow, col, _, _ = operands((5, 96, 120, 0.5), 32, dtype, generator)
    sim = cuda_sim.Simulator(seed=4)
    for starts, columns in cases.corrupt_blocks(crow, col):
        got = sim.block_linear(x, values, starts.contiguous(), columns, None, None, 0, 96)
        assert got.shape == (5, 96)


def test_multiply_adds_have_the_same_bits_in_every_run(generator) -> None:
    """Parts in their order; rows of x at any address, values too."""
    x, values, *rest = operands((20, 66, 1503, 0.8), (4, 12), torch.float32, generator)
    sim = cuda_sim.Simulator(seed=2)
    got = sim.block_linear(x, values, *rest[:2], None, rest[-1], 1, 66)
    assert sim.launches == 3  # x turned, the parts, which the last one adds
    moved = torch.cat([values.new_zeros(1), values.reshape(-1)])[1:].reshape(values.shape)
    wide = torch.zeros(20, 1510)[:, 2:1505].copy_(x)
    for policy in ("late", "random"):
        other = cuda_sim.Simulator(arch=90, seed=3, policy=policy)
        again = other.block_linear(wide, moved, *rest[:2], None, rest[-1], 1, 66)
        cases.assert_same_bits(again, got)


BAD_CALLS = {
    "block": (
        {"values": torch.zeros(2, 0, 8).half()},
        "expected blocks of at least 1 x 1, got 0 x 8",
    ),
    "x": ({"x": torch.zeros(3, 33).half()[:, :32]}, "aligned to 16 bytes, got .* a stride of 33"),
    "scale": ({"weight_scale": torch.ones(32)}, "b_scale with int8 values alone"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input(case) -> None:
    change, message = BAD_CALLS[case]
    call = {
        "x": torch.zeros(3, 32).half(),
        "values": torch.zeros(2, 16, 16).half(),
        "crow": torch.tensor([0, 1, 2], dtype=torch.int32),
        "col": torch.tensor([0, 1], dtype=torch.int32),
        "weight_scale": None,
        "bias": None,
        "activation": 0,
        "N": 32,
    }
    with pytest.raises(RuntimeError, match=message):
        cuda_sim.Simulator().block_linear(**call | change)
