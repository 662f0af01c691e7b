"""The sparse products on a GPU where no kernel of theirs serves: most through the dense weight.

- bitmap_linear with more than 32 rows: the dense weight.
- block_grad_x: block_linear with the transposed weight, always.
- without the CUDA library, where Triton is missing or has no blocks of that size: bitmap_linear and
  block_linear through the dense weight, block_grad_values as torch's dense product, of which the kept
  blocks are taken.

The dense ways cost what the dense product costs and the unpacking; swap_ measures that and leaves such
layers dense. int8 values give the bits they give on a CPU. Float values differ from the contract in
one thing: the dense product evaluates 0 * Inf, so an Inf or NaN in ``x`` that meets a pruned weight
gives NaN.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import library
from .bitmap_linear import bitmap_unpack
from .block_linear import block_unpack, blocks_of
from .int8_weight_mm import activation_forward


def _product(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, activation: int
) -> Tensor:
    if scale is not None:
        return torch.ops.trimtab.int8_linear.inference(x, weight, scale, bias, activation)
    if bias is not None and bias.dtype != x.dtype:
        t = torch.nn.functional.linear(x, weight).to(torch.float32) + bias
    else:
        t = torch.nn.functional.linear(x, weight, bias)
    return activation_forward(library.ACTIVATION_NAMES[activation], t).to(x.dtype)


def _bitmap_linear(
    x: Tensor,
    values: Tensor,
    bitmap: Tensor,
    row_start: Tensor,
    weight_scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: int = 0,
) -> Tensor:
    weight = bitmap_unpack(values, bitmap, x.shape[-1])
    return _product(x, weight, weight_scale, bias, activation)


def _block_linear(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    activation: int,
    N: int,
) -> Tensor:
    weight = block_unpack(values, crow, col, N, x.shape[-1])
    return _product(x, weight, weight_scale, bias, activation)


def _row_of_each(crow: Tensor, blocks: int) -> Tensor:
    """The row of blocks that each block stands in."""
    rows = torch.arange(crow.shape[0] - 1, device=crow.device)
    return torch.repeat_interleave(rows, (crow[1:] - crow[:-1]).long(), output_size=blocks)


def _block_grad_x(grad: Tensor, values: Tensor, crow: Tensor, col: Tensor, K: int) -> Tensor:
    bk = values.shape[2]
    order = torch.argsort(col, stable=True)  # rows of blocks rise within a column
    counts = torch.zeros(blocks_of(K, bk), dtype=torch.int64, device=col.device)
    counts.index_add_(0, col.long(), torch.ones_like(col, dtype=torch.int64))
    transposed = (
        values[order].transpose(1, 2).contiguous(),
        torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32),
        _row_of_each(crow, col.shape[0])[order].to(torch.int32),
    )
    return torch.ops.trimtab.block_linear.inference(grad, *transposed, None, None, 0, K)


def _block_grad_values(
    grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, bn: int, bk: int
) -> Tensor:
    N, K = grad.shape[-1], x.shape[-1]
    dense = grad.reshape(-1, N).t() @ x.reshape(-1, K)
    dense = torch.nn.functional.pad(dense, (0, -K % bk, 0, -N % bn))
    blocks = dense.reshape(dense.shape[0] // bn, bn, dense.shape[1] // bk, bk).transpose(1, 2)
    return blocks[_row_of_each(crow, col.shape[0]), col.to(torch.int64)]


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "bitmap_linear.dense": _bitmap_linear,
    "block_linear.dense": _block_linear,
    "block_grad_x": _block_grad_x,
    "block_grad_values.dense": _block_grad_values,
}


def register() -> None:
    """For CUDA tensors."""
    for name, function in IMPLEMENTATIONS.items():
        library.implement(name, function, "CUDA")
