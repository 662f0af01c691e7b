"""LAMB in Triton: before the update, the norm of each tensor and of the direction in which it would
move (csrc/cuda/optim_probe.cuh).

A program takes NORM_BLOCK elements at a time; the last one of a tensor to be done adds up and changes
the constants. Where the gradients are clipped by their norm, this is the first kernel to know it: then
there are only as many programs as run at once, and each adds up the partial sums for itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .optim_constants import CONSTANTS, LAMB_ADAPTS, LAMB_LR, LAMB_RATE
from .optim_elements import facts_of, load, memory_of, open_param, open_state, prepared
from .optim_memory import KEY_WORDS
from .optim_prepare import (
    NEW_EACH_STEP,
    all_sums,
    dtype_of,
    find_facts,
    next_step,
    with_gradient,
)
from .optim_rules import lamb_direction
from .optim_table import (
    FIRST_BLOCK,
    GRAD_KIND_AT,
    HAS_MASK,
    KIND,
    NORM_BLOCK,
    NUMEL,
    ROW,
    SHIFT,
    field,
    has,
)

REGISTERS = 128  # of a thread: four blocks of four warps on a multiprocessor
PARTS = tl.constexpr(8)  # of a block, whose squares are added in fp32: kOptimBlock of csrc/cpu
PART = tl.constexpr(512)  # elements


@triton.jit
def _pair(m, f, offs, inside, RULE: tl.constexpr, KIND_BITS: tl.constexpr):
    """Parameter and direction, 0 where there is no element."""
    p = open_param(m, offs, inside, KIND_BITS)
    g = load(m.grad, offs, inside, dtype_of(field(KIND_BITS, GRAD_KIND_AT))).to(tl.float32)
    s = ()
    for k in tl.static_range(2):
        s = s + (open_state(k, m, offs, inside, RULE, KIND_BITS),)
    direction, _ = lamb_direction(f.constants, p, prepared(g, f), s)
    keep = inside
    if has(KIND_BITS, HAS_MASK):
        keep = inside & (load(m.mask, offs, inside, tl.uint8) != 0)
    return tl.where(inside, p, 0.0), tl.where(keep, direction, 0.0)


@triton.jit
def _is_large(total):
    """Too large for fp32, or no number."""
    return (total.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF) >= 0x7F800000


@triton.jit
def _in_order(x, index, COUNT: tl.constexpr):
    """The sum of float64 x [COUNT] one after the other."""
    total = tl.sum(tl.zeros_like(x), axis=0)
    for i in range(COUNT):
        total += tl.sum(tl.where(index == i, x, 0.0), axis=0)
    return total


@triton.jit
def _lanes_in_order(sums, lanes):
    total = tl.zeros([PARTS], tl.float64)
    for lane in range(32):
        total += tl.sum(tl.where(lanes == lane, sums, 0.0), axis=1).to(tl.float64)
    return total


@triton.jit
def _squares(m, f, begin, end, RULE: tl.constexpr, KIND_BITS: tl.constexpr):
    """Of the elements begin .. end - 1, at most NORM_BLOCK: of each part element i into lane i % 32, as
    csrc/cpu/optim_lanes.h adds."""
    part = tl.arange(0, PARTS)
    first = begin + part[:, None] * PART
    lanes = tl.arange(0, 32)[None, :]
    param, direction = tl.zeros([PARTS, 32], tl.float32), tl.zeros([PARTS, 32], tl.float32)
    for at in range(0, PART, 32):
        offs = first + at + lanes
        p, u = _pair(m, f, offs, offs < end, RULE, KIND_BITS)
        param = tl.fma(p, p, param)
        direction = tl.fma(u, u, direction)
    params, directions = _lanes_in_order(param, lanes), _lanes_in_order(direction, lanes)
    again = _is_large(params) | _is_large(directions)
    if tl.max(again.to(tl.int32), axis=0) > 0:  # once more in double
        param_exact, direction_exact = (
            tl.zeros([PARTS, 1], tl.float64),
            tl.zeros([PARTS, 1], tl.float64),
        )
        for at in range(PART):
            offs = first + at
            p, u = _pair(m, f, offs, offs < end, RULE, KIND_BITS)
            p, u = p.to(tl.float64), u.to(tl.float64)
            param_exact += p * p
            direction_exact += u * u
        params = tl.where(_is_large(params), tl.sum(param_exact, axis=1), params)
        directions = tl.where(_is_large(directions), tl.sum(direction_exact, axis=1), directions)
    return _in_order(params, part, PARTS), _in_order(directions, part, PARTS)


@triton.jit
def _adapt(constants, param_norm, direction_norm):
    """lamb_adapt of csrc/math/lamb.h"""
    lr = tl.load(constants + LAMB_LR)
    adapts = (tl.load(constants + LAMB_ADAPTS) != 0.0) & (param_norm > 0.0) & (direction_norm > 0.0)
    rate = (lr.to(tl.float64) * (param_norm / direction_norm)).to(tl.float32)
    tl.store(constants + LAMB_RATE, tl.where(adapts, rate, lr))


@triton.jit
def _probe(
    row,
    number,
    within,  # of its tensor
    block,  # of all
    n_blocks,
    scale,
    clip,
    codes_ptr,
    constants_ptr,
    keys_ptr,
    sums_ptr,
    counts_ptr,
    RULE: tl.constexpr,
    KIND_BITS: tl.constexpr,
):
    constants = constants_ptr + number * CONSTANTS
    shift, numel = tl.load(row + SHIFT), tl.load(row + NUMEL)
    m = memory_of(row, keys_ptr + number * KEY_WORDS, codes_ptr, shift)
    f = facts_of(row, scale, clip, constants, 0.0)
    begin = shift + within * NORM_BLOCK
    end = tl.minimum(begin + NORM_BLOCK, shift + numel)
    param, direction = _squares(m, f, begin, end, RULE, KIND_BITS)
    # The sums before the count, the count before the others' sums.
    tl.store(sums_ptr + block, param)
    tl.store(sums_ptr + n_blocks + block, direction)
    before = tl.atomic_add(counts_ptr + number, 1, sem="acq_rel")
    blocks = tl.cdiv(numel, NORM_BLOCK)
    if before == blocks - 1:
        first = sums_ptr + tl.load(row + FIRST_BLOCK)
        param_norm = tl.sqrt(all_sums(first, blocks))
        _adapt(constants, param_norm, tl.sqrt(all_sums(first + n_blocks, blocks)))


@triton.jit
def _count_steps(table_ptr, n_rows, ROWS: tl.constexpr):
    for first in range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS):
        at = (first + tl.arange(0, ROWS)).to(tl.int64)
        mask = with_gradient(table_ptr, at, n_rows)
        step_at, counts, step = next_step(table_ptr + at * ROW, mask)
        tl.store(step_at, step, mask=counts)


@triton.jit(do_not_specialize=NEW_EACH_STEP)
def optim_probe_kernel(
    table_ptr,  # rows
    facts_ptr,
    sums_ptr,
    grad_scale: tl.int64,
    found_inf: tl.int64,
    given_norm: tl.int64,
    norm_at: tl.int64,
    skipped_at: tl.int64,
    max_norm_bits: tl.int64,
    n_blocks,
    blocks_ptr,
    codes_ptr,
    constants_ptr,
    keys_ptr,
    probe_sums_ptr,  # [2, n_blocks] float64
    counts_ptr,  # [n_rows] of blocks whose sums are there
    n_rows,
    WANTS_NORM: tl.constexpr,
    SUMS_SQUARES: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
    PREPARES: tl.constexpr,  # this kernel is the first to know the norm
    RULE: tl.constexpr,
    KINDS: tl.constexpr,
    ROWS: tl.constexpr,
):
    if PREPARES:
        scale, clip, skip = find_facts(
            facts_ptr,
            sums_ptr,
            grad_scale,
            found_inf,
            given_norm,
            norm_at,
            skipped_at,
            max_norm_bits,
            n_blocks,
            WANTS_NORM,
            SUMS_SQUARES,
            SKIP_NONFINITE,
        )
        if skip == 0.0:
            _count_steps(table_ptr, n_rows, ROWS)
    else:
        scale, clip, skip = tl.load(facts_ptr), tl.load(facts_ptr + 1), tl.load(facts_ptr + 2)
    if skip == 0.0:
        for block in range(tl.program_id(0), n_blocks, tl.num_programs(0)):
            piece = blocks_ptr + block * 2
            number, within = tl.load(piece), tl.load(piece + 1)
            row = table_ptr + number * ROW
            kind = tl.load(row + KIND)
            for i in tl.static_range(len(KINDS)):
                if kind == i:
                    _probe(
                        row,
                        number,
                        within,
                        block,
                        n_blocks,
                        scale,
                        clip,
                        codes_ptr,
                        constants_ptr,
                        keys_ptr,
                        probe_sums_ptr,
                        counts_ptr,
                        RULE,
                        KINDS[i],
                    )
