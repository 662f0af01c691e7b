"""A linear layer with a block-sparse (BSR) weight, and how such a weight is made and checked."""

from typing import Any

import torch
from torch import Tensor

from . import library
from .flops import register_flop_formula
from .int8_linear import activation_backward

_op = torch.ops.trimtab.block_linear


def block_linear(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    weight_scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    *,
    N: int | None = None,
) -> Tensor:
    """``act(x @ W.T + bias)`` with a block-sparse ``W`` [N, K] as block_pack makes it.

    Args:
        x: float32, bfloat16 or float16 [..., K], any rank >= 1, any strides.
        values: [blocks, bn, bk], the kept blocks row by row: of x's dtype, or int8.
        crow: int32 [ceil(N / bn) + 1], where each row of blocks begins in ``values``.
        col: int32 [blocks], the column of blocks, in [0, ceil(K / bk)).
        weight_scale: float32 [N] for int8 values, None for others.
        bias: float32, bfloat16 or float16 [N], or None.
        activation: "none", "relu", "gelu", "gelu_tanh" or "silu".
        N: outputs; None for all that the rows of blocks hold.

    Float values accumulate in float32, in an order that no number of threads changes, and round once to
    x's dtype (NUMERICS.md section 7). A pruned weight is not evaluated: Inf in ``x`` that meets pruned
    weights alone leaves no NaN. bfloat16 on AMX takes subnormals as zero. With int8 values ``x`` is
    quantized row by row and the result has the bits of int8_linear with the dense weight.

    On a GPU blocks of 16 x 16, 32 x 32 and 64 x 64 in bfloat16, float16 and int8 go through the tensor
    cores, others and float32 by multiply-adds; the order of a float sum is the same in every run. Where
    the CUDA library is missing Triton has blocks whose sides are powers of two; with others the dense
    weight is multiplied (ops/sparse_fallback.py), which evaluates 0 * Inf. There the gradient of
    ``values`` in blocks of fewer than 16 outputs is taken from the dense product.

    Gradients flow to ``x``, float ``values`` (kept blocks alone) and ``bias``; int8 values have none,
    and ``x`` then gets the one through the dequantized weight. Under autocast ``x`` and float
    ``values`` are cast to the autocast dtype.

    Raises:
        RuntimeError: wrong dtype, shape or scale, or indices that would be read out of bounds.
        ValueError: unknown activation.
    """
    code = library.activation_code("block_linear", activation)
    if torch.is_grad_enabled():
        library.refuse_grad("block_linear", weight_scale=weight_scale)
    if N is None:
        N = (crow.shape[0] - 1) * (values.shape[1] if values.dim() == 3 else 1)
    return _op.default(x, values, crow, col, weight_scale, bias, code, N)


def blocks_of(n: int, size: int) -> int:
    """Blocks of that size that cover n."""
    return -(-n // size)


def block_pack(
    weight: Tensor,
    block: tuple[int, int] = (32, 32),
    mask: Tensor | None = None,
    *,
    refuse_larger: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """A dense ``weight`` [N, K] as ``(values, crow, col)``: the blocks that hold a nonzero.

    Args:
        weight: any dtype, any device.
        block: (outputs, inputs) of a block; N and K are padded up to whole ones with zeros.
        mask: bool [N, K]; where given, blocks with a True are kept and weights with False are zero.
        refuse_larger: raise where the result would take more memory than ``weight``.

    Returns:
        values [blocks, bn, bk] of weight's dtype, crow int32 [ceil(N / bn) + 1], col int32 [blocks], as
        torch.sparse_bsr has them.

    Raises:
        RuntimeError: wrong rank, block or mask, or a result larger than ``weight``.
    """
    bn, bk = block
    library.expect(
        weight.dim() == 2, f"block_pack: expected weight [N, K], got {library.describe(weight)}"
    )
    library.expect(bn >= 1 and bk >= 1, f"block_pack: expected a block of at least 1, got {block}")
    N, K = weight.shape
    if mask is not None:
        library.expect(
            mask.dtype == torch.bool and mask.shape == weight.shape,
            f"block_pack: expected mask [N={N}, K={K}] bool, got {library.describe(mask)}",
        )
        weight = torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=mask.device))
    kept = _as_blocks(weight != 0 if mask is None else mask, bn, bk).any(-1).any(-1)
    values = _as_blocks(weight, bn, bk)[kept]
    crow = torch.zeros(kept.shape[0] + 1, dtype=torch.int32, device=weight.device)
    crow[1:] = kept.sum(1).cumsum(0)
    col = kept.nonzero()[:, 1].to(torch.int32)
    held = sum(t.numel() * t.element_size() for t in (values, crow, col))
    dense = weight.numel() * weight.element_size()
    library.expect(
        held <= dense or not refuse_larger,
        f"block_pack: {len(col)} of {kept.numel()} blocks of {bn} x {bk} hold a weight: {held} bytes "
        f"with their indices, more than the {dense} of the dense [{N}, {K}]",
    )
    return values, crow, col


