"""Adafactor in Triton: one step over all tensors of a model (csrc/include/trimtab/adafactor.h).

Formulas and order of sums are csrc/math/adafactor.h's: the bits are those of the C++ kernels. As in
csrc/cuda/adafactor.cu there are at most seven launches, and nothing waits for the host:

    optim_norm_kernel, optim_prepare_kernel   as of the other rules (optim_step.py)
    adafactor_squares_kernel     sums of squares of rows and columns, tile by tile
    adafactor_average_kernel     row_var, col_var, the factors of columns
    adafactor_factors_kernel     the factors of rows
    adafactor_direction_kernel   a vector's variance; the norms of parameter and direction
    adafactor_apply_kernel       everything else

Simpler than CUDA C++: a tile of gradients is read twice, by rows and by columns, and small matrices of
a batch take a program each. Masks, averages, copies, masters and stochastic rounding are not here
(adafactor_table.covers), nor are pieces of tensors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton

from . import tuning
from .adafactor_average import (
    adafactor_average_kernel,
    adafactor_factors_kernel,
    adafactor_squares_kernel,
)
from .adafactor_table import AdafactorTable, make_table
from .adafactor_update import adafactor_apply_kernel, adafactor_direction_kernel
from .launch import on_device_of
from .optim_prepare import NORM_ROWS, PREPARE_ROWS, optim_norm_kernel, optim_prepare_kernel
from .optim_step import NUM_WARPS, OptimStep, array_at, facts_arguments
from .optim_table import TILE

EDGE = 256  # elements: two a thread
REGISTERS = 128  # of a thread: four blocks of four warps on a multiprocessor


class Adafactor(OptimStep):
    """tt_adafactor_sizes_cuda, _table_cuda and _step_cuda of csrc/include/trimtab/adafactor.h, made of
    Triton kernels; ``call`` is a ctypes structure of tt_adafactor_call's members.

    RuntimeError, which names the tensor, where a call is wrong or asks for what is not here.
    """

    def __init__(self, step: type, dtypes: tuple[np.dtype, ...], device: torch.device) -> None:
        super().__init__(dtypes[0], dtypes[1], device)
        self.call, self.dtypes = step, dtypes  # tensor, group, Adafactor's group, shape

    def sizes(self, call: Any) -> tuple[int, int]:
        """Bytes of the table, and of the workspace."""
        if call.part != 0:
            raise RuntimeError("adafactor: expected a whole step, got one in parts")
        own = self.call.from_address(call.step)
        lengths = own.n_tensors, own.n_groups, own.n_groups, own.n_tensors
        addresses = own.tensors, own.groups, call.groups, call.shapes
        arrays = map(array_at, addresses, lengths, self.dtypes)
        made, values = make_table(own, *arrays, self.device)
        self._made = call, made, values
        return values.nbytes, made.workspace_bytes

    def launch(
        self, made: AdafactorTable, call: Any, table: torch.Tensor, workspace: torch.Tensor
    ) -> None:
        if made.lengths[0]:
            with on_device_of(table):
                _launch(made, self.call.from_address(call.step), table, workspace)


def adafactor(step: type, dtypes: tuple[np.dtype, ...], device: torch.device) -> Adafactor:
    """The step for a device; ``step`` is tt_optim_call, ``dtypes`` tt_optim_tensor, tt_optim_group,
    tt_adafactor_group and tt_adafactor_shape."""
    return Adafactor(step, dtypes, device)


def _launch(made: AdafactorTable, call: Any, table: torch.Tensor, workspace: torch.Tensor) -> None:
    """The kernels of a step."""
    rows, groups, pieces, blocks, shapes, squares, of_rows, of_columns = made.parts(table)
    (
        facts,
        sums,
        norms,
        row_parts,
        means,
        constants,
        column_parts,
        row_factor,
        column_factor,
        counts,
    ) = made.workspace(workspace)
    n_rows, _, n_pieces, n_blocks, _, n_squares, n_row_pieces, n_column_pieces = made.lengths
    options: dict[str, Any] = {"num_warps": NUM_WARPS, **tuning.EXACT}
    kinds = {"KINDS": made.kinds, **options}
    adding = {"DTYPES": made.grad_dtypes, "MASKED": False, "NORM_ROWS": NORM_ROWS, **options}
    step, finding = facts_arguments(call, facts, sums)
    if finding["SUMS_SQUARES"] and n_blocks:
        grid = (triton.cdiv(n_blocks, NORM_ROWS),)
        optim_norm_kernel[grid](rows, blocks, sums, n_blocks, **adding)
    optim_prepare_kernel[(triton.cdiv(n_rows, PREPARE_ROWS),)](
        rows, *step, n_blocks, groups, constants, counts, counts, 0, n_rows,
        RULE="Adafactor", RANDOM=False, ROWS=PREPARE_ROWS, **finding, **options,
    )  # fmt: skip
    factors = row_factor, column_factor
    if n_squares:
        adafactor_squares_kernel[(n_squares,)](
            rows, shapes, squares, facts, constants, row_parts, column_parts, **kinds
        )
        adafactor_average_kernel[(n_row_pieces + n_column_pieces,)](
            rows, shapes, of_rows, of_columns, facts, constants, row_parts, column_parts, *factors,
            means, n_row_pieces, **kinds,
        )  # fmt: skip
        adafactor_factors_kernel[(n_row_pieces,)](
            rows, shapes, of_rows, groups, facts, row_factor, means, **options
        )
    if n_blocks:
        adafactor_direction_kernel[(n_blocks,)](
            rows,
            shapes,
            blocks,
            groups,
            facts,
            constants,
            *factors,
            norms,
            counts,
            n_blocks,
            **kinds,
            **tuning.registers(REGISTERS),
        )
        adafactor_apply_kernel[(n_pieces,)](
            rows, shapes, pieces, facts, constants, *factors, made.tiles,
            ZERO_GRAD=bool(call.zero_grad), BLOCK=TILE, EDGE=EDGE, **kinds,
        )  # fmt: skip
