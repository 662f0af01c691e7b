"""block_grad_values' CUDA kernels in the simulator: float64, ends, parts, corrupt indices, bad input."""

import cases
import cuda_sim
import pytest
import torch
from test_block_cuda_sim import blocks

from trimtab import ops

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Gathered blocks, and those that tiles are sampled for: thin, odd, larger than a tile.
BLOCKS = [(16, 16), (32, 32), (64, 64), (1, 16), (3, 5), (96, 160)]
# (M, N, K, share of blocks kept): no tokens, no blocks, ends in every direction, several groups of a row of
# blocks, several tiles, several stages.
SHAPES = [
    (0, 40, 72, 0.5),
    (5, 40, 128, 0.0),
    (7, 72, 200, 0.6),
    (70, 130, 264, 0.7),
    (300, 24, 136, 1.0),
]


def operands(shape, block: tuple[int, int], dtype: torch.dtype, generator: torch.Generator):
    """(grad, x, crow, col), rows of whole 16 bytes."""
    M, N, K, kept = shape
    weight = blocks(N, K, block, kept, generator)
    _, crow, col = ops.block_pack(weight, block, refuse_larger=False)

    def rows(width: int) -> torch.Tensor:
        wide = torch.randn(M, -(-width // 8) * 8, generator=generator).to(dtype)
        return wide[:, :width]

    return rows(N), rows(K), crow, col


def wanted(grad, x, crow, col, bn: int, bk: int) -> torch.Tensor:
    """In float64; zeros where N or K end."""
    (_, N), K = grad.shape, x.shape[1]
    dense = torch.zeros(-(-N // bn) * bn, -(-K // bk) * bk, dtype=torch.float64)
    dense[:N, :K] = grad.double().t() @ x.double()
    rows = torch.repeat_interleave(torch.arange(len(crow) - 1), (crow[1:] - crow[:-1]).long())
    tiles = dense.reshape(-1, bn, dense.shape[1] // bk, bk).transpose(1, 2)
    return tiles[rows, col.long()]


def assert_close(got: torch.Tensor, grad, x, crow, col) -> None:
    """NUMERICS.md section 7, block by block."""
    want = wanted(grad, x, crow, col, *got.shape[1:])
    M = max(grad.shape[0], 1)
    # A short sum may cancel: its rounding is measured by its terms.
    size = wanted(grad.abs(), x.abs(), crow, col, *got.shape[1:]) / M**0.5
    bound = 2 * M**0.5 * 2.0**-24 * size + torch.finfo(got.dtype).eps / 2 * want.abs()
    assert ((got.double() - want).flatten(1).norm(dim=1) <= bound.flatten(1).norm(dim=1)).all()


@pytest.mark.parametrize("shape", SHAPES, ids=cases.ident)
@pytest.mark.parametrize("block", BLOCKS, ids=cases.ident)
@pytest.mark.parametrize("dtype", FLOATS, ids=cases.ident)
def test_product(dtype, block, shape, generator) -> None:
    grad, x, crow, col = operands(shape, block, dtype, generator)
    got = cuda_sim.Simulator(seed=1).block_grad_values(grad, x, crow, col, *block)
    assert got.shape == (len(col), *block) and got.dtype == dtype
    assert_close(got, grad, x, crow, col)


@pytest.mark.parametrize("block", [(32, 32), (1, 16)], ids=cases.ident)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.ident)
def test_every_run_has_the_same_bits(dtype, block, generator) -> None:
    """Parts in their order, whichever block comes first; on every architecture."""
    grad, x, crow, col = operands((700, 40, 72, 0.7), block, dtype, generator)
    sim = cuda_sim.Simulator(seed=2)
    got = sim.block_grad_values(grad, x, crow, col, *block)
    assert sim.launches == 2  # the last one adds the parts
    assert_close(got, grad, x, crow, col)
    for policy in ("late", "random", "early"):
        other = cuda_sim.Simulator(arch=90, seed=2, policy=policy)
        cases.assert_same_bits(other.block_grad_values(grad, x, crow, col, *block), got)


@pytest.mark.parametrize("block", [(16, 16), (1, 16), (5, 24)], ids=cases.ident)
def test_an_inf_shows_where_it_is_met_alone(block, generator) -> None:
    """In the gradients of its column; not in what lies beyond N and K."""
    grad, x, crow, col = operands((9, 39, 70, 0.6), block, torch.bfloat16, generator)
    x[4, 33], grad[2, 38] = float("inf"), float("nan")
    got = cuda_sim.Simulator(seed=3).block_grad_values(grad, x, crow, col, *block)
    want = wanted(grad, x, crow, col, *block)
    assert torch.equal(got.isfinite(), want.isfinite()) and not got.isfinite().all()


@pytest.mark.parametrize("block", [(16, 16), (3, 5)], ids=cases.ident)
def test_blocks_in_any_order_and_twice(block, generator) -> None:
    """Columns that do not rise, one of them twice."""
    grad, x, crow, col = operands((20, 40, 90, 0.8), block, torch.bfloat16, generator)
    col = col.flip(0).contiguous() % 3
    got = cuda_sim.Simulator(seed=4).block_grad_values(grad, x, crow, col, *block)
    assert_close(got, grad, x, crow, col)


@pytest.mark.parametrize("block", [(32, 32), (1, 16)], ids=cases.ident)
def test_corrupt_indices_touch_nothing_else(block, generator) -> None:
    """Indices out of range or falling: any result, no fault."""
    grad, x, crow, col = operands((5, 96, 120, 0.5), block, torch.bfloat16, generator)
    sim = cuda_sim.Simulator(seed=5)
    for starts, columns in cases.corrupt_blocks(crow, col):
        got = sim.block_grad_values(grad, x, starts.contiguous(), columns, *block)
        assert got.shape == (len(col), *block)


BAD_CALLS = {
    "grad": (
        {"grad": torch.zeros(3, 33).half()[:, :32]},
        "grad and x aligned to 16 bytes, got .* 33",
    ),
    "x": ({"x": torch.zeros(3, 41).half()[:, 1:33]}, "grad and x aligned to 16 bytes"),
    "block": ({"bn": 0}, "blocks of at least 1 x 1 and .* got dtype 2, 2 blocks of 0 x 16"),
    "dtype": ({"x": torch.zeros(3, 32).to(torch.int8)}, "expected a float dtype.* got dtype 3"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input(case) -> None:
    change, message = BAD_CALLS[case]
    call = {
        "grad": torch.zeros(3, 32).half(),
        "x": torch.zeros(3, 32).half(),
        "crow": torch.tensor([0, 1, 2], dtype=torch.int32),
        "col": torch.tensor([0, 1], dtype=torch.int32),
        "bn": 16,
        "bk": 16,
    }
    with pytest.raises(RuntimeError, match=message):
        cuda_sim.Simulator().block_grad_values(**call | change)