def _as_blocks(weight: Tensor, bn: int, bk: int) -> Tensor:
    """[N, K] -> [rows of blocks, columns of blocks, bn, bk], padded with zeros."""
    N, K = weight.shape
    rows, columns = blocks_of(N, bn), blocks_of(K, bk)
    if (rows * bn, columns * bk) != (N, K):
        padded = weight.new_zeros(rows * bn, columns * bk)
        padded[:N, :K] = weight
        weight = padded
    return weight.reshape(rows, bn, columns, bk).permute(0, 2, 1, 3)


def block_unpack(values: Tensor, crow: Tensor, col: Tensor, N: int, K: int) -> Tensor:
    """The dense weight [N, K] that block_pack was given, zero where no block is kept.

    Differentiable in ``values``. Indices as block_check wants them.
    """
    _, bn, bk = values.shape
    rows, columns = crow.shape[0] - 1, blocks_of(K, bk)
    counts = (crow[1:] - crow[:-1]).long()
    row = torch.repeat_interleave(
        torch.arange(rows, device=crow.device), counts, output_size=values.shape[0]
    )
    dense = values.new_zeros(rows, columns, bn, bk).index_put((row, col.long()), values)
    return dense.permute(0, 2, 1, 3).reshape(rows * bn, columns * bk)[:N, :K].contiguous()


def block_check(values: Tensor, crow: Tensor, col: Tensor, N: int, K: int) -> None:
    """Checks a block-sparse weight as loaded: for once, not for every call.

    Raises:
        RuntimeError: shapes or dtypes that do not fit [N, K], a ``crow`` that does not rise from 0 to
            the number of blocks, a ``col`` out of range or not rising within its row; names the first.
    """
    op = "block_check"
    library.expect(
        values.dim() == 3 and values.shape[1] >= 1 and values.shape[2] >= 1,
        f"{op}: expected values [blocks, bn, bk], got {library.describe(values)}",
    )
    blocks, bn, bk = values.shape
    rows, columns = blocks_of(N, bn), blocks_of(K, bk)
    library.expect(
        crow.dtype == torch.int32 and tuple(crow.shape) == (rows + 1,),
        f"{op}: expected crow [{rows + 1}] int32 for N={N} in blocks of {bn}, got "
        f"{library.describe(crow)}",
    )
    library.expect(
        col.dtype == torch.int32 and tuple(col.shape) == (blocks,),
        f"{op}: expected col [blocks={blocks}] int32, got {library.describe(col)}",
    )
    steps = crow[1:] - crow[:-1]
    library.expect(
        int(crow[0]) == 0 and int(crow[-1]) == blocks and not bool((steps < 0).any()),
        f"{op}: expected crow to rise from 0 to blocks={blocks}, got {int(crow[0])} to "
        f"{int(crow[-1])}{_first(' with a fall after row ', steps < 0)}",
    )
    wild = (col < 0) | (col >= columns)
    library.expect(
        not bool(wild.any()),
        f"{op}: expected col in [0, {columns}) for K={K} in blocks of {bk}; "
        f"not so{_first(' at ', wild)}",
    )
    begins = torch.zeros(blocks + 1, dtype=torch.bool, device=col.device)
    begins[crow.long()] = True
    falls = (col[1:] <= col[:-1]) & ~begins[1:-1] if blocks else begins[:0]
    library.expect(
        not bool(falls.any()),
        f"{op}: expected col to rise within a row of blocks; not so{_first(' after ', falls)}",
    )


def _first(label: str, bad: Tensor) -> str:
    return f"{label}{int(bad.nonzero()[0])}" if bool(bad.any()) else ""


def _fake(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    activation: int,
    N: int,
) -> Tensor:
    op = "block_linear"
    library.expect_float(op, "x", x)
    library.expect(
        x.dim() >= 1, f"{op}: expected x of at least one dimension, got {library.describe(x)}"
    )
    _check_fake_weight(op, x, values, crow, col, N, int8=True)
    library.expect(
        (weight_scale is not None) == (values.dtype == torch.int8),
        f"{op}: expected weight_scale [N={N}] float32 for int8 values and None for others",
    )
    if weight_scale is not None:
        library.expect(
            weight_scale.dtype == torch.float32 and tuple(weight_scale.shape) == (N,),
            f"{op}: expected weight_scale [N={N}] float32, got {library.describe(weight_scale)}",
        )
    if bias is not None:
        library.expect_float(op, "bias", bias)
        library.expect(
            tuple(bias.shape) == (N,),
            f"{op}: expected a contiguous bias [N={N}], got {library.describe(bias)}",
        )
    return x.new_empty([*x.shape[:-1], N])


