"""The table of Adafactor's Triton kernels, made on the host: that of optim_table.py, and

shapes  [n, SHAPE]   sizes of each tensor and where its numbers lie in the workspace
squares, rows, columns  [n, 2]   tensor and number of each program of the sums, of the row averages
                     and of the column averages
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl

from . import optim_table
from .optim_constants import (
    ADAFACTOR_D,
    ADAFACTOR_EPS1,
    ADAFACTOR_EPS2,
    BETA2_DECAY,
    CONSTANTS,
)
from .optim_rules import FLAGS
from .optim_table import DTYPES, FACTS_BYTES, NORM_BLOCK, TILE, repeated

OP = "adafactor"
# csrc/math/adafactor.h, csrc/cuda/adafactor_table.cuh
TILE_ROWS, ROW_BLOCK, MEAN_ROWS = (tl.constexpr(i) for i in (64, 512, 1024))
BLOCKS = tl.constexpr(8)  # of ROW_BLOCK columns in a tile
COLUMNS = tl.constexpr(256)  # of a program of column averages

# Columns of a shape; the last five: where its numbers begin.
BATCH, HEIGHT, WIDTH, ROW_TILES, ROW_BLOCKS, MEAN_PARTS = (tl.constexpr(i) for i in range(6))
ROW_PARTS, COLUMN_PARTS, ROW_FACTOR, COLUMN_FACTOR, MEANS = (tl.constexpr(i) for i in range(6, 11))
SHAPE = tl.constexpr(11)
# Of a kind, in the place of a rule's variant.
MATRIX, LARGE = tl.constexpr(1), tl.constexpr(2)  # large: elements are numbered by int64


class AdafactorTable(NamedTuple):
    """What is known of a table on the host."""

    kinds: tuple[int, ...]  # what tensors differ in that kernels are compiled for
    grad_dtypes: tuple[int, ...]
    lengths: tuple[int, ...]  # of its arrays: rows, groups, pieces, blocks, shapes, three lists
    ends: tuple[int, ...]  # of the numbers that shapes place
    tiles: int  # of a piece

    def parts(self, table: torch.Tensor) -> list[torch.Tensor]:
        """rows, groups, pieces, blocks, shapes, squares, rows, columns, for kernels."""
        widths = optim_table.ROW.value, optim_table.GROUP.value, 2, 2, SHAPE.value, 2, 2, 2
        ends = np.cumsum([n * width for n, width in zip(self.lengths, widths, strict=True)])
        return list(table.view(torch.int64).tensor_split(ends[:-1].tolist()))

    def _workspace_parts(self) -> tuple[tuple[int, torch.dtype], ...]:
        rows, blocks = self.lengths[0], self.lengths[3]
        row_parts, column_parts, row_factor, column_factor, means = self.ends
        wide, real = torch.float64, torch.float32
        return (
            (FACTS_BYTES // 4, real),
            (blocks, wide),
            (2 * blocks, wide),
            (row_parts, wide),
            (means, wide),
            (rows * CONSTANTS.value, real),
            (column_parts, real),
            (row_factor, real),
            (column_factor, real),
            (rows, torch.int32),
        )

    @property
    def workspace_bytes(self) -> int:
        return sum(count * dtype.itemsize for count, dtype in self._workspace_parts())

    def workspace(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """Of that many bytes: facts, partial sums of the norm, those of |p|^2 and |u|^2 [2, blocks], of
        rows, of row_var; constants; partial sums of columns; factors of rows and of columns; counts."""
        parts = self._workspace_parts()
        ends = np.cumsum([count * dtype.itemsize for count, dtype in parts])[:-1]
        pieces = memory.tensor_split(ends.tolist())
        return [piece.view(dtype) for piece, (_, dtype) in zip(pieces, parts, strict=True)]


def covers(call: Any, tensors: np.ndarray) -> str:
    """What these kernels lack of what a call asks for; empty if nothing."""
    given = {"a mask": "mask", "an average": "ema", "a copy": "copy", "a master": "master_kind"}
    lacks = [what for what, name in given.items() if (tensors[name] != 0).any()]
    lacks += ["stochastic rounding"] * bool(call.stochastic)
    lacks += ["clipped gradients rounded as torch does"] * bool(call.round_clipped)
    return ", ".join(lacks)


def check(call: Any, tensors: np.ndarray, shapes: np.ndarray, groups: int) -> None:
    """RuntimeError that says which tensor is wrong; those without a gradient are not looked at."""
    if lacks := covers(call, tensors):
        raise RuntimeError(f"{OP}: CUDA C++ and the CPU have {lacks}, Triton has not")
    active = tensors["grad"] != 0

    def refuse(wrong: np.ndarray, what: str) -> None:
        if (wrong & active).any():
            at = int(np.argmax(wrong & active))
            raise RuntimeError(f"{OP}: tensor {at}: expected {what}")

    t, s = tensors, shapes
    refuse((t["numel"] < 0) | (t["numel"] >= 2**40), "0 <= numel < 2^40")
    refuse((t["group"] < 0) | (t["group"] >= groups), "group to be an index into groups")
    dtypes = np.stack([t[f"{name}_dtype"] for name in ("param", "grad", "state")])
    refuse((dtypes >= len(DTYPES)).any(axis=0), "float32, bfloat16 or float16")
    matrix, there = s["batch"] > 0, t["numel"] > 0
    product = s["batch"] * s["rows"] * s["columns"]
    refuse(matrix & (product != t["numel"]), "batch * rows * columns to be numel")
    whole = (s["whole_numel"] == t["numel"]) & (
        ~matrix | (s["whole_rows"] == s["rows"]) & (s["whole_columns"] == s["columns"])
    )
    refuse(~whole, "a whole tensor, no piece of one")
    lacks_state = (t["state"][:, 0] == 0) | matrix & (t["state"][:, 1] == 0)
    refuse(there & ((t["param"] == 0) | lacks_state), "param and its states, got NULL")
    refuse(t["step"] == 0, "step, got NULL")


def _shapes(shapes: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """The shapes of the table, and the lengths of what they place."""
    table = np.zeros((len(shapes), SHAPE.value), np.int64)
    batch, height, width = (
        np.where(steps & (shapes["batch"] > 0), shapes[name], 0)
        for name in ("batch", "rows", "columns")
    )
    tiles, blocks = -(-height // TILE_ROWS.value), -(-width // ROW_BLOCK.value)
    parts = -(-height // MEAN_ROWS.value)
    counts = (
        *(blocks * batch * height, tiles * batch * width),
        *(batch * height, batch * width, batch * parts),
    )
    columns = [batch, height, width, tiles, blocks, parts]
    columns += [np.cumsum(count) - count for count in counts]
    table[:] = np.column_stack(columns)
    return table, tuple(int(count.sum()) for count in counts)


def _rows(t: np.ndarray, matrix: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, tuple]:
    """The rows, as optim_table's but that no array is extended to the left; the kinds that occur."""
    active = t["grad"] != 0
    rows = np.zeros((len(t), optim_table.ROW.value), np.int64)
    values = {
        optim_table.PARAM: t["param"],
        optim_table.GRAD: t["grad"],
        optim_table.STEP: t["step"],
        optim_table.NUMEL: t["numel"],
        optim_table.BODY: t["numel"],
        optim_table.GROUP_AT: t["group"],
        optim_table.DTYPE: t["param_dtype"],
        optim_table.GRAD_DTYPE: t["grad_dtype"],
    }
    for column, value in values.items():
        rows[:, column.value] = value.astype(np.int64)
    rows[:, optim_table.STATE.value : optim_table.STATE.value + 2] = t["state"][:, :2].view(
        np.int64
    )
    flat = np.where(matrix, 0, t["state"][:, 0])  # a matrix's states are not its update's
    rows[:, optim_table.WIDE.value] = (t["param"] | t["grad"] | flat) % 16 == 0
    flags = groups["flags"][np.where(active, t["group"], 0)] if len(groups) else active
    rows[:, optim_table.NEGATE.value] = flags & FLAGS["maximize"] != 0
    large = t["numel"] >= 2**31 - 2 * NORM_BLOCK.value
    variant = np.where(matrix, MATRIX.value, 0) | np.where(large, LARGE.value, 0)
    kinds = optim_table.kinds_of(t, variant, np.zeros(len(t), bool), False)
    found, index = np.unique(kinds[active], return_inverse=True)
    rows[active, optim_table.KIND.value] = index
    rows[~active] = 0
    return rows, tuple(found.tolist())


