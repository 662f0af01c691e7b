"""A dense weight as the tensors of a sparse one: does it fit, how large is it, are parts sound."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import library
from ..ops.bitmap_linear import bitmap_check, bitmap_mask, bitmap_pack, bitmap_row_bytes
from ..ops.block_linear import block_check, block_pack, blocks_of
from ..ops.quantize_int8 import quantize_int8
from ..ops.sparse24_compress import (
    bitmap_to_indices,
    first_true,
    indices_to_bitmap,
    pick24,
    sparse24_check,
    sparse24_compress,
)

# The position in this tuple is the pattern's number in a checkpoint.
PATTERNS = ("bitmap", "2:4", "block")

# What a checkpoint holds beside ``values``, and what stands in memory.
SAVED = {"bitmap": ("bitmap",), "2:4": ("indices",), "block": ("crow", "col")}
RESIDENT = {
    "bitmap": ("bitmap", "row_start"),
    "2:4": ("bitmap", "row_start"),
    "block": SAVED["block"],
}

Parts = dict[str, Tensor]


class DoesNotFit(ValueError):
    """A weight that a pattern cannot hold, or not in less memory, or with a NaN in it."""


def check_pattern(op: str, pattern: str, block: Sequence[int]) -> None:
    """ValueError unless there is such a pattern, with a block of two positive integers."""
    if pattern not in PATTERNS:
        raise ValueError(f"{op}: expected pattern in {list(PATTERNS)}, got {pattern!r}")
    pair = isinstance(block, tuple | list) and len(block) == 2
    if not pair or not all(type(size) is int and size >= 1 for size in block):
        raise ValueError(
            f"{op}: expected block as (outputs, inputs), both integers >= 1, got {block!r}"
        )


def position(flat: int, shape: Sequence[int]) -> list[int]:
    """The indices of an element's place in row-major order."""
    found: list[int] = []
    for size in reversed(shape):
        flat, index = divmod(flat, size)
        found.insert(0, index)
    return found


