"""What comes before the update of optim_step in Triton (csrc/cuda/optim_prepare.cuh): the partial sums
of the norm, where one is asked for; then the clip coefficient, whether to skip, and each tensor's
constants and step count. With a probe after them (LAMB) both are one launch, and the probe adds up the
norm and counts the step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .optim_constants import CONSTANTS, THRESHOLD, group_lr, store_constants
from .optim_memory import KEY_WORDS, store_keys
from .optim_table import (
    DTYPE,
    GRAD,
    GRAD_DTYPE,
    GROUP,
    GROUP_AT,
    MASK,
    NORM_BLOCK,
    NUMEL,
    PRODUCT,
    ROW,
    SHIFT,
    STEP,
)

NORM_ROWS = 4  # blocks of a program, one a warp
PREPARE_ROWS = 128  # tensors of a program
NORM_SUMS = tl.constexpr(256)  # of csrc/math/norm.h
# Arguments that change from step to step: none of them is a reason to compile again.
NEW_EACH_STEP = [
    "grad_scale",
    "found_inf",
    "given_norm",
    "norm_at",
    "skipped_at",
    "max_norm_bits",
    "n_blocks",
    "n_rows",
]


@triton.constexpr_function
def dtype_of(code):
    return (tl.float32, tl.bfloat16, tl.float16)[code]


# --- pass 0: partial sums of squares


@triton.jit
def _load_gradient(base, dtype, offs, mask, DTYPES: tl.constexpr):
    """fp32 of elements whose dtype may differ from row to row."""
    x = tl.zeros(offs.shape, tl.float32)
    for i in tl.static_range(len(DTYPES)):
        pointer = base.to(tl.pointer_type(dtype_of(DTYPES[i])))
        of_it = mask & (dtype == DTYPES[i])
        x = tl.where(of_it, tl.load(pointer + offs, mask=of_it, other=0.0).to(tl.float32), x)
    return x


@triton.jit
def _load_masked(row, base, dtype, offs, inside, DTYPES: tl.constexpr, MASKED: tl.constexpr):
    x = _load_gradient(base, dtype, offs, inside, DTYPES)
    if MASKED:
        keep = tl.load(row + MASK)[:, None]
        there = inside & (keep != 0)
        kept = tl.load(keep.to(tl.pointer_type(tl.uint8)) + offs, mask=there, other=1)
        x = tl.where(kept != 0, x, 0.0)
    return x


@triton.jit
def _norm_blocks(
    table_ptr,  # rows
    blocks_ptr,
    sums_ptr,  # [n_blocks] float64
    n_blocks,
    DTYPES: tl.constexpr,  # tt_dtypes of the gradients
    MASKED: tl.constexpr,  # whether a tensor has a mask
    ROWS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = block < n_blocks
    row = table_ptr + tl.load(blocks_ptr + 2 * block, mask=there, other=0) * ROW
    shift = tl.load(row + SHIFT)
    begin = tl.load(blocks_ptr + 2 * block + 1, mask=there, other=0) * NORM_BLOCK + shift
    end = tl.minimum(begin + NORM_BLOCK, tl.load(row + NUMEL) + shift)
    end = tl.where(there, end, begin)[:, None]
    base = tl.load(row + GRAD)[:, None]
    dtype = tl.load(row + GRAD_DTYPE)[:, None]
    # Element i goes into lane i % 32, as csrc/cpu/optim_lanes.h adds.
    lanes = tl.arange(0, 32)[None, :]
    sums = tl.zeros([ROWS, 32], tl.float32)
    longest = tl.max(end - begin[:, None])
    for at in tl.range(0, longest, 32, loop_unroll_factor=8):
        offs = begin[:, None] + at + lanes
        x = _load_masked(row, base, dtype, offs, offs < end, DTYPES, MASKED)
        sums = tl.fma(x, x, sums)
    total = tl.zeros([ROWS], tl.float64)
    for lane in range(32):  # in order
        total += tl.sum(tl.where(lanes == lane, sums, 0.0), axis=1).to(tl.float64)
    # Too large for fp32, or no number: once more in double.
    again = (total.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF) >= 0x7F800000
    if tl.max(again.to(tl.int32), axis=0) > 0:
        exact = tl.zeros([ROWS, 1], tl.float64)
        for at in range(longest):
            offs = begin[:, None] + at
            x = _load_masked(row, base, dtype, offs, offs < end, DTYPES, MASKED).to(tl.float64)
            exact += x * x
        total = tl.where(again, tl.sum(exact, axis=1), total)
    tl.store(sums_ptr + block, total, mask=there)


@triton.jit(do_not_specialize=["n_blocks"])
def optim_norm_kernel(
    table_ptr,
    blocks_ptr,
    sums_ptr,
    n_blocks,
    DTYPES: tl.constexpr,
    MASKED: tl.constexpr,
    NORM_ROWS: tl.constexpr,
):
    _norm_blocks(table_ptr, blocks_ptr, sums_ptr, n_blocks, DTYPES, MASKED, NORM_ROWS)


# --- what all tensors share


@triton.jit
def _add_halves(x, N: tl.constexpr):
    low, high = tl.split(tl.permute(tl.reshape(x, [2, N]), [1, 0]))
    return low + high


@triton.jit
def all_sums(sums_ptr, n_blocks):
    """Partial sum k into running sum k % 256, then these by halves: norm.h's order. Not from the first
    cache, which may not have seen what other programs of the same launch stored."""
    index = tl.arange(0, NORM_SUMS)
    x = tl.zeros([NORM_SUMS], tl.float64)
    for at in range(0, n_blocks, NORM_SUMS):
        there = at + index < n_blocks
        x += tl.load(sums_ptr + at + index, mask=there, other=0.0, cache_modifier=".cg")
    return add_halves(x)


@triton.jit
def add_halves(x):
    """Of NORM_SUMS running sums: i and i + 128, 64, ... 1."""
    x = _add_halves(x, 128)
    x = _add_halves(x, 64)
    x = _add_halves(x, 32)
    x = _add_halves(x, 16)
    x = _add_halves(x, 8)
    x = _add_halves(x, 4)
    x = _add_halves(x, 2)
    return tl.sum(x, axis=0)  # of two


@triton.jit
def _scalar(address, other):
    """One fp32 at an address; ``other`` if that is 0."""
    address = address.to(tl.int64)
    return tl.load(address.to(tl.pointer_type(tl.float32)), mask=address != 0, other=other)


@triton.jit
def find_facts(
    facts_ptr,
    sums_ptr,
    # Addresses of one fp32, skipped_at of an int64, or 0.
    grad_scale,
    found_inf,
    given_norm,
    norm_at,
    skipped_at,
    max_norm_bits,  # of a float64; negative: don't clip
    n_blocks,
    WANTS_NORM: tl.constexpr,
    SUMS_SQUARES: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
):
    """Scale, clip coefficient and whether to skip; the first program also tells the caller."""
    speaks = tl.program_id(0) == 0
    scale = _scalar(grad_scale, 1.0)
    skip = tl.where(_scalar(found_inf, 0.0) != 0.0, 1.0, 0.0)
    clip = 1.0
    if WANTS_NORM:
        skips = skip
        norm = _scalar(given_norm, 0.0).to(tl.float64)
        if SUMS_SQUARES:
            found = tl.sqrt(all_sums(sums_ptr, n_blocks)) / scale.to(tl.float64)
            if SKIP_NONFINITE:
                finite = found - found == 0.0
                norm = tl.where(finite & (given_norm != 0), norm, found)
                skips = tl.where(finite, skip, 1.0)
            else:
                norm = found
        norm_ptr = norm_at.to(tl.int64).to(tl.pointer_type(tl.float32))
        tl.store(norm_ptr, norm.to(tl.float32), mask=speaks & (skip == 0.0) & (norm_at != 0))
        skip = skips
        max_norm = max_norm_bits.to(tl.int64).to(tl.float64, bitcast=True)
        factor = max_norm / (norm + 1e-6)
        clip = tl.where((max_norm < 0.0) | (factor >= 1.0), 1.0, factor.to(tl.float32))
    tl.store(facts_ptr, scale, mask=speaks)
    tl.store(facts_ptr + 1, clip, mask=speaks)
    tl.store(facts_ptr + 2, skip, mask=speaks)
    count = speaks & (skip != 0.0) & (skipped_at != 0)
    skipped_ptr = skipped_at.to(tl.int64).to(tl.pointer_type(tl.int64))
    tl.store(skipped_ptr, tl.load(skipped_ptr, mask=count, other=0) + 1, mask=count)
    return scale, clip, skip


# --- constants


@triton.jit
def with_gradient(table_ptr, at, n_rows):
    """Which of the tensors ``at`` there are, and have a gradient."""
    mask = at < n_rows
    return mask & (tl.load(table_ptr + at * ROW + GRAD, mask=mask, other=0) != 0)


@triton.jit
def next_step(row, mask):
    """Where the step counts of a vector of tensors are, which have one, and what they become."""
    step_at = tl.load(row + STEP, mask=mask, other=0)
    counts = mask & (step_at != 0)
    step_at = step_at.to(tl.pointer_type(tl.float32))
    return step_at, counts, tl.load(step_at, mask=counts, other=0.0) + 1.0


@triton.jit
def _make_constants(
    table_ptr,
    groups_ptr,
    constants_ptr,
    keys_ptr,
    counts_ptr,
    seed,
    at,  # numbers of tensors
    mask,
    product,
    RULE: tl.constexpr,
    RANDOM: tl.constexpr,  # whether keys are wanted
):
    """Returns what NAdam's product becomes."""
    row = table_ptr + at * ROW
    step = next_step(row, mask)[2]
    group = groups_ptr + tl.load(row + GROUP_AT, mask=mask, other=0) * GROUP
    out = constants_ptr + at * CONSTANTS
    lr = group_lr(group, mask)
    dtype = tl.load(row + DTYPE, mask=mask, other=0)
    product = store_constants(out, group, lr, step.to(tl.float64), product, dtype, mask, RULE)
    l1 = tl.load(group + 10, mask=mask, other=0).to(tl.float64, bitcast=True)
    tl.store(out + THRESHOLD, (lr * l1).to(tl.float32), mask=mask)
    if RANDOM:
        bits = seed.to(tl.int64).to(tl.uint64, bitcast=True)
        number = step.to(tl.int64).to(tl.uint64, bitcast=True)
        tensor = at.to(tl.uint64, bitcast=True)
        store_keys(keys_ptr + at * KEY_WORDS, bits, number, tensor, mask)
    if RULE == "LAMB" or RULE == "Adafactor":
        tl.store(counts_ptr + at, 0, mask=mask)
    return product


