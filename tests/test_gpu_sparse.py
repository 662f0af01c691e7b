"""The sparse products' CUDA kernels on a GPU, against the CPU's. Runs where there is one (`make gpu`).

Inputs are fresh at every run: TRIMTAB_SEED repeats one, as in test_gpu_int8.py.
"""

from __future__ import annotations

import os
import time

import cases
import pytest
import torch

from trimtab import ops
from trimtab.nn import SparseLinear
from trimtab.ops.sparse24_compress import sparse24_unpack
from trimtab.ops.sparse24_linear import sparse24_metadata, sparse24_pack, sparse24_pack_both

pytestmark = pytest.mark.gpu

# Every tile of the kernels, ends of tiles, rows past 32, where bitmap_linear takes the dense weight.
SHAPES = [
    (1, 1024, 4096),
    (8, 1000, 4099),
    (16, 512, 11008),
    (17, 129, 64),
    (32, 2051, 1001),
    (40, 512, 768),
    (0, 64, 64),
    (513, 512, 1024),
]
KEPT = (0.0, 0.1, 0.5, 1.0)


@pytest.fixture
def fresh() -> torch.Generator:
    seed = int(os.environ.get("TRIMTAB_SEED", time.time_ns() % 2**62))
    print(f"TRIMTAB_SEED={seed}")
    return torch.Generator().manual_seed(seed)


def on_gpu(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if t is None else t.cuda() for t in tensors]


def operands(
    shape,
    dtype: torch.dtype,
    block: int | tuple[int, int],
    kept: float,
    generator: torch.Generator,
):
    """(x, dense weight, scale): of blocks, or unstructured where block is 1."""
    M, N, K = shape
    bn, bk = (block, block) if isinstance(block, int) else block
    mask = torch.rand(-(-N // bn), -(-K // bk), generator=generator) < kept
    mask = mask.repeat_interleave(bn, 0).repeat_interleave(bk, 1)[:N, :K]
    weight, scale = torch.randn(N, K, generator=generator) * mask, None
    x = torch.randn(M, K, generator=generator)
    if dtype == torch.int8:
        weight, scale = ops.quantize_int8(weight)
        return x.bfloat16(), weight, scale
    return x.to(dtype), weight.to(dtype), None


def close(got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """NUMERICS.md section 7."""
    want = x.cuda().double() @ weight.cuda().double().t()
    bound = 2 * weight.shape[1] ** 0.5 * 2.0**-24 + torch.finfo(got.dtype).eps / 2
    assert (got.double() - want).norm() <= 2 * bound * want.norm()


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [*cases.DTYPES, torch.int8], ids=cases.ident)
def test_bitmap_linear(dtype, shape, kept, fresh) -> None:
    x, weight, scale = operands(shape, dtype, 1, kept, fresh)
    parts = ops.bitmap_pack(weight)
    got = ops.bitmap_linear(*on_gpu(x, *parts, scale))
    if dtype == torch.int8:
        cases.assert_same_bits(got.cpu(), ops.bitmap_linear(x, *parts, scale))
    elif dtype != torch.float32 or shape[0] <= 32:  # the dense product may be in tf32
        close(got, x, weight)
    for _ in range(3):
        assert torch.equal(ops.bitmap_linear(*on_gpu(x, *parts, scale)), got)


def check_block_linear(shape, dtype: torch.dtype, block: tuple[int, int], kept: float, fresh):
    x, weight, scale = operands(shape, dtype, block, kept, fresh)
    parts, N = ops.block_pack(weight, block, refuse_larger=False), shape[1]
    got = ops.block_linear(*on_gpu(x, *parts, scale), N=N)
    if dtype == torch.int8:
        cases.assert_same_bits(got.cpu(), ops.block_linear(x, *parts, scale, N=N))
    else:
        close(got, x, weight)
    for _ in range(3):
        assert torch.equal(ops.block_linear(*on_gpu(x, *parts, scale), N=N), got)


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8], ids=cases.ident)
def test_block_linear(dtype, shape, block, kept, fresh) -> None:
    check_block_linear(shape, dtype, (block, block), kept, fresh)


