"""optim_step in Triton: one optimizer step over all tensors of a model (NUMERICS.md section 6).

What it computes is in csrc/include/trimtab/optim_step.h, and how in csrc/cuda/optim_step.cu: at most
three launches for any number of tensors, and nothing waits for the host.

    optim_norm_kernel      partial sums of squares of the gradients, where a norm is asked for
    optim_prepare_kernel   the norm, the clip coefficient, whether to skip; each tensor's constants and
                           step count
    optim_update_kernel    everything else: every element comes from memory and goes back once

LAMB has optim_probe_kernel before the update: the norms of each tensor and of its direction. Where a
norm of all gradients is asked for too, the first launch is optim_norm_and_constants_kernel, and the
probe adds up.

The tensors are addresses in a table (optim_table.py). What they differ in beyond numbers (dtypes,
flags, whether there is a mask) makes kinds; the update is compiled for those of a model and each
program runs that of its tensor. The bits are those of the C++ kernels.

    functions = kernels.load("optim_step")(TENSOR, GROUP, device)   as trimtab.optim.device calls it
    functions.step(call, table, workspace, None)
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
import triton

from . import tuning
from .launch import on_device_of
from .optim_prepare import (
    NORM_ROWS,
    PREPARE_ROWS,
    optim_norm_and_constants_kernel,
    optim_norm_kernel,
    optim_prepare_kernel,
)
from .optim_probe import REGISTERS, optim_probe_kernel
from .optim_rules import RULES
from .optim_table import TILE, OptimTable, make_table
from .optim_update import EDGE, most_registers, optim_update_kernel

NUM_WARPS = 4


class OptimStep:
    """tt_optim_step_sizes_cuda, _table_cuda and _step_cuda of csrc/include/trimtab/optim_step.h, made
    of Triton kernels; ``call`` is a ctypes structure of tt_optim_call's members.

    RuntimeError, which names the tensor, where a call is wrong or asks for what only the CPU has.
    """

    def __init__(self, tensor: np.dtype, group: np.dtype, device: torch.device) -> None:
        self.tensor, self.group, self.device = tensor, group, device
        self._made: tuple[Any, Any, np.ndarray] | None = None  # with the call it is for
        self._known: dict[int, Any] = {}  # by where a table lies on the device

    def sizes(self, call: Any) -> tuple[int, int]:
        """Bytes of the table, and of the workspace."""
        rule = RULES[call.rule] if 0 <= call.rule < len(RULES) else f"rule {call.rule}"
        if call.round_clipped:
            raise RuntimeError("optim_step: round_clipped is the CPU's only")
        tensors = array_at(call.tensors, call.n_tensors, self.tensor)
        groups = array_at(call.groups, call.n_groups, self.group)
        options = bool(call.torch_tails), bool(call.stochastic)
        made, values = make_table(rule, tensors, groups, *options, self.device)
        self._made = call, made, values
        return values.nbytes, made.workspace_bytes

    def table(self, call: Any, table: torch.Tensor) -> None:
        """Writes the table into memory of the host, to be copied to the device."""
        if self._made is None or self._made[0] is not call:
            self.sizes(call)
        assert self._made is not None
        table.numpy().view(np.int64)[:] = self._made[2]

    def step(
        self, call: Any, table: torch.Tensor, workspace: torch.Tensor, stream: int | None
    ) -> None:
        """A step on the current stream of torch, which ``stream`` is."""
        if self._made is not None:
            self._known[table.data_ptr()] = self._made[1]
            self._made = None
        self.launch(self._known[table.data_ptr()], call, table, workspace)

    def launch(self, made: Any, call: Any, table: torch.Tensor, workspace: torch.Tensor) -> None:
        launch(made, call, table, workspace)

    def squares(self, *arguments: Any) -> None:
        raise RuntimeError(
            "optim_step: a DTensor on a GPU without CUDA C++; expected that for LAMB, whose processes "
            "add up the norms of their pieces"
        )

    step_by = squares


def optim_step(tensor: np.dtype, group: np.dtype, device: torch.device) -> OptimStep:
    """The step for a device; ``tensor`` and ``group`` are tt_optim_tensor and tt_optim_group."""
    return OptimStep(tensor, group, device)


def array_at(address: int | None, count: int, dtype: np.dtype) -> np.ndarray:
    if not count:
        return np.zeros(0, dtype)
    size = count * dtype.itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype)


def launch(made: OptimTable, call: Any, table: torch.Tensor, workspace: torch.Tensor) -> None:
    """The kernels of a step."""
    if not made.rows:
        return
    rows, _, pieces, _, codes = made.parts(table)
    facts, _, _, constants, keys, _ = made.workspace(workspace)
    with on_device_of(table):
        _before_update(made, call, table, workspace)
        if made.pieces:
            optim_update_kernel[(made.pieces,)](
                rows,
                pieces,
                codes,
                facts,
                constants,
                keys,
                made.tiles,
                1.0 - call.ema_decay,
                RULE=made.rule,
                KINDS=made.kinds,
                ZERO_GRAD=bool(call.zero_grad),
                BLOCK=TILE,
                EDGE=EDGE,
                num_warps=NUM_WARPS,
                **tuning.EXACT,
                **tuning.registers(most_registers(made.rule, made.kinds)),
            )


def facts_arguments(
    call: Any, facts: torch.Tensor, sums: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, bool]]:
    """What a kernel is given that finds the scale, the clip coefficient and whether to skip."""
    wants_norm = bool(call.max_norm >= 0.0 or call.skip_nonfinite or call.norm)
    step = (facts, sums, call.grad_scale or 0, call.found_inf or 0, call.given_norm or 0)
    step += (call.norm or 0, call.skipped or 0, int(np.float64(call.max_norm).view(np.int64)))
    return step, {
        "WANTS_NORM": wants_norm,
        "SUMS_SQUARES": wants_norm and bool(not call.given_norm or call.skip_nonfinite),
        "SKIP_NONFINITE": bool(call.skip_nonfinite),
    }


def _before_update(
    made: OptimTable, call: Any, table: torch.Tensor, workspace: torch.Tensor
) -> None:
    """One launch without a norm and without a probe, else two."""
    rows, groups, _, blocks, codes = made.parts(table)
    facts, sums, probe_sums, constants, keys, counts = made.workspace(workspace)
    step, finding = facts_arguments(call, facts, sums)
    sums_squares = finding["SUMS_SQUARES"]
    probe_prepares = made.probes and sums_squares and made.blocks > 0
    options: dict[str, Any] = {"num_warps": NUM_WARPS, **tuning.EXACT}
    # What makes the constants of each tensor.
    making = (groups, constants, keys, counts, int(np.uint64(call.seed).view(np.int64)), made.rows)
    made_of = {"RULE": made.rule, "RANDOM": made.stochastic, "ROWS": PREPARE_ROWS, **options}
    adding = {"DTYPES": made.grad_dtypes, "MASKED": made.masked, "NORM_ROWS": NORM_ROWS}
    norm_grid = triton.cdiv(made.blocks, NORM_ROWS)
    prepare_grid = triton.cdiv(made.rows, PREPARE_ROWS)
    if probe_prepares:
        optim_norm_and_constants_kernel[(norm_grid + prepare_grid,)](
            rows, blocks, sums, made.blocks, *making, norm_grid, **adding, **made_of
        )
    else:
        if sums_squares and made.blocks:
            optim_norm_kernel[(norm_grid,)](rows, blocks, sums, made.blocks, **adding, **options)
        optim_prepare_kernel[(prepare_grid,)](
            rows, *step, made.blocks, *making, **finding, **made_of
        )
    if made.probes and made.blocks:
        probe_grid = min(made.blocks, made.processors * 4) if probe_prepares else made.blocks
        optim_probe_kernel[(probe_grid,)](
            rows, *step, made.blocks, blocks, codes, constants, keys, probe_sums, counts, made.rows,
            RULE=made.rule, KINDS=made.kinds, PREPARES=probe_prepares, ROWS=PREPARE_ROWS,
            **finding, **options, **tuning.registers(REGISTERS),
        )  # fmt: skip