@triton.jit(do_not_specialize=[*NEW_EACH_STEP, "seed"])
def optim_prepare_kernel(
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
    groups_ptr,
    constants_ptr,
    keys_ptr,
    counts_ptr,
    seed: tl.int64,
    n_rows,
    WANTS_NORM: tl.constexpr,
    SUMS_SQUARES: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
    RULE: tl.constexpr,
    RANDOM: tl.constexpr,
    ROWS: tl.constexpr,
):
    _, _, skip = find_facts(
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
        at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        row = table_ptr + at * ROW
        mask = with_gradient(table_ptr, at, n_rows)
        step_at, counts, step = next_step(row, mask)
        product_at = tl.load(row + PRODUCT, mask=mask, other=0)
        multiplies = mask & (product_at != 0)
        product_at = product_at.to(tl.pointer_type(tl.float32))
        product = tl.load(product_at, mask=multiplies, other=1.0)
        product = _make_constants(
            table_ptr,
            groups_ptr,
            constants_ptr,
            keys_ptr,
            counts_ptr,
            seed,
            at,
            mask,
            product,
            RULE,
            RANDOM,
        )
        tl.store(step_at, step, mask=counts)
        tl.store(product_at, product, mask=multiplies)


# --- both at once, before a probe: it finds the facts and counts the step, so that nothing here waits
# for the norm


@triton.jit(do_not_specialize=["n_blocks", "seed", "n_rows", "norm_grid"])
def optim_norm_and_constants_kernel(
    table_ptr,  # rows
    blocks_ptr,
    sums_ptr,
    n_blocks,
    groups_ptr,
    constants_ptr,
    keys_ptr,
    counts_ptr,
    seed: tl.int64,
    n_rows,
    norm_grid,  # programs that the norm takes
    DTYPES: tl.constexpr,
    MASKED: tl.constexpr,
    NORM_ROWS: tl.constexpr,
    RULE: tl.constexpr,
    RANDOM: tl.constexpr,
    ROWS: tl.constexpr,
):
    if tl.program_id(0) < norm_grid:
        _norm_blocks(table_ptr, blocks_ptr, sums_ptr, n_blocks, DTYPES, MASKED, NORM_ROWS)
    else:
        at = (tl.program_id(0) - norm_grid).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = with_gradient(table_ptr, at, n_rows)
        _make_constants(
            table_ptr,
            groups_ptr,
            constants_ptr,
            keys_ptr,
            counts_ptr,
            seed,
            at,
            mask,
            1.0,
            RULE,
            RANDOM,
        )