def _check_fake_weight(
    op: str, x: Tensor, values: Tensor, crow: Tensor, col: Tensor, N: int, int8: bool = False
) -> None:
    library.expect(
        values.dim() == 3 and (values.dtype == x.dtype or (int8 and values.dtype == torch.int8)),
        f"{op}: expected values [blocks, bn, bk] of {str(x.dtype).removeprefix('torch.')}"
        f"{' or int8' if int8 else ''}, got {library.describe(values)}",
    )
    rows = blocks_of(N, values.shape[1])
    library.expect(
        crow.dtype == torch.int32 and crow.dim() == 1 and crow.shape[0] == rows + 1,
        f"{op}: expected crow [{rows + 1}] int32, got {library.describe(crow)}",
    )
    library.expect(
        col.dtype == torch.int32 and col.dim() == 1 and col.shape[0] == values.shape[0],
        f"{op}: expected col [blocks={values.shape[0]}] int32, got {library.describe(col)}",
    )


for _overload in ("", ".inference", ".triton", ".dense"):
    library.register_fake(f"trimtab::block_linear{_overload}")(_fake)


@library.register_fake("trimtab::block_grad_x")
def _(grad: Tensor, values: Tensor, crow: Tensor, col: Tensor, K: int) -> Tensor:
    library.expect_float("block_grad_x", "grad", grad)
    _check_fake_weight("block_grad_x", grad, values, crow, col, grad.shape[-1])
    return grad.new_empty([*grad.shape[:-1], K])


def _fake_grad_values(
    grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, bn: int, bk: int
) -> Tensor:
    library.expect_float("block_grad_values", "grad", grad)
    return grad.new_empty([col.shape[0], bn, bk])


for _overload in ("", ".triton", ".dense"):
    library.register_fake(f"trimtab::block_grad_values{_overload}")(_fake_grad_values)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, values, crow, col, weight_scale, bias, activation, N = inputs
    ctx.activation, ctx.N, ctx.K = activation, N, x.shape[-1]
    ctx.int8, ctx.x_dtype = weight_scale is not None, x.dtype
    # An activation's derivative needs the sum before it, computed again from x.
    keep_x = activation or (values.requires_grad and not ctx.int8)
    ctx.save_for_backward(x if keep_x else None, values, crow, col, weight_scale, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, values, crow, col, weight_scale, bias = ctx.saved_tensors
    if ctx.activation:
        before = _op.default(x, values, crow, col, weight_scale, bias, 0, ctx.N)
        name = library.ACTIVATION_NAMES[ctx.activation]
        grad = activation_backward(name, before.to(torch.float32), grad)
    grad_bias = grad_values = grad_x = None
    if bias is not None and ctx.needs_input_grad[5]:
        grad_bias = grad.reshape(-1, ctx.N).sum(0, dtype=torch.float32).to(bias.dtype)
    grad = grad.to(ctx.x_dtype)
    if ctx.needs_input_grad[0]:
        if ctx.int8:
            values = _dequantized(values, crow, weight_scale, ctx.x_dtype)
        grad_x = torch.ops.trimtab.block_grad_x.default(grad, values, crow, col, ctx.K)
    if ctx.needs_input_grad[1] and not ctx.int8:
        _, bn, bk = values.shape
        grad_values = torch.ops.trimtab.block_grad_values.default(grad, x, crow, col, bn, bk)
    return grad_x, grad_values, None, None, None, grad_bias, None, None


def _dequantized(values: Tensor, crow: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Float values of int8 ones."""
    blocks, bn, _ = values.shape
    rows = crow.shape[0] - 1
    padded = torch.nn.functional.pad(scale, (0, rows * bn - scale.shape[0])).reshape(rows, bn)
    each = padded.repeat_interleave((crow[1:] - crow[:-1]).long(), 0, output_size=blocks)
    return (values.to(torch.float32) * each[:, :, None]).to(dtype)


torch.library.register_autograd("trimtab::block_linear", _backward, setup_context=_setup_context)

library.register_autocast(_op.default, weight=True)
library.register_autocast(_op.inference, weight=True)


@register_flop_formula(torch.ops.trimtab.block_linear)
def _(x_shape: Any, values_shape: Any, *_: Any, **__: Any) -> int:
    """2 M times the kept weights."""
    rows = 1
    for size in x_shape[:-1]:
        rows *= size
    return 2 * rows * values_shape[0] * values_shape[1] * values_shape[2]
