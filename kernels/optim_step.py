"""optim_step in Triton: one optimizer step over all tensors of a model (NUMERICS.md section 6).

What it computes is in csrc/include/trimtab/optim_step.h, and how in csrc/cuda/optim_step.cu: at most
three launches for any number of tensors, and nothing waits for the host.

    optim_norm_kernel      partial sums of squares of the gradients, where a norm is asked for
    optim_prepare_kernel   the norm, the clip coefficient, whether to skip; each tensor's constants and
                           step count
    optim_update_kernel    everything else: every element comes from memory and goes back once

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
import triton.language as tl

from . import tuning
from .launch import on_device_of
from .optim_constants import CONSTANTS, THRESHOLD
from .optim_prepare import (
    NORM_ROWS,
    PREPARE_ROWS,
    dtype_of,
    optim_norm_kernel,
    optim_prepare_kernel,
)
from .optim_rules import RULES, shrink, states_of, update
from .optim_table import (
    BODY,
    COPY,
    EMA,
    GRAD,
    KIND,
    MASK,
    NEGATE,
    NUMEL,
    PARAM,
    ROW,
    SHIFT,
    STATE,
    TILE,
    WIDE,
    OptimTable,
    make_table,
)

NUM_WARPS = 4


# --- the update


@triton.jit
def _pointer(address, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    pointer = address.to(tl.pointer_type(DTYPE))
    if WHOLE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _load(address, offs, inside, DTYPE: tl.constexpr):
    if inside is None:
        return tl.load(_pointer(address, DTYPE, True) + offs)
    else:
        return tl.load(_pointer(address, DTYPE, False) + offs, mask=inside, other=0)


@triton.jit
def _store(address, offs, inside, x, DTYPE: tl.constexpr):
    if inside is None:
        tl.store(_pointer(address, DTYPE, True) + offs, x.to(DTYPE))
    else:
        tl.store(_pointer(address, DTYPE, False) + offs, x.to(DTYPE), mask=inside)


@triton.jit
def _load_states(s, offs, inside, COUNT: tl.constexpr, DTYPE: tl.constexpr):
    if COUNT == 0:
        return ()
    elif COUNT == 1:
        return (_load(s[0], offs, inside, DTYPE).to(tl.float32),)
    elif COUNT == 2:
        return (
            _load(s[0], offs, inside, DTYPE).to(tl.float32),
            _load(s[1], offs, inside, DTYPE).to(tl.float32),
        )
    else:
        return (
            _load(s[0], offs, inside, DTYPE).to(tl.float32),
            _load(s[1], offs, inside, DTYPE).to(tl.float32),
            _load(s[2], offs, inside, DTYPE).to(tl.float32),
        )


@triton.jit
def _update_tile(
    addresses,  # param, grad, ema, copy, mask
    states,  # of the states
    c,  # the tensor's constants, the threshold last
    facts,  # scale, clip, sign, 1 - ema_decay
    offs,
    inside,  # which elements are there; None: all, and they are aligned
    tail,  # which of them are of torch's tail; None: none
    RULE: tl.constexpr,
    KIND_BITS: tl.constexpr,
    ZERO_GRAD: tl.constexpr,
):
    PARAM_DTYPE: tl.constexpr = dtype_of(KIND_BITS >> 5 & 3)
    GRAD_DTYPE: tl.constexpr = dtype_of(KIND_BITS >> 7 & 3)
    STATE_DTYPE: tl.constexpr = dtype_of(KIND_BITS >> 9 & 3)
    VARIANT: tl.constexpr = KIND_BITS & 31
    COUNT: tl.constexpr = states_of(RULE, VARIANT)
    p = _load(addresses[0], offs, inside, PARAM_DTYPE).to(tl.float32)
    g = _load(addresses[1], offs, inside, GRAD_DTYPE).to(tl.float32)
    s = _load_states(states, offs, inside, COUNT, STATE_DTYPE)
    scale, clip, sign = facts[0], facts[1], facts[2]
    if (scale != 1.0) | (clip != 1.0) | (sign != 1.0):
        g = tl.div_rn(g, scale) * clip * sign
    p, s = update(c, p, g, s, tail, RULE, VARIANT)
    if c[10] > 0.0:
        p = shrink(p, c[10])
    if KIND_BITS & 8192:
        keep = _load(addresses[4], offs, inside, tl.uint8) != 0
        p = tl.where(keep, p, 0.0)
    rounded = p.to(PARAM_DTYPE)
    _store(addresses[0], offs, inside, rounded, PARAM_DTYPE)
    for k in tl.static_range(COUNT):
        x = s[k]
        if KIND_BITS & 8192:
            x = tl.where(keep, x, 0.0)
        _store(states[k], offs, inside, x, STATE_DTYPE)
    if KIND_BITS >> 11 & 3:
        _store(addresses[3], offs, inside, p, dtype_of((KIND_BITS >> 11 & 3) - 1))
    if KIND_BITS & 16384:
        e = _load(addresses[2], offs, inside, tl.float32)
        e = tl.fma(rounded.to(tl.float32) - e, facts[3], e)
        _store(addresses[2], offs, inside, e, tl.float32)
    if ZERO_GRAD:
        _store(addresses[1], offs, inside, tl.zeros_like(g), GRAD_DTYPE)


@triton.jit
def _update_piece(
    row,
    first,
    tiles,
    facts_ptr,
    constants_ptr,
    ema_rest,
    RULE: tl.constexpr,
    KIND_BITS: tl.constexpr,
    ZERO_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    begin = tl.load(row + SHIFT)
    end = begin + tl.load(row + NUMEL)
    body = begin + tl.load(row + BODY)
    wide = tl.load(row + WIDE) != 0
    grad = tl.load(row + GRAD)
    last = tl.minimum(first + tiles, tl.cdiv(end, BLOCK))
    if tl.load(facts_ptr + 2) == 0.0:
        addresses = (
            tl.load(row + PARAM),
            grad,
            tl.load(row + EMA),
            tl.load(row + COPY),
            tl.load(row + MASK),
        )
        states = (tl.load(row + STATE), tl.load(row + STATE + 1), tl.load(row + STATE + 2))
        c = _constants(constants_ptr)
        sign = tl.where(tl.load(row + NEGATE) != 0, -1.0, 1.0)
        facts = (tl.load(facts_ptr), tl.load(facts_ptr + 1), sign, ema_rest)
        for tile in range(first, last):
            offs = tile * BLOCK + tl.arange(0, BLOCK)
            if wide & (tile * BLOCK >= begin) & (tile * BLOCK + BLOCK <= body):
                _update_tile(
                    addresses, states, c, facts, offs, None, None, RULE, KIND_BITS, ZERO_GRAD
                )
            else:
                inside = (offs >= begin) & (offs < end)
                if KIND_BITS & 32768:
                    tail = offs >= body
                else:
                    tail = None
                _update_tile(
                    addresses, states, c, facts, offs, inside, tail, RULE, KIND_BITS, ZERO_GRAD
                )
    elif ZERO_GRAD:
        for tile in range(first, last):
            offs = tile * BLOCK + tl.arange(0, BLOCK)
            inside = (offs >= begin) & (offs < end)
            zero = tl.zeros([BLOCK], tl.float32)
            _store(grad, offs, inside, zero, dtype_of(KIND_BITS >> 7 & 3))


@triton.jit
def _constants(at):
    """All of a tensor's; those that a rule does not read are not loaded."""
    return (
        tl.load(at),
        tl.load(at + 1),
        tl.load(at + 2),
        tl.load(at + 3),
        tl.load(at + 4),
        tl.load(at + 5),
        tl.load(at + 6),
        tl.load(at + 7),
        tl.load(at + 8),
        tl.load(at + 9),
        tl.load(at + THRESHOLD),
    )