def make_table(
    call: Any,
    tensors: np.ndarray,
    groups: np.ndarray,
    own_groups: np.ndarray,
    shapes: np.ndarray,
    device: torch.device,
) -> tuple[AdafactorTable, np.ndarray]:
    """Of tt_optim_tensor, tt_optim_group, tt_adafactor_group and tt_adafactor_shape; int64."""
    check(call, tensors, shapes, len(groups))
    rows, kinds = _rows(tensors, shapes["batch"] > 0, groups)
    table = np.zeros((len(groups), optim_table.GROUP.value), np.int64)
    names = {BETA2_DECAY: "beta2_decay", ADAFACTOR_EPS1: "eps1"}
    names |= {ADAFACTOR_EPS2: "eps2", ADAFACTOR_D: "d"}
    for column, name in names.items():
        table[:, column.value] = own_groups[name].view(np.int64)
    for at, name in ((0, "lr"), (4, "weight_decay"), (10, "l1"), (12, "lr_tensor")):
        table[:, at] = groups[name].view(np.int64)
    table[:, 11] = groups["flags"]
    numel = np.where(rows[:, optim_table.GRAD.value] != 0, rows[:, optim_table.NUMEL.value], 0)
    placed, ends = _shapes(shapes, numel > 0)
    batch, _, width, tiles, blocks, mean_parts = placed[:, :6].T
    n_tiles = -(-numel // TILE)
    processors = 1 << 20
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    piece = min(max(int(n_tiles.sum()) // (processors * 32), 1), 32)  # as optim_table's
    n_blocks = -(-numel // NORM_BLOCK.value)
    rows[:, optim_table.FIRST_BLOCK.value] = np.cumsum(n_blocks) - n_blocks
    lists = (batch * tiles * blocks, batch * mean_parts, -(-batch * width // COLUMNS.value))
    parts = [rows, table, repeated(-(-n_tiles // piece), piece), repeated(n_blocks), placed]
    parts += [repeated(counts) for counts in lists]
    grads = np.unique(tensors["grad_dtype"][tensors["grad"] != 0]).tolist()
    lengths = tuple(map(len, parts))
    made = AdafactorTable(kinds, tuple(grads), lengths, ends, piece)
    return made, np.concatenate([part.reshape(-1) for part in parts])
