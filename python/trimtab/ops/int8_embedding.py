"""Rows of an int8 embedding table."""

import torch
from torch import Tensor

from . import library

_op = torch.ops.trimtab.int8_embedding


def int8_embedding(
    indices: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    out_dtype: torch.dtype = torch.float32,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """``float(weight[indices]) * weight_scale[indices]``: one product, rounded once to ``out_dtype``.

    Args:
        indices: int32 or int64, any rank, any strides.
        weight: int8 [V, D].
        weight_scale: float32 [V], one scale a row.
        out_dtype: float32, bfloat16 or float16.
        out: optional contiguous [..., D] to write to; its dtype wins over ``out_dtype``.

    Returns [..., D]. There is no gradient: the table is fixed and indices have none.

    Raises:
        RuntimeError: wrong dtype or shape, ``weight_scale`` requires grad, or an index outside [0, V),
            named with its position, before anything is written.
    """
    if torch.is_grad_enabled():
        library.refuse_grad("int8_embedding", weight_scale=weight_scale)
    if out is not None:
        _op.out(indices, weight, weight_scale, out=out)
        return out
    return _op.default(indices, weight, weight_scale, out_dtype)


def expect_table(op: str, indices: Tensor, weight: Tensor, weight_scale: Tensor) -> None:
    """What EmbeddingArgs of csrc/torch/int8_embedding.h checks, for fakes."""
    library.expect(
        indices.dtype in (torch.int32, torch.int64),
        f"{op}: expected indices of int32 or int64, got {library.describe(indices)}",
    )
    library.expect(
        weight.dtype == torch.int8 and weight.dim() == 2,
        f"{op}: expected weight of 2-D int8, got {library.describe(weight)}",
    )
    library.expect(
        weight_scale.dtype == torch.float32 and tuple(weight_scale.shape) == (weight.shape[0],),
        f"{op}: expected weight_scale [V={weight.shape[0]}] float32, got "
        f"{library.describe(weight_scale)}",
    )


@library.register_fake("trimtab::int8_embedding")
def _(
    indices: Tensor, weight: Tensor, weight_scale: Tensor, out_dtype: torch.dtype | None = None
) -> Tensor:
    expect_table("int8_embedding", indices, weight, weight_scale)
    return weight.new_empty([*indices.shape, weight.shape[1]], dtype=out_dtype or torch.float32)


@library.register_fake("trimtab::int8_embedding.out")
def _(indices: Tensor, weight: Tensor, weight_scale: Tensor, *, out: Tensor) -> None:
    expect_table("int8_embedding", indices, weight, weight_scale)