@triton.jit(do_not_specialize=["tiles", "ema_rest"])
def optim_update_kernel(
    table_ptr,  # rows
    pieces_ptr,
    facts_ptr,
    constants_ptr,
    tiles,  # of a piece
    ema_rest,
    RULE: tl.constexpr,
    KINDS: tl.constexpr,
    ZERO_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    piece = pieces_ptr + tl.program_id(0).to(tl.int64) * 2
    number, first = tl.load(piece), tl.load(piece + 1)
    row = table_ptr + number * ROW
    constants = constants_ptr + number * CONSTANTS
    if len(KINDS) == 1:
        _update_piece(
            row, first, tiles, facts_ptr, constants, ema_rest, RULE, KINDS[0], ZERO_GRAD, BLOCK
        )
    else:
        kind = tl.load(row + KIND)
        for i in tl.static_range(len(KINDS)):
            if kind == i:
                _update_piece(
                    row,
                    first,
                    tiles,
                    facts_ptr,
                    constants,
                    ema_rest,
                    RULE,
                    KINDS[i],
                    ZERO_GRAD,
                    BLOCK,
                )


# --- the launcher


class OptimStep:
    """tt_optim_step_sizes_cuda, _table_cuda and _step_cuda of csrc/include/trimtab/optim_step.h, made
    of Triton kernels; ``call`` is a ctypes structure of tt_optim_call's members.

    RuntimeError, which names the tensor, where a call is wrong or asks for what only the CPU has.
    """

    def __init__(self, tensor: np.dtype, group: np.dtype, device: torch.device) -> None:
        self.tensor, self.group, self.device = tensor, group, device
        self._made: tuple[Any, OptimTable, np.ndarray] | None = None  # with the call it is for
        self._known: dict[int, OptimTable] = {}  # by where a table lies on the device

    def sizes(self, call: Any) -> tuple[int, int]:
        """Bytes of the table, and of the workspace."""
        rule = RULES[call.rule] if 0 <= call.rule < len(RULES) else f"rule {call.rule}"
        for name in ("round_clipped", "stochastic"):
            if getattr(call, name):
                raise RuntimeError(f"optim_step: {name} is the CPU's only")
        tensors = _array(call.tensors, call.n_tensors, self.tensor)
        groups = _array(call.groups, call.n_groups, self.group)
        made, values = make_table(rule, tensors, groups, bool(call.torch_tails), self.device)
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
        launch(self._known[table.data_ptr()], call, table, workspace)


def optim_step(tensor: np.dtype, group: np.dtype, device: torch.device) -> OptimStep:
    """The step for a device; ``tensor`` and ``group`` are tt_optim_tensor and tt_optim_group."""
    return OptimStep(tensor, group, device)


def _array(address: int | None, count: int, dtype: np.dtype) -> np.ndarray:
    if not count:
        return np.zeros(0, dtype)
    size = count * dtype.itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype)


