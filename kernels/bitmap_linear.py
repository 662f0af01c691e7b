"""bitmap_linear in Triton: up to 32 rows of x times an unstructured weight, read as bits and values.

A program has BLOCK_N rows of the weight and a part of K, which it takes BLOCK_K columns at a time: a
column's value stands as many places after its row's first as bits are set before it. What is not kept
becomes a zero of the tile that tl.dot multiplies, the weight its left operand as in int8_weight_mm.

    at[n,k] = row_start[n] + bits set before column k;  w[n,k] = values[at] where bit k is set, else 0
    sum[m,n] = sum_k x[m,k] * w[n,k], parts of K added in their order; then the epilogue

int8 values give the bits of int8_linear with the dense weight. Float sums are fp32 (NUMERICS.md section
7). A dot multiplies pruned weights too, and 0 * Inf is NaN. An Inf or NaN in x always shows: whatever
meets it, the sum is no longer finite. A program whose sums are not finite computes them again from kept
weights alone.

Values outside [0, count) are not read, whatever row_start and the bits say.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .activation import check_activation
from .checks import FLOAT_DTYPES, check_bias, check_matrix, check_scale, check_tensor
from .int8_mm import MAX_K
from .launch import on_device_of
from .part_sums import add_parts, store_outputs
from .quantize_int8 import quantize_int8
from .tuning import EXACT, registers

MAX_M = 32
BLOCK_N = 64  # rows of one warp group of wgmma
COUNTED = 64  # words of a row that are counted at once, before a part begins
REGISTERS = 128  # of a thread: 16 warps on a multiprocessor
WANTED_PROGRAMS, MOST_PARTS = 512, 8
LEAST_STEPS = 4  # of a part
MOST_K = 2**24
# Of values that a program may read: a row's bits may be more than are left, and are counted all.
MAX_COUNT = tl.constexpr(2**31 - 1 - MOST_K - 64)


@triton.jit
def popcount(x):
    """Bits set in each int32 of x: the form that LLVM makes one instruction."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def load_words(words_ptr, rows, words, first, BLOCK_N: tl.constexpr, COUNT: tl.constexpr):
    """Words first .. first + COUNT - 1 of each row [BLOCK_N, COUNT]; zeros where there are none."""
    r = tl.arange(0, BLOCK_N)[:, None]
    offs = first + tl.arange(0, COUNT)[None, :]
    return tl.load(words_ptr + r * words + offs, mask=(r < rows) & (offs < words), other=0)


@triton.jit
def first_position(
    words_ptr, row_start_ptr, rows, words, first, base, count,
    BLOCK_N: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Where the values of word `first` of each row begin, from `base` on, in [0, count]."""
    r = tl.arange(0, BLOCK_N)
    start = tl.load(row_start_ptr + r, mask=r < rows, other=0)
    # Not start - base, which may overflow.
    start = tl.minimum(tl.maximum(start, base), base + count) - base
    before = tl.zeros([BLOCK_N, COUNT], tl.int32)
    for at in range(0, first, COUNT):
        bits = load_words(words_ptr, rows, words, at, BLOCK_N, COUNT)
        before += tl.where((at + tl.arange(0, COUNT) < first)[None, :], popcount(bits), 0)
    return start.to(tl.int32) + tl.sum(before, axis=1)


@triton.jit
def expand(values_ptr, bits, position, count):
    """The weights that `bits` [BLOCK_N, words] keep, as [BLOCK_N, 32 words], zeros for the others.

    Also which are kept, and where the values of the next words begin.
    """
    BLOCK_N: tl.constexpr = bits.shape[0]
    WORDS: tl.constexpr = bits.shape[1]
    counts = popcount(bits)
    start = position[:, None] + tl.cumsum(counts, axis=1) - counts
    lane = tl.arange(0, 32)[None, None, :]
    word = bits[:, :, None]
    kept = ((word >> lane) & 1) != 0
    at = start[:, :, None] + popcount(word & ((1 << lane) - 1))
    w = tl.load(values_ptr + at, mask=kept & (at < count), other=0)
    position += tl.sum(counts, axis=1)
    kept = tl.reshape(kept, [BLOCK_N, 32 * WORDS])
    return tl.reshape(w, [BLOCK_N, 32 * WORDS]), kept, position


@triton.jit
def sum_dense(
    x_ptr, values_ptr, words_ptr, position, rows, first, last, M, K, words, count,
    stride_xm, stride_xk, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The sums [BLOCK_N, BLOCK_M] of words first .. last - 1, by tl.dot."""
    WORDS: tl.constexpr = BLOCK_K // 32
    offs_m = tl.arange(0, BLOCK_M)
    x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    INT8: tl.constexpr = values_ptr.dtype.element_ty == tl.int8
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.int32 if INT8 else tl.float32)
    bits = load_words(words_ptr, rows, words, first, BLOCK_N, WORDS)
    for word in range(first, last, WORDS):
        ahead = load_words(words_ptr, rows, words, word + WORDS, BLOCK_N, WORDS)
        offs_k = word * 32 + tl.arange(0, BLOCK_K)
        mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]
        x = tl.load(x_rows + offs_k.to(tl.int64)[None, :] * stride_xk, mask=mask, other=0)
        w, _, position = expand(values_ptr, bits, position, count)
        # "ieee": fp32 is multiplied in fp32, not rounded to tf32.
        acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee", out_dtype=acc.dtype)
        bits = ahead
    return acc