def misfit24(mask: Tensor) -> list[int]:
    """[row, column] of the first kept weight that is the third of its group of four; [] if none is."""
    N, K = mask.shape
    groups = -(-K // 4)
    padded = torch.nn.functional.pad(mask, (0, groups * 4 - K)).reshape(N, groups, 4)
    third = (padded.cumsum(-1) == 3) & padded
    return first_true(third.reshape(N, groups * 4))


def pack(
    op: str,
    weight: Tensor,
    pattern: str,
    block: tuple[int, int] = (32, 32),
    int8: bool = False,
    mask: Tensor | None = None,
    groups: int = 1,
) -> Parts:
    """The resident tensors of ``weight`` [O, ...], whose rows are output channels.

    Each of ``groups`` equal parts of the rows starts a row of blocks of its own.

    Raises:
        RuntimeError: not float32, bfloat16 or float16, or a mask that is no bool of its shape.
        DoesNotFit: a NaN, or an Inf where int8 is asked for; a weight that does not fit the pattern
            (the first position is named); or a result larger in memory than ``weight``.
    """
    library.expect_float(op, "weight", weight)
    shape = tuple(weight.shape)
    if mask is not None:
        is_tensor = isinstance(mask, Tensor)
        library.expect(
            is_tensor and mask.dtype == torch.bool and mask.shape == weight.shape,
            f"{op}: expected mask {list(shape)} bool, got "
            f"{library.describe(mask) if is_tensor else type(mask).__name__}",
        )
    matrix = weight.detach().flatten(1)
    keep = matrix != 0 if mask is None else mask.flatten(1)
    matrix = matrix if mask is None else matrix.where(keep, matrix.new_zeros(()))
    wild = first_true(~torch.isfinite(matrix) if int8 else torch.isnan(matrix))
    if wild:
        what = "NaN or Inf, which int8 cannot hold" if int8 else "NaN"
        at = position(_flat(wild, matrix), shape)
        raise DoesNotFit(f"{op}: expected weights without {what}, got weight{at}")
    if pattern == "2:4" and (wrong := misfit24(keep)):
        row, column = wrong[0], wrong[1] // 4 * 4
        raise DoesNotFit(
            f"{op}: expected at most 2 of each 4 adjacent weights of an output channel (2:4), got a "
            f"third at weight{position(_flat(wrong, matrix), shape)}: row {row}, columns {column} to "
            f"{min(column + 3, matrix.shape[1] - 1)}; prune it first"
        )
    scale = None
    if int8:
        matrix, scale = quantize_int8(matrix)
        keep = keep if pattern == "2:4" else matrix != 0  # int8 values are fixed: no zero is of use
    if pattern == "2:4" and mask is None and not int8:  # its nonzeros are the largest of each four
        parts = resident24(*sparse24_compress(matrix), matrix.shape[1])
    else:
        parts = _pack(matrix, keep, pattern, block, groups)
    if scale is not None:
        parts["weight_scale"] = scale
    held, dense = size(parts), weight.numel() * weight.element_size()
    if held > dense:
        what = f"{pattern} {block[0]}x{block[1]}" if pattern == "block" else pattern
        kept = 1 - int(keep.sum()) / max(keep.numel(), 1)
        raise DoesNotFit(
            f"{op}: expected a weight that {what} makes smaller, got {held:,} bytes instead of the "
            f"{dense:,} of {library.describe(weight)}, at a sparsity of {kept:.2f}"
        )
    return parts


def _flat(index: Sequence[int], matrix: Tensor) -> int:
    return index[0] * matrix.shape[1] + index[1]


def _pack(matrix: Tensor, keep: Tensor, pattern: str, block: tuple[int, int], groups: int) -> Parts:
    if pattern == "bitmap":
        values, bitmap, row_start = bitmap_pack(matrix, keep)
        return {"values": values, "bitmap": bitmap, "row_start": row_start}
    if pattern == "2:4":
        values, indices = pick24(matrix, keep.to(torch.int8))
        return resident24(values, indices, matrix.shape[1])
    matrix, keep = (padded_groups(part, groups, block[0]) for part in (matrix, keep))
    values, crow, col = block_pack(matrix, block, keep, refuse_larger=False)
    return {"values": values, "crow": crow, "col": col}


def padded_groups(matrix: Tensor, groups: int, bn: int) -> Tensor:
    """Zero rows behind each group's, up to whole blocks; with one group block_pack itself pads."""
    rows = matrix.shape[0] // groups
    if groups == 1 or rows % bn == 0:
        return matrix
    apart = matrix.reshape(groups, rows, matrix.shape[1])
    return torch.nn.functional.pad(apart, (0, 0, 0, -rows % bn)).flatten(0, 1)


def size(parts: Parts) -> int:
    """Bytes in all."""
    return sum(part.numel() * part.element_size() for part in parts.values())


def resident24(values: Tensor, indices: Tensor, K: int) -> Parts:
    """A 2:4 weight [N, K] as the bitmap weight that it is: the same values in the same order."""
    N, width = values.shape
    row_start = torch.arange(N + 1, device=values.device) * width
    bitmap = indices_to_bitmap(indices, K)
    return {"values": values.reshape(-1), "bitmap": bitmap, "row_start": row_start}


def saved_form(parts: Parts, pattern: str, N: int, K: int) -> Parts:
    """What a checkpoint holds of resident tensors."""
    scale = {"weight_scale": parts["weight_scale"]} if "weight_scale" in parts else {}
    if pattern == "2:4":
        values = parts["values"].reshape(N, -(-K // 4) * 2)
        return {"values": values, "indices": bitmap_to_indices(parts["bitmap"], K), **scale}
    return {name: parts[name] for name in ("values", *SAVED[pattern])} | scale


def empty(
    pattern: str, block: tuple[int, int], int8: bool, N: int, K: int, rows: int,
    dtype: torch.dtype, device: torch.device | str | None,
) -> Parts:  # fmt: skip
    """An all-zero weight with N outputs; ``rows`` counts the padding of groups too."""

    def zeros(*sizes: int, of: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(*sizes, dtype=of, device=device)

    of = torch.int8 if int8 else dtype
    if pattern == "bitmap":
        bitmap = zeros(N, bitmap_row_bytes(K), of=torch.uint8)
        parts = {
            "values": zeros(0, of=of),
            "bitmap": bitmap,
            "row_start": zeros(N + 1, of=torch.int64),
        }
    elif pattern == "2:4":
        groups = -(-K // 4)
        codes = zeros(N, -(-groups // 2), of=torch.uint8) + 0x44  # positions 0 and 1
        if groups % 2:
            codes[:, -1] = 0x04
        parts = resident24(zeros(N, groups * 2, of=of), codes, K)
    else:
        crow = zeros(blocks_of(rows, block[0]) + 1)
        parts = {"values": zeros(0, *block, of=of), "crow": crow, "col": zeros(0)}
    return parts | ({"weight_scale": zeros(N, of=torch.float32)} if int8 else {})


def check_saved(
    saved: Parts, pattern: str, block: tuple[int, int], int8: bool, N: int, K: int, rows: int
) -> Parts:
    """The resident tensors of a checkpoint's; RuntimeError says what is wrong with them."""
    for name, given in saved.items():
        got = given.layout if isinstance(given, Tensor) else type(given).__name__
        library.expect(got == torch.strided, f"expected {name} as a dense tensor, got {got}")
    values = saved["values"]
    on_meta = any(part.device.type == "meta" for part in saved.values())
    kind = "int8" if int8 else "float32, bfloat16 or float16"
    library.expect(
        values.dtype == torch.int8 if int8 else values.dtype in library.FLOAT_DTYPES,
        f"expected values of {kind}, got {library.describe(values)}",
    )
    if int8:
        scale = saved["weight_scale"]
        library.expect(
            scale.dtype == torch.float32 and tuple(scale.shape) == (N,),
            f"expected weight_scale [{N}] float32, got {library.describe(scale)}",
        )
    if not on_meta:
        for name in ("values", "weight_scale"):
            part = saved.get(name)
            if part is not None and part.is_floating_point() and (nan := first_true(part.isnan())):
                raise RuntimeError(f"expected no NaN, got one at {name}{nan}")
    if pattern == "block":
        library.expect(
            values.dim() == 3 and tuple(values.shape[1:]) == block,
            f"expected values [blocks, {block[0]}, {block[1]}], got {library.describe(values)}",
        )
        if not on_meta:
            block_check(values, saved["crow"], saved["col"], rows, K)
        return dict(saved)
    scales = {"weight_scale": saved["weight_scale"]} if int8 else {}
    if pattern == "2:4":
        sparse24_check(values, saved["indices"], K)
        library.expect(
            values.shape[0] == N, f"expected values of {N} rows, got {library.describe(values)}"
        )
        return resident24(values, saved["indices"], K) | scales
    bitmap = saved["bitmap"]
    library.expect(
        bitmap.dim() == 2 and bitmap.shape[0] == N,
        f"expected bitmap of {N} rows, got {library.describe(bitmap)}",
    )
    row_start = torch.empty(N + 1, dtype=torch.int64, device=bitmap.device)
    if not on_meta:
        row_start = bitmap_check(values, bitmap, K=K)
    return {"values": values, "bitmap": bitmap, "row_start": row_start} | scales


def dense_matrix(parts: Parts, pattern: str, rows: int, K: int) -> Tensor:
    """[rows, K] of values' dtype, zeros where nothing is kept; differentiable in ``values``."""
    from ..ops.block_linear import block_unpack

    values = parts["values"]
    if pattern == "block":
        return block_unpack(values, parts["crow"], parts["col"], rows, K)
    wide = -(-K // 4) * 4 if pattern == "2:4" else K
    mask = bitmap_mask(parts["bitmap"], wide)
    zeros = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    return zeros.masked_scatter(mask, values)[:, :K]