def launch(made: OptimTable, call: Any, table: torch.Tensor, workspace: torch.Tensor) -> None:
    """The kernels of a step."""
    if not made.rows:
        return
    wants_norm = bool(call.max_norm >= 0.0 or call.skip_nonfinite or call.norm)
    sums_squares = wants_norm and bool(not call.given_norm or call.skip_nonfinite)
    rows, groups, pieces, blocks = made.parts(table)
    facts, constants, sums = made.workspace(workspace)
    options: dict[str, Any] = {"num_warps": NUM_WARPS, **tuning.EXACT}
    with on_device_of(table):
        if sums_squares and made.blocks:
            optim_norm_kernel[(triton.cdiv(made.blocks, NORM_ROWS),)](
                rows,
                blocks,
                sums,
                made.blocks,
                DTYPES=made.grad_dtypes,
                MASKED=made.masked,
                ROWS=NORM_ROWS,
                **options,
            )
        optim_prepare_kernel[(triton.cdiv(made.rows, PREPARE_ROWS),)](
            rows,
            groups,
            facts,
            constants,
            sums,
            call.grad_scale or 0,
            call.found_inf or 0,
            call.given_norm or 0,
            call.norm or 0,
            call.skipped or 0,
            int(np.float64(call.max_norm).view(np.int64)),
            made.rows,
            made.blocks,
            RULE=made.rule,
            WANTS_NORM=wants_norm,
            SUMS_SQUARES=sums_squares,
            SKIP_NONFINITE=bool(call.skip_nonfinite),
            ROWS=PREPARE_ROWS,
            **options,
        )
        if made.pieces:
            optim_update_kernel[(made.pieces,)](
                rows,
                pieces,
                facts,
                constants,
                made.tiles,
                1.0 - call.ema_decay,
                RULE=made.rule,
                KINDS=made.kinds,
                ZERO_GRAD=bool(call.zero_grad),
                BLOCK=TILE,
                **options,
            )