@pytest.mark.parametrize("kept", [0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "dtype,block",
    [(torch.float32, (16, 16)), (torch.float32, (64, 64))]
    + [(dtype, block) for dtype in (*cases.DTYPES, torch.int8) for block in ((1, 16), (3, 5))],
    ids=cases.ident,
)
def test_block_linear_by_multiply_adds(dtype, block, shape, kept, fresh) -> None:
    check_block_linear(shape, dtype, block, kept, fresh)


@pytest.mark.parametrize("kept", [0.1])
@pytest.mark.parametrize("block", [(16, 16), (32, 32), (64, 64), (1, 16), (3, 5)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ident)
def test_block_gradients(dtype, shape, block, kept, fresh) -> None:
    """Against float64; the same bits again."""
    (M, N, K), (bn, bk) = shape, block
    x, weight, _ = operands(shape, dtype, block, kept, fresh)
    grad = torch.randn(M, N, generator=fresh).to(dtype)
    values, crow, col = on_gpu(*ops.block_pack(weight, block, refuse_larger=False))
    grad, x, weight = on_gpu(grad, x, weight)
    eps = 2.0**-24 + torch.finfo(dtype).eps / 2
    got = torch.ops.trimtab.block_grad_x(grad, values, crow, col, K)
    want = grad.double() @ weight.double()
    assert (got.double() - want).norm() <= 4 * N**0.5 * eps * want.norm()
    got = torch.ops.trimtab.block_grad_values(grad, x, crow, col, bn, bk)
    wide = torch.nn.functional.pad(grad.double().t() @ x.double(), (0, -K % bk, 0, -N % bn))
    tiles = wide.reshape(-(-N // bn), bn, -(-K // bk), bk).transpose(1, 2)
    rows = torch.repeat_interleave((crow[1:] - crow[:-1]).long())
    want = tiles[rows, col.long()]
    assert got.shape == want.shape
    assert (got.double() - want).norm() <= 4 * max(M, 1) ** 0.5 * eps * want.norm()
    for _ in range(3):
        assert torch.equal(torch.ops.trimtab.block_grad_values(grad, x, crow, col, bn, bk), got)


# --- 2:4

SHAPES24 = [*SHAPES, (2048, 1024, 1024), (100, 130, 264), (4096, 513, 72)]


@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (130, 140), (65, 257), (1024, 4096)], ids=str)
@pytest.mark.parametrize("dtype", [*cases.DTYPES, torch.int8], ids=cases.ident)
def test_sparse24_compress(dtype, shape, fresh) -> None:
    """The CPU's bits, ties included; one way, and both ways from one pass."""
    weight = torch.randint(-3, 4, shape, generator=fresh).to(dtype)
    for w in (weight, weight.t(), weight[:, 1:]):
        values, indices = ops.sparse24_compress(w)
        got = ops.sparse24_compress(w.cuda())
        cases.assert_same_bits(got[0].cpu(), values)
        assert torch.equal(got[1].cpu(), indices)
        if dtype == torch.float32:
            continue
        packed, metadata = sparse24_pack(w.cuda())
        cases.assert_same_bits(packed.cpu(), values)
        assert torch.equal(metadata.cpu(), sparse24_metadata(indices, w.shape[1], dtype))
        both = sparse24_pack_both(w.cuda())
        for one, other in zip(both, (packed, metadata, *sparse24_pack(w.cuda().t())), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("shape", SHAPES24, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8], ids=cases.ident)
def test_sparse24_linear(dtype, shape, fresh) -> None:
    """mma.sp, and wgmma.sp from 33 rows on where rows of x are whole 16 bytes; x at any address."""
    x, weight, scale = operands(shape, dtype, 1, 1.0, fresh)
    values, metadata = sparse24_pack(weight.cuda())
    dense = sparse24_unpack(*ops.sparse24_compress(weight), shape[2])
    got = ops.sparse24_linear(x.cuda(), values, metadata, *on_gpu(scale))
    if dtype == torch.int8:
        cases.assert_same_bits(got.cpu(), ops.int8_linear(x, dense, scale))
    else:
        close(got, x, dense)
    moved = torch.empty(shape[0], shape[2] + 3, dtype=x.dtype, device="cuda")[:, 1 : shape[2] + 1]
    unaligned = ops.sparse24_linear(moved.copy_(x), values, metadata, *on_gpu(scale))
    if dtype == torch.int8:
        assert torch.equal(unaligned, got)
    else:
        close(unaligned, x, dense)
    for _ in range(3):
        assert torch.equal(ops.sparse24_linear(x.cuda(), values, metadata, *on_gpu(scale)), got)


def test_pruned_weights_meet_no_inf(fresh) -> None:
    x, weight, _ = operands((20, 300, 500), torch.bfloat16, 1, 0.5, fresh)
    x[3, 77] = float("inf")
    got = ops.bitmap_linear(*on_gpu(x, *ops.bitmap_pack(weight))).cpu()
    assert torch.equal(~got[3].isfinite(), weight[:, 77] != 0)
    x, weight, _ = operands((20, 320, 512), torch.bfloat16, 32, 0.5, fresh)
    x[3, 77] = float("inf")
    got = ops.block_linear(*on_gpu(x, *ops.block_pack(weight, (32, 32))), N=320).cpu()
    assert torch.equal(~got[3].isfinite(), weight[:, 77] != 0)


def test_corrupt_weights_read_nothing_else(fresh) -> None:
    """compute-sanitizer says more; without it, no fault and no hang."""
    x, weight, _ = operands((4, 256, 512), torch.bfloat16, 1, 0.3, fresh)
    values, bitmap, start = on_gpu(*ops.bitmap_pack(weight))
    x = x.cuda()
    for wrong in (start + 2**40, -start, start * 3):
        ops.bitmap_linear(x, values, torch.full_like(bitmap, 255), wrong)
    _, weight, _ = operands((4, 256, 512), torch.bfloat16, 32, 0.5, fresh)
    values, crow, col = on_gpu(*ops.block_pack(weight, (32, 32)))
    for rows, columns in ((crow * 1000, col), (crow, col + 2**30), (-crow, -col)):
        ops.block_linear(x, values, rows, columns, N=256)
    torch.cuda.synchronize()


@pytest.mark.parametrize("pattern", ["bitmap", "block"])
def test_layer_trains(pattern, fresh) -> None:
    """Gradients as the dense layer's on a GPU; every row count that a layer meets."""
    _, weight, _ = operands((0, 128, 192), torch.bfloat16, 32, 0.4, fresh)
    dense = torch.nn.Linear(192, 128, bias=False, dtype=torch.bfloat16)
    dense.weight.data.copy_(weight)
    layer = SparseLinear.from_float(dense, pattern, block=(32, 32)).cuda()
    for M in (3, 50):
        x = torch.randn(M, 192, generator=fresh).bfloat16().cuda().requires_grad_()
        layer(x).float().square().sum().backward()
        x64 = x.detach().double().requires_grad_()
        w64 = weight.cuda().double().requires_grad_()
        (x64 @ w64.t()).square().sum().backward()
        assert (x.grad.double() - x64.grad).norm() <= 0.02 * x64.grad.norm()
        assert layer.values.grad is not None and bool(layer.values.grad.isfinite().all())
