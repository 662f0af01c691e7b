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
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from . import tuning
from .launch import on_device_of
from .optim_constants import CONSTANTS, THRESHOLD
from .optim_memory import (
    CODE_FLOATS,
    KEY_WORDS,
    decode,
    encode,
    join_remainder,
    lost,
    random_bits,
    split_remainder,
    stochastic_bf16,
)
from .optim_prepare import (
    NORM_ROWS,
    PREPARE_ROWS,
    dtype_of,
    optim_norm_kernel,
    optim_prepare_kernel,
)
from .optim_rules import RULES, is_signed, shrink, states_of, update
from .optim_table import (
    BODY,
    COPY,
    COPY_AT,
    EMA,
    GRAD,
    GRAD_KIND_AT,
    HAS_EMA,
    HAS_MASK,
    KIND,
    MASK,
    MASTER,
    MASTER_AT,
    NEGATE,
    NUMEL,
    PARAM,
    PARAM_AT,
    ROW,
    SCALE,
    SHIFT,
    STATE,
    STATE_AT,
    STOCHASTIC,
    TAILS,
    TILE,
    WIDE,
    OptimTable,
    field,
    has,
    make_table,
)

EDGE = 256  # elements: two a thread; a block of 8-bit states
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
def _open_state(k: tl.constexpr, m, offs, inside, RULE: tl.constexpr, KIND_BITS: tl.constexpr):
    """State k as fp32."""
    if field(KIND_BITS, STATE_AT) == 3:
        codes = _load(m.states[k], offs, inside, tl.uint8)
        SIGNED: tl.constexpr = is_signed(RULE, k)
        return decode(_code_table(m, SIGNED), codes, m.scales[k], offs, inside, SIGNED)
    else:
        return _load(m.states[k], offs, inside, dtype_of(field(KIND_BITS, STATE_AT))).to(tl.float32)


@triton.jit
def _close_state(k: tl.constexpr, x, m, offs, inside, RULE: tl.constexpr, KIND_BITS: tl.constexpr):
    RANDOM: tl.constexpr = has(KIND_BITS, STOCHASTIC)
    if field(KIND_BITS, STATE_AT) == 3:
        SIGNED: tl.constexpr = is_signed(RULE, k)
        BLOCK: tl.constexpr = x.shape[0]
        key = m.keys + 2 + 2 * k
        table = _code_table(m, SIGNED)
        codes = encode(table, x, m.scales[k], offs, inside, key, SIGNED, RANDOM, BLOCK)
        _store(m.states[k], offs, inside, codes, tl.uint8)
    else:
        DTYPE: tl.constexpr = dtype_of(field(KIND_BITS, STATE_AT))
        if RANDOM and DTYPE == tl.bfloat16:
            x = stochastic_bf16(x, random_bits(m.keys + 2 + 2 * k, offs - m.shift))
        _store(m.states[k], offs, inside, x, DTYPE)


@triton.jit
def _code_table(m, SIGNED: tl.constexpr):
    return m.codes if SIGNED else m.codes + CODE_FLOATS


@triton.jit
def _open_param(m, offs, inside, KIND_BITS: tl.constexpr):
    """The parameter, or its master, as fp32."""
    if field(KIND_BITS, MASTER_AT) == 2:
        param = _load(m.param, offs, inside, tl.int16)
        return join_remainder(param, _load(m.master, offs, inside, tl.int16))
    else:
        p = _load(m.param, offs, inside, dtype_of(field(KIND_BITS, PARAM_AT))).to(tl.float32)
        if field(KIND_BITS, MASTER_AT) == 1:
            p = p + _load(m.master, offs, inside, tl.bfloat16).to(tl.float32)
        return p


@triton.jit
def _close_param(p, m, offs, inside, KIND_BITS: tl.constexpr):
    """Stores it; returns what a weight average takes."""
    if field(KIND_BITS, MASTER_AT) == 2:
        param, remainder = split_remainder(p)
        _store(m.param, offs, inside, param, tl.int16)
        _store(m.master, offs, inside, remainder, tl.int16)
        return p
    else:
        DTYPE: tl.constexpr = dtype_of(field(KIND_BITS, PARAM_AT))
        if field(KIND_BITS, MASTER_AT) == 1:
            rounded = p.to(DTYPE)
            rest = lost(p, rounded.to(tl.float32))
            _store(m.master, offs, inside, rest, tl.bfloat16)
        elif has(KIND_BITS, STOCHASTIC) and DTYPE == tl.bfloat16:
            rounded = stochastic_bf16(p, random_bits(m.keys, offs - m.shift))
        else:
            rounded = p.to(DTYPE)
        _store(m.param, offs, inside, rounded, DTYPE)
        return p if field(KIND_BITS, MASTER_AT) == 1 else rounded.to(tl.float32)


