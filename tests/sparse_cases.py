"""What the tests of the sparse layers share: pruned layers, and how near an answer has to be."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BLOCK = (4, 16)
PATTERNS = ("bitmap", "2:4", "block")


def mask_of(shape: torch.Size, pattern: str, density: float = 0.3) -> Tensor:
    """A random mask that fits the pattern, with empty rows, blocks and groups in it."""
    rows, columns = shape[0], shape[1:].numel()
    if pattern == "2:4":
        order = torch.rand(rows, -(-columns // 4), 4).argsort(-1).argsort(-1)
        mask = (order < 2) & (torch.rand(order.shape) < 0.9)  # some groups of one, some of none
        mask = mask.flatten(1)[:, :columns]
    elif pattern == "block":
        bn, bk = BLOCK
        blocks = torch.rand(-(-rows // bn), -(-columns // bk)) < density
        mask = blocks.repeat_interleave(bn, 0).repeat_interleave(bk, 1)[:rows, :columns]
    else:
        mask = torch.rand(rows, columns) < density
        mask[rows // 3] = False
    return mask.reshape(shape)


def pruned(layer: nn.Module, pattern: str, density: float = 0.3) -> nn.Module:
    """The layer, its weight pruned to the pattern."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    with torch.no_grad():
        weight.mul_(mask_of(weight.shape, pattern, density))
    return layer.eval()


def assert_near(got: Tensor, x: Tensor, weight: Tensor, want64: Tensor, K: int) -> None:
    """NUMERICS.md section 7: 2 sqrt(K) eps of float32, and one rounding of the output."""
    assert got.dtype == x.dtype and got.shape == want64.shape
    if not want64.numel():
        return
    bound = 2 * max(K, 1) ** 0.5 * torch.finfo(torch.float32).eps
    bound += torch.finfo(got.dtype).eps if got.dtype != torch.float32 else 0
    error = (got.double() - want64).norm() / want64.norm().clamp(min=1e-30)
    assert error <= bound, (float(error), bound)
