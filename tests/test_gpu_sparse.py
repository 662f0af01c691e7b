"""The sparse products on a GPU, CUDA C++ and Triton, against the CPU's. Runs where there is one
(`make gpu`).

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

# Who computes: the op as it is called, CUDA C++ where it can be, and Triton by its name.
_ops = torch.ops.trimtab
BITMAP = {"cuda": _ops.bitmap_linear.default, "triton": _ops.bitmap_linear.triton}
BLOCK = {"cuda": _ops.block_linear.default, "triton": _ops.block_linear.triton}
GRADIENT = {"cuda": _ops.block_grad_values.default, "triton": _ops.block_grad_values.triton}
SPARSE24 = {"cuda": _ops.sparse24_linear.default, "triton": _ops.sparse24_linear.triton}
WHO = pytest.mark.parametrize("who", ["cuda", "triton"])


def few_for_triton(who: str, shape: tuple[int, int, int], kept: float = 0.1) -> None:
    """Triton compiles for every kind of shape, which takes a second each."""
    if who == "triton" and (shape[0] not in (1, 17, 513) or kept not in (0.1, 0.3)):
        pytest.skip("not in Triton")


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


@WHO
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [*cases.DTYPES, torch.int8], ids=cases.ident)
def test_bitmap_linear(dtype, shape, kept, who, fresh) -> None:
    few_for_triton(who, shape, kept)
    if who == "triton" and shape[0] > 32:
        pytest.skip("the dense weight's")
    x, weight, scale = operands(shape, dtype, 1, kept, fresh)
    parts = ops.bitmap_pack(weight)
    got = BITMAP[who](*on_gpu(x, *parts, scale))
    if dtype == torch.int8:
        cases.assert_same_bits(got.cpu(), ops.bitmap_linear(x, *parts, scale))
    elif dtype != torch.float32 or shape[0] <= 32:  # the dense product may be in tf32
        close(got, x, weight)
    for _ in range(3):
        assert torch.equal(BITMAP[who](*on_gpu(x, *parts, scale)), got)


def check_block_linear(
    shape, dtype: torch.dtype, block: tuple[int, int], kept: float, who: str, fresh
) -> None:
    few_for_triton(who, shape, kept)
    x, weight, scale = operands(shape, dtype, block, kept, fresh)
    parts, N = ops.block_pack(weight, block, refuse_larger=False), shape[1]
    tail = (None, 0, N)
    got = BLOCK[who](*on_gpu(x, *parts, scale), *tail)
    if dtype == torch.int8:
        cases.assert_same_bits(got.cpu(), ops.block_linear(x, *parts, scale, N=N))
    else:
        close(got, x, weight)
    for _ in range(3):
        assert torch.equal(BLOCK[who](*on_gpu(x, *parts, scale), *tail), got)


@WHO
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8], ids=cases.ident)
def test_block_linear(dtype, shape, block, kept, who, fresh) -> None:
    check_block_linear(shape, dtype, (block, block), kept, who, fresh)


@WHO
@pytest.mark.parametrize("kept", [0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "dtype,block",
    [(torch.float32, (16, 16)), (torch.float32, (64, 64))]
    + [(dtype, block) for dtype in (*cases.DTYPES, torch.int8) for block in ((1, 16), (3, 5))],
    ids=cases.ident,
)
def test_block_linear_by_multiply_adds(dtype, block, shape, kept, who, fresh) -> None:
    """What the tensor cores of CUDA C++ do not have; Triton takes all but 3 x 5 from them."""
    check_block_linear(shape, dtype, block, kept, who, fresh)


@WHO
def test_uneven_rows(who, fresh) -> None:
    """Most kept blocks in a few rows."""
    _, weight, scale = operands((0, 4096, 4096), torch.int8, 16, 0.02, fresh)
    weight[160:192] = torch.randint(-127, 128, (32, 4096), generator=fresh)
    weight[-16:], weight[1024:2048] = 1, 0
    parts = ops.block_pack(weight, (16, 16))
    for M in (1, 100, 1000):
        x = torch.randn(M, 4096, generator=fresh)
        got = BLOCK[who](*on_gpu(x, *parts, scale), None, 0, 4096)
        cases.assert_same_bits(got.cpu(), ops.block_linear(x, *parts, scale))


@WHO
@pytest.mark.parametrize("kept", [0.1])
@pytest.mark.parametrize("block", [(16, 16), (32, 32), (64, 64), (1, 16), (3, 5)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ident)
def test_block_gradients(dtype, shape, block, kept, who, fresh) -> None:
    """Against float64; the same bits again."""
    few_for_triton(who, shape)
    (M, N, K), (bn, bk) = shape, block
    x, weight, _ = operands(shape, dtype, block, kept, fresh)
    grad = torch.randn(M, N, generator=fresh).to(dtype)
    values, crow, col = on_gpu(*ops.block_pack(weight, block, refuse_larger=False))
    grad, x, weight = on_gpu(grad, x, weight)
    eps = 2.0**-24 + torch.finfo(dtype).eps / 2
    if who == "cuda":
        got = torch.ops.trimtab.block_grad_x(grad, values, crow, col, K)
        want = grad.double() @ weight.double()
        assert (got.double() - want).norm() <= 4 * N**0.5 * eps * want.norm()
    got = GRADIENT[who](grad, x, crow, col, bn, bk)
    wide = torch.nn.functional.pad(grad.double().t() @ x.double(), (0, -K % bk, 0, -N % bn))
    tiles = wide.reshape(-(-N // bn), bn, -(-K // bk), bk).transpose(1, 2)
    rows = torch.repeat_interleave((crow[1:] - crow[:-1]).long())
    want = tiles[rows, col.long()]
    assert got.shape == want.shape
    assert (got.double() - want).norm() <= 4 * max(M, 1) ** 0.5 * eps * want.norm()
    for _ in range(3):
        assert torch.equal(GRADIENT[who](grad, x, crow, col, bn, bk), got)


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


@WHO
@pytest.mark.parametrize("shape", SHAPES24, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8], ids=cases.ident)
def test_sparse24_linear(dtype, shape, who, fresh) -> None:
    """mma.sp, and wgmma.sp from 33 rows on where rows of x are whole 16 bytes; x at any address."""
    few_for_triton(who, shape)
    x, weight, scale = operands(shape, dtype, 1, 1.0, fresh)
    values, metadata = sparse24_pack(weight.cuda())
    dense = sparse24_unpack(*ops.sparse24_compress(weight), shape[2])
    linear = SPARSE24[who]
    got = linear(x.cuda(), values, metadata, *on_gpu(scale))
    if dtype == torch.int8:
        cases.assert_same_bits(got.cpu(), ops.int8_linear(x, dense, scale))
    else:
        close(got, x, dense)
    moved = torch.empty(shape[0], shape[2] + 3, dtype=x.dtype, device="cuda")[:, 1 : shape[2] + 1]
    unaligned = linear(moved.copy_(x), values, metadata, *on_gpu(scale))
    if dtype == torch.int8:
        assert torch.equal(unaligned, got)
    else:
        close(unaligned, x, dense)
    for _ in range(3):
        assert torch.equal(linear(x.cuda(), values, metadata, *on_gpu(scale)), got)


@WHO
def test_pruned_weights_meet_no_inf(who, fresh) -> None:
    x, weight, _ = operands((20, 300, 500), torch.bfloat16, 1, 0.5, fresh)
    x[3, 77] = float("inf")
    got = BITMAP[who](*on_gpu(x, *ops.bitmap_pack(weight))).cpu()
    assert torch.equal(~got[3].isfinite(), weight[:, 77] != 0)
    x, weight, _ = operands((20, 320, 512), torch.bfloat16, 32, 0.5, fresh)
    x[3, 77] = float("inf")
    parts = on_gpu(*ops.block_pack(weight, (32, 32)))
    got = BLOCK[who](x.cuda(), *parts, None, None, 0, 320).cpu()
    assert torch.equal(~got[3].isfinite(), weight[:, 77] != 0)


@WHO
def test_corrupt_weights_read_nothing_else(who, fresh) -> None:
    """compute-sanitizer says more; without it, no fault and no hang."""
    x, weight, _ = operands((4, 256, 512), torch.bfloat16, 1, 0.3, fresh)
    values, bitmap, start = on_gpu(*ops.bitmap_pack(weight))
    x = x.cuda()
    for wrong in (start + 2**40, -start, start * 3):
        BITMAP[who](x, values, torch.full_like(bitmap, 255), wrong)
    _, weight, _ = operands((4, 256, 512), torch.bfloat16, 32, 0.5, fresh)
    values, crow, col = on_gpu(*ops.block_pack(weight, (32, 32)))
    for rows, columns in ((crow * 1000, col), (crow, col + 2**30), (-crow, -col)):
        BLOCK[who](x, values, rows, columns, None, None, 0, 256)
        GRADIENT[who](x[:, :256], x, rows, columns, 32, 32)
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