@triton.jit
def sum_kept(
    x_ptr, values_ptr, words_ptr, position, rows, first, last, M, K, words, count,
    stride_xm, stride_xk, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same of kept weights alone, a row of x at a time."""
    WORDS: tl.constexpr = BLOCK_K // 32
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for word in range(first, last, WORDS):
        bits = load_words(words_ptr, rows, words, word, BLOCK_N, WORDS)
        w, kept, position = expand(values_ptr, bits, position, count)
        offs_k = (word * 32 + tl.arange(0, BLOCK_K)).to(tl.int64)
        for m in range(M):
            row = x_ptr + tl.cast(m, tl.int64) * stride_xm
            x = tl.load(row + offs_k * stride_xk, mask=offs_k < K, other=0).to(tl.float32)
            product = tl.where(kept, w.to(tl.float32) * x[None, :], 0.0)
            total = tl.sum(product, axis=1)[:, None]
            acc += tl.where((tl.arange(0, BLOCK_M) == m)[None, :], total, 0.0)
    return acc


@triton.jit
def any_not_finite(acc):
    exponent = acc.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.max(tl.max(exponent, axis=1), axis=0) == 0x7F800000


@triton.jit(do_not_specialize=["M", "count", "share"])
def bitmap_linear_kernel(
    x_ptr,  # [M, K] fp32, bf16 or fp16, or int8 for int8 values
    values_ptr,  # [count] of the same dtype
    words_ptr,  # [N, words] int32, bit k % 32 of word k // 32
    row_start_ptr,  # [N + 1] int64
    x_scale_ptr,  # [M] fp32 for int8, else None
    w_scale_ptr,  # [N] fp32 for int8, else None
    bias_ptr,  # [N] fp32, bf16 or fp16; None for no bias
    out_ptr,  # [M, N]
    sums_ptr,  # [parts, M, N] fp32, int32 for int8; None where there is one part
    M,
    N,
    K,  # at most MOST_K: BLOCK_N rows of the weight are at most 2^30 elements
    words,  # of a row: 2 ceil(K / 64)
    count,
    share,  # words of a part
    stride_xm,
    stride_xk,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # at least M
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COUNTED: tl.constexpr,
):
    part = tl.program_id(1)
    first = part * share
    last = tl.minimum(first + share, words)
    # From the program's first row on 32 bits do, and spare registers.
    n = tl.program_id(0).to(tl.int64) * BLOCK_N
    rows = tl.minimum(N - n, BLOCK_N).to(tl.int32)
    words_ptr += n * words
    row_start_ptr += n
    base = tl.minimum(tl.maximum(tl.load(row_start_ptr), 0), count)
    values_ptr += base
    count = tl.minimum(count - base, MAX_COUNT).to(tl.int32)
    position = first_position(
        words_ptr, row_start_ptr, rows, words, first, base, count, BLOCK_N, COUNTED
    )
    acc = sum_dense(
        x_ptr, values_ptr, words_ptr, position, rows, first, last, M, K, words, count,
        stride_xm, stride_xk, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if acc.dtype == tl.float32:
        if any_not_finite(acc):
            acc = sum_kept(
                x_ptr, values_ptr, words_ptr, position, rows, first, last, M, K, words, count,
                stride_xm, stride_xk, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    acc = tl.trans(acc)
    offs_m, offs_n = tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    if sums_ptr is not None:
        at = (part * M + offs_m).to(tl.int64)[:, None] * N + offs_n[None, :]
        tl.store(sums_ptr + at, acc, mask=mask)
    else:
        store_outputs(
            acc, w_scale_ptr, x_scale_ptr, bias_ptr, out_ptr, offs_m, offs_n, mask, M, N, ACTIVATION
        )


def tile_of(dtype: torch.dtype) -> tuple[int, int]:
    """BLOCK_K and warps. Not yet measured. Four warps have up to 32 loads a thread on the way, 8 KB of
    bfloat16 if all is kept, and four such programs run on a multiprocessor. float32, by multiply-adds,
    has no registers for as many."""
    return (32, 8) if dtype == torch.float32 else (64, 4)


def share_of(N: int, words: int, step: int) -> int:
    """Words of a part, whole steps: so few that programs fill a GPU. Not asked of the device, whose the
    order of a sum would then be."""
    wanted = min(WANTED_PROGRAMS // triton.cdiv(N, BLOCK_N), MOST_PARTS)
    steps = triton.cdiv(triton.cdiv(words, step), max(wanted, 1))
    return max(steps, LEAST_STEPS) * step


def bitmap_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    bitmap: torch.Tensor,
    row_start: torch.Tensor,
    weight_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    activation: str = "none",
) -> torch.Tensor:
    """``act(x @ weight.T + bias)`` [M, N] for ``x`` [M, K], M <= 32; else as ops.bitmap_linear."""
    op, int8 = "bitmap_linear", values.dtype == torch.int8
    check_matrix(op, "x", x, FLOAT_DTYPES if int8 else (values.dtype,))
    check_matrix(op, "bitmap", bitmap, (torch.uint8,))
    (M, K), N = x.shape, bitmap.shape[0]
    if M > MAX_M:
        raise ValueError(f"{op}: expected at most {MAX_M} rows in Triton, got M={M}")
    size = (K + 63) // 64 * 8
    check_tensor(op, "bitmap", bitmap, (N, size), (torch.uint8,), x.device)
    check_tensor(op, "row_start", row_start, (N + 1,), (torch.int64,), x.device)
    dtypes = (*FLOAT_DTYPES, torch.int8)
    check_tensor(op, "values", values, (values.numel(),), dtypes, x.device)
    check_activation(op, activation)
    check_scale(op, weight_scale, N, int8, x.device)
    check_bias(op, bias, N, x.device)
    most = MAX_K if int8 else MOST_K
    if K > most:
        raise ValueError(f"{op}: expected K <= {most}, got {K}")
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if M == 0 or N == 0:
        return out
    q, q_scale = quantize_int8(x) if int8 else (x, None)
    bitmap = bitmap.contiguous()
    if bitmap.data_ptr() % 4:
        bitmap = bitmap.clone()
    words = size // 4
    BLOCK_K, num_warps = tile_of(values.dtype)
    share = share_of(N, words, BLOCK_K // 32)
    parts = max(triton.cdiv(words, share), 1)
    sums = None
    if parts > 1:
        dtype = torch.int32 if int8 else torch.float32
        sums = torch.empty((parts, M, N), dtype=dtype, device=x.device)
    factors = (weight_scale, q_scale, bias)
    weight_scale, q_scale, bias = (None if t is None else t.contiguous() for t in factors)
    with on_device_of(x):
        bitmap_linear_kernel[(triton.cdiv(N, BLOCK_N), parts)](
            q,
            values.contiguous(),
            bitmap.view(torch.int32) if words else bitmap.int(),
            row_start.contiguous(),
            q_scale,
            weight_scale,
            bias,
            out,
            sums,
            M,
            N,
            K,
            words,
            values.numel(),
            share,
            *q.stride(),
            ACTIVATION=activation,
            BLOCK_M=16 if M <= 16 else 32,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            COUNTED=COUNTED,
            num_warps=num_warps,
            num_stages=3,
            **registers(REGISTERS),
            **EXACT,
        )
        if sums is not None:
            add_parts(sums, weight_scale, q_scale, bias, out, activation)
    return out
