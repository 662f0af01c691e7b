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

    made = make_table("Adam", tensors, groups, device)      when a tensor or a group changed
    kernels.load("optim_step")(made, max_norm=1.0, norm=norm)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from . import tuning
from .checks import describe
from .launch import on_device_of
from .optim_constants import CONSTANTS, THRESHOLD
from .optim_prepare import (
    NORM_ROWS,
    PREPARE_ROWS,
    dtype_of,
    optim_norm_kernel,
    optim_prepare_kernel,
)
from .optim_rules import shrink, states_of, update
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


def optim_step(
    table: OptimTable,
    *,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    max_norm: float = -1.0,
    ema_decay: float = 0.0,
    norm: torch.Tensor | None = None,
    skipped: torch.Tensor | None = None,
    given_norm: torch.Tensor | None = None,
    zero_grad: bool = False,
    skip_nonfinite: bool = False,
) -> None:
    """A step of all tensors of ``table``, with the members of tt_optim_call.

    ``table`` is of ``make_table(rule, tensors, groups, device, torch_tails=False)``: ``tensors`` and
    ``groups`` are NumPy arrays of tt_optim_tensor and tt_optim_group (trimtab.optim.library's TENSOR
    and GROUP) whose addresses are the device's. It serves every step until one of them changes.
    ``grad_scale``, ``found_inf``, ``norm`` and ``given_norm`` are one float32, ``skipped`` one int64,
    on the device.
    """
    device = table.table.device
    numbers = {
        "grad_scale": grad_scale,
        "found_inf": found_inf,
        "norm": norm,
        "skipped": skipped,
        "given_norm": given_norm,
    }
    for name, x in numbers.items():
        dtype = torch.int64 if name == "skipped" else torch.float32
        if x is not None and (x.numel() != 1 or x.dtype != dtype or x.device != device):
            raise ValueError(
                f"optim_step: expected {name} one {dtype} on {device}, got {describe(x)}"
            )
    if not table.rows:
        return
    wants_norm = max_norm >= 0.0 or skip_nonfinite or norm is not None
    sums_squares = wants_norm and (given_norm is None or skip_nonfinite)
    rows, groups, pieces, blocks = table.parts()
    options: dict[str, Any] = {"num_warps": NUM_WARPS, **tuning.EXACT}
    with on_device_of(table.table):
        if sums_squares and table.blocks:
            optim_norm_kernel[(triton.cdiv(table.blocks, NORM_ROWS),)](
                rows,
                blocks,
                table.sums,
                table.blocks,
                DTYPES=table.grad_dtypes,
                MASKED=any(kind & 8192 for kind in table.kinds),
                ROWS=NORM_ROWS,
                **options,
            )
        optim_prepare_kernel[(triton.cdiv(table.rows, PREPARE_ROWS),)](
            rows,
            groups,
            table.facts,
            table.constants,
            table.sums,
            grad_scale,
            found_inf,
            given_norm,
            norm,
            skipped,
            int(np.float64(max_norm).view(np.int64)),
            table.rows,
            table.blocks,
            RULE=table.rule,
            WANTS_NORM=wants_norm,
            SUMS_SQUARES=sums_squares,
            SKIP_NONFINITE=skip_nonfinite,
            ROWS=PREPARE_ROWS,
            **options,
        )
        if table.pieces:
            optim_update_kernel[(table.pieces,)](
                rows,
                pieces,
                table.facts,
                table.constants,
                table.tiles,
                1.0 - ema_decay,
                RULE=table.rule,
                KINDS=table.kinds,
                ZERO_GRAD=zero_grad,
                BLOCK=TILE,
                **options,
            )
