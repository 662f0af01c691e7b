"""The sparse products through the dense weight, as they run on a GPU: equal to the CPU's kernels."""

import pytest
import torch

from trimtab import ops
from trimtab.ops.sparse_fallback import IMPLEMENTATIONS

M, N, K = 7, 45, 83


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    eps = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[want.dtype]
    assert got.dtype == want.dtype and got.shape == want.shape
    bound = 2 * (2 * K**0.5 * 2.0**-24 + eps) * want.double().norm()
    assert (got.double() - want.double()).norm() <= bound


def pruned(generator: torch.Generator) -> torch.Tensor:
    weight = torch.randn(N, K, generator=generator)
    weight[torch.rand(N, K, generator=generator) < 0.6] = 0
    weight[:16, :32] = 0  # whole blocks
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("op", ["bitmap_linear", "block_linear"])
def test_product(op, int8, dtype, generator) -> None:
    weight, scale = pruned(generator).to(dtype), None
    if int8:
        weight, scale = ops.quantize_int8(weight)
    x = torch.randn(2, M, K, generator=generator).to(dtype)
    bias = torch.randn(N, generator=generator)
    if op == "bitmap_linear":
        args = (x, *ops.bitmap_pack(weight), scale, bias, 4)
    else:
        args = (x, *ops.block_pack(weight, (16, 16), refuse_larger=False), scale, bias, 4, N)
    got, want = IMPLEMENTATIONS[f"{op}.dense"](*args), getattr(torch.ops.trimtab, op)(*args)
    if int8:
        assert torch.equal(got, want)
    else:
        close(got, want)


@pytest.mark.parametrize("block", [(16, 16), (1, 16), (3, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_blocks(dtype, block, generator) -> None:
    weight = pruned(generator).to(dtype)
    values, crow, col = ops.block_pack(weight, block, refuse_larger=False)
    x, grad = (torch.randn(M, size, generator=generator).to(dtype) for size in (K, N))
    for name, args in {
        "block_grad_x": (grad, values, crow, col, K),
        "block_grad_values.dense": (grad, x, crow, col, *block),
    }.items():
        op = getattr(torch.ops.trimtab, name.removesuffix(".dense"))
        close(IMPLEMENTATIONS[name](*args), op(*args))