@triton.jit
def _update_tile(
    m,  # the tensor's Memory
    f,  # its Facts
    offs,
    inside,  # which elements are there; None: all, and they are aligned
    tail,  # which of them are of torch's tail; None: none
    RULE: tl.constexpr,
    KIND_BITS: tl.constexpr,
    ZERO_GRAD: tl.constexpr,
):
    GRAD_DTYPE: tl.constexpr = dtype_of(field(KIND_BITS, GRAD_KIND_AT))
    VARIANT: tl.constexpr = KIND_BITS & 31
    COUNT: tl.constexpr = states_of(RULE, VARIANT)
    p = _open_param(m, offs, inside, KIND_BITS)
    g = _load(m.grad, offs, inside, GRAD_DTYPE).to(tl.float32)
    s = ()
    for k in tl.static_range(COUNT):
        s = s + (_open_state(k, m, offs, inside, RULE, KIND_BITS),)
    if (f.scale != 1.0) | (f.clip != 1.0) | (f.sign != 1.0):
        g = tl.div_rn(g, f.scale) * f.clip * f.sign
    p, s = update(f.constants, p, g, s, tail, RULE, VARIANT)
    if f.threshold > 0.0:
        p = shrink(p, f.threshold)
    if has(KIND_BITS, HAS_MASK):
        keep = _load(m.mask, offs, inside, tl.uint8) != 0
        p = tl.where(keep, p, 0.0)
    rounded = _close_param(p, m, offs, inside, KIND_BITS)
    for k in tl.static_range(COUNT):
        x = s[k]
        if has(KIND_BITS, HAS_MASK):
            x = tl.where(keep, x, 0.0)
        _close_state(k, x, m, offs, inside, RULE, KIND_BITS)
    if field(KIND_BITS, COPY_AT):
        _store(m.copy, offs, inside, p, dtype_of((field(KIND_BITS, COPY_AT)) - 1))
    if has(KIND_BITS, HAS_EMA):
        e = _load(m.ema, offs, inside, tl.float32)
        _store(m.ema, offs, inside, tl.fma(rounded - e, f.ema_rest, e), tl.float32)
    if ZERO_GRAD:
        _store(m.grad, offs, inside, tl.zeros_like(g), GRAD_DTYPE)


@triton.jit
def _update_piece(
    row,
    first,
    tiles,
    facts_ptr,
    constants,
    keys,
    codes,
    ema_rest,
    RULE: tl.constexpr,
    KIND_BITS: tl.constexpr,
    ZERO_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    EDGE: tl.constexpr,
):
    begin = tl.load(row + SHIFT)
    end = begin + tl.load(row + NUMEL)
    body = begin + tl.load(row + BODY)
    wide = tl.load(row + WIDE) != 0
    last = tl.minimum(first + tiles, tl.cdiv(end, BLOCK))
    if tl.load(facts_ptr + 2) == 0.0:
        m = _memory(row, keys, codes, begin)
        f = _facts(row, facts_ptr, constants, ema_rest)
        for tile in range(first, last):
            at = tile * BLOCK
            if wide & (at >= begin) & (at + BLOCK <= body):
                offs = at + tl.arange(0, BLOCK)
                _update_tile(m, f, offs, None, None, RULE, KIND_BITS, ZERO_GRAD)
            else:
                for part in range(at, tl.minimum(at + BLOCK, end), EDGE):
                    offs = part + tl.arange(0, EDGE)
                    inside = (offs >= begin) & (offs < end)
                    if has(KIND_BITS, TAILS):
                        tail = offs >= body
                    else:
                        tail = None
                    _update_tile(m, f, offs, inside, tail, RULE, KIND_BITS, ZERO_GRAD)
    elif ZERO_GRAD:
        grad = tl.load(row + GRAD)
        for part in range(first * BLOCK, tl.minimum(last * BLOCK, end), EDGE):
            offs = part + tl.arange(0, EDGE)
            zero = tl.zeros([EDGE], tl.float32)
            inside = (offs >= begin) & (offs < end)
            _store(grad, offs, inside, zero, dtype_of(field(KIND_BITS, GRAD_KIND_AT)))


