"""Sums and means of rows of an int8 embedding table."""

import torch
from torch import Tensor

from . import library
from .int8_embedding import expect_table

_op = torch.ops.trimtab.int8_embedding_bag

# The numbers of tt_bag_mode in csrc/include/trimtab/int8_embedding_bag.h.
MODES = {"sum": 0, "mean": 1}


def int8_embedding_bag(
    indices: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    offsets: Tensor | None = None,
    mode: str = "mean",
    per_sample_weights: Tensor | None = None,
    padding_idx: int | None = None,
    include_last_offset: bool = False,
    out_dtype: torch.dtype = torch.float32,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Sums or means of dequantized rows, a bag at a time, in float32 and in the order of the indices.

    From ``acc = 0``, for each index i of a bag: ``t = float(weight[i]) * weight_scale[i]``, then
    ``t * per_sample_weight`` if there is one, then ``acc + t``, each step rounded. A mean is
    ``acc / count``. Indices equal to ``padding_idx`` are left out, of the count too. A bag that adds
    nothing is 0. The result is rounded once, to ``out_dtype``; the same bits on every instruction set.

    Args:
        indices: int32 or int64 [bags, n], or [n] with offsets.
        weight: int8 [V, D].
        weight_scale: float32 [V], one scale a row.
        offsets: int32 or int64, for 1-D indices: where each bag begins; the first is 0, none falls.
        mode: "sum" or "mean".
        per_sample_weights: float32, bfloat16 or float16, of the indices' shape; "sum" only.
        padding_idx: row to leave out; a negative one counts from the end.
        include_last_offset: the last offset ends the last bag and begins none.
        out_dtype: float32, bfloat16 or float16.
        out: optional contiguous [bags, D] to write to; its dtype wins over ``out_dtype``.

    Returns [bags, D]. There is no gradient: the table is fixed.

    Raises:
        RuntimeError: wrong dtype or shape, a bad index or offset (before anything is written), or
            ``weight_scale`` or ``per_sample_weights`` requires grad.
        ValueError: unknown mode, ``per_sample_weights`` with "mean", ``padding_idx`` out of range.
    """
    if mode not in MODES:
        raise ValueError(f"int8_embedding_bag: expected mode in {list(MODES)}, got {mode!r}")
    if per_sample_weights is not None and mode != "sum":
        raise ValueError(
            f"int8_embedding_bag: expected per_sample_weights with mode 'sum' only, got {mode!r}"
        )
    if torch.is_grad_enabled():
        library.refuse_grad(
            "int8_embedding_bag", weight_scale=weight_scale, per_sample_weights=per_sample_weights
        )
    if per_sample_weights is not None:
        library.expect_float("int8_embedding_bag", "per_sample_weights", per_sample_weights)
        per_sample_weights = per_sample_weights.to(torch.float32)
    if offsets is not None and {indices.dtype, offsets.dtype} == {torch.int32, torch.int64}:
        indices, offsets = indices.to(torch.int64), offsets.to(torch.int64)
    row = padding_row(padding_idx, weight.shape[0])
    bags = (offsets, MODES[mode], per_sample_weights, row, include_last_offset)
    args = (indices, weight, weight_scale, *bags)
    if out is not None:
        _op.out(*args, out=out)
        return out
    return _op.default(*args, out_dtype)


def padding_row(padding_idx: int | None, rows: int) -> int:
    """The row that ``padding_idx`` names, -1 for none."""
    if padding_idx is None:
        return -1
    if not -rows <= padding_idx < rows:
        raise ValueError(
            f"int8_embedding_bag: expected padding_idx in [-{rows}, {rows}), got {padding_idx}"
        )
    return padding_idx % rows


def _fake_sizes(
    indices: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
) -> list[int]:
    expect_table("int8_embedding_bag", indices, weight, weight_scale)
    library.expect(
        indices.dim() == (2 if offsets is None else 1),
        "int8_embedding_bag: expected indices [n] with offsets or [bags, n] without, got "
        f"{library.describe(indices)} {'without' if offsets is None else 'with offsets'}",
    )
    if offsets is None:
        return [indices.shape[0], weight.shape[1]]
    library.expect(
        offsets.dim() == 1 and offsets.dtype == indices.dtype,
        "int8_embedding_bag: expected 1-D offsets of the indices' dtype, got "
        f"{library.describe(offsets)}",
    )
    return [offsets.shape[0] - int(include_last_offset), weight.shape[1]]


@library.register_fake("trimtab::int8_embedding_bag")
def _(
    indices: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    offsets: Tensor | None = None,
    bag_mode: int = 0,
    per_sample_weights: Tensor | None = None,
    padding_idx: int = -1,
    include_last_offset: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    sizes = _fake_sizes(indices, weight, weight_scale, offsets, include_last_offset)
    return weight.new_empty(sizes, dtype=out_dtype or torch.float32)


@library.register_fake("trimtab::int8_embedding_bag.out")
def _(
    indices: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    offsets: Tensor | None = None,
    bag_mode: int = 0,
    per_sample_weights: Tensor | None = None,
    padding_idx: int = -1,
    include_last_offset: bool = False,
    *,
    out: Tensor,
) -> None:
    _fake_sizes(indices, weight, weight_scale, offsets, include_last_offset)