class Memory(NamedTuple):
    """Addresses of a tensor's arrays."""

    param: Any
    grad: Any
    states: Any
    scales: Any
    ema: Any
    copy: Any
    mask: Any
    master: Any
    keys: Any
    codes: Any
    shift: Any


@triton.jit
def _memory(row, keys, codes, shift):
    return Memory(
        tl.load(row + PARAM),
        tl.load(row + GRAD),
        (tl.load(row + STATE), tl.load(row + STATE + 1), tl.load(row + STATE + 2)),
        (tl.load(row + SCALE), tl.load(row + SCALE + 1), tl.load(row + SCALE + 2)),
        tl.load(row + EMA),
        tl.load(row + COPY),
        tl.load(row + MASK),
        tl.load(row + MASTER),
        keys,
        codes,
        shift,
    )


class Facts(NamedTuple):
    """What all elements of a tensor share."""

    constants: Any
    threshold: Any
    scale: Any
    clip: Any
    sign: Any
    ema_rest: Any


@triton.jit
def _facts(row, facts_ptr, constants, ema_rest):
    """Constants that a rule does not read are not loaded."""
    c = (
        tl.load(constants),
        tl.load(constants + 1),
        tl.load(constants + 2),
        tl.load(constants + 3),
        tl.load(constants + 4),
        tl.load(constants + 5),
        tl.load(constants + 6),
        tl.load(constants + 7),
        tl.load(constants + 8),
        tl.load(constants + 9),
    )
    sign = tl.where(tl.load(row + NEGATE) != 0, -1.0, 1.0)
    threshold = tl.load(constants + THRESHOLD)
    return Facts(c, threshold, tl.load(facts_ptr), tl.load(facts_ptr + 1), sign, ema_rest)


@triton.jit(do_not_specialize=["tiles", "ema_rest"])
def optim_update_kernel(
    table_ptr,  # rows
    pieces_ptr,
    codes_ptr,
    facts_ptr,
    constants_ptr,
    keys_ptr,
    tiles,  # of a piece
    ema_rest,
    RULE: tl.constexpr,
    KINDS: tl.constexpr,
    ZERO_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,  # elements of a tile
    EDGE: tl.constexpr,  # of what is taken at a time where a tile is not whole or not aligned
):
    piece = pieces_ptr + tl.program_id(0).to(tl.int64) * 2
    number, first = tl.load(piece), tl.load(piece + 1)
    row = table_ptr + number * ROW
    constants = constants_ptr + number * CONSTANTS
    keys = keys_ptr + number * KEY_WORDS
    kind = tl.load(row + KIND)
    for i in tl.static_range(len(KINDS)):
        if kind == i:
            _update_piece(
                row,
                first,
                tiles,
                facts_ptr,
                constants,
                keys,
                codes_ptr,
                ema_rest,
                RULE,
                KINDS[i],
                ZERO_GRAD,
                BLOCK,
                EDGE,
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
        if call.round_clipped:
            raise RuntimeError("optim_step: round_clipped is the CPU's only")
        tensors = _array(call.tensors, call.n_tensors, self.tensor)
        groups = _array(call.groups, call.n_groups, self.group)
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
    rows, groups, pieces, blocks, codes = made.parts(table)
    facts, sums, constants, keys = made.workspace(workspace)
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
            keys,
            sums,
            call.grad_scale or 0,
            call.found_inf or 0,
            call.given_norm or 0,
            call.norm or 0,
            call.skipped or 0,
            int(np.float64(call.max_norm).view(np.int64)),
            int(np.uint64(call.seed).view(np.int64)),
            made.rows,
            made.blocks,
            RULE=made.rule,
            WANTS_NORM=wants_norm,
            SUMS_SQUARES=sums_squares,
            SKIP_NONFINITE=bool(call.skip_nonfinite),
            RANDOM=made.stochastic,
            ROWS=PREPARE_ROWS,
            **options,
        )
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
                **options,
            )
