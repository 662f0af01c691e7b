"""block_linear's Triton kernels, interpreted, against float64 and against the CPU's bits.

Run by test_triton_block_linear.py, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from sparse_cases import assert_near
from triton_interpret import at_the_end, mend_interpreter

from trimtab import ops
from trimtab.kernels.block_grad_values import block_grad_values
from trimtab.kernels.block_groups import levels_of, serves
from trimtab.kernels.block_linear import block_linear, blocks_of_group
from trimtab.ops.sparse_fallback import IMPLEMENTATIONS

mend_interpreter()
kernel = importlib.import_module("trimtab.kernels.block_linear")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# M, N, K, block: tails of all three, empty rows, blocks wider and narrower than a step and a tile.
CASES = [
    (1, 40, 70, (16, 16)),
    (20, 70, 100, (32, 32)),
    (3, 130, 200, (64, 64)),
    (5, 140, 150, (128, 128)),
    (4, 9, 90, (1, 16)),
    (3, 30, 30, (16, 1)),
    (2, 10, 40, (4, 8)),
    (66, 17, 20, (16, 8)),
]


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "LEAST_COLUMNS", 1)
    monkeypatch.setattr(kernel, "WANTED_PROGRAMS", 1)


def weight_of(
    N: int, K: int, block: tuple[int, int], dtype: torch.dtype, long: bool = False
) -> Any:
    """(values, crow, col), the dense weight. An empty row of blocks; `long`: one that has far more than
    the others, and so is several groups."""
    bn, bk = block
    mask = torch.rand(-(-N // bn), -(-K // bk)) < (0.1 if long else 0.5)
    if len(mask) > 2:
        mask[len(mask) // 3 : len(mask) // 2] = False
        mask[len(mask) // 2] = long
    else:
        mask[0, -1] = True
    mask = mask.repeat_interleave(bn, 0).repeat_interleave(bk, 1)[:N, :K]
    weight = torch.randn(N, K) * mask
    if dtype == torch.int8:
        weight = (40 * weight).clamp(-127, 127)
    weight = weight.to(dtype)
    return ops.block_pack(weight, block, refuse_larger=False), weight


def case_id(case: Any) -> str:
    return "x".join(map(str, case[:3])) + "-{}x{}".format(*case[3]) if len(case) == 4 else str(case)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_float(case: Any, dtype: torch.dtype) -> None:
    M, N, K, block = case
    torch.manual_seed(K)
    parts, weight = weight_of(N, K, block, dtype)
    x, bias = torch.randn(2 * M, K).to(dtype)[::2], torch.randn(N)
    if dtype == torch.bfloat16:  # ends where memory does that can be read
        x, parts = at_the_end(x.contiguous()), tuple(map(at_the_end, parts))
    got = block_linear(x, *parts, None, bias, "relu", N=N)
    want = (x.double() @ weight.double().t() + bias.double()).relu()
    assert_near(got, x, weight, want, K)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_int8_is_exact(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program a block."""
    monkeypatch.setattr(kernel, "WANTED_PROGRAMS", 2**30)
    M, N, K, block = case
    torch.manual_seed(K)
    parts, _ = weight_of(N, K, block, torch.int8)
    args = torch.randn(M, K).half(), *parts, torch.rand(N) + 0.1, torch.randn(N), "silu"
    assert torch.equal(block_linear(*args, N=N), ops.block_linear(*args, N=N))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
@pytest.mark.parametrize("case", [(3, 150, 200, (16, 16)), (2, 67, 90, (1, 16))], ids=case_id)
def test_long_rows(case: Any, dtype: torch.dtype) -> None:
    """Rows of blocks of several groups, beside others: more than find_group looks at in one step."""
    M, N, K, block = case
    torch.manual_seed(K)
    parts, weight = weight_of(N, K, block, dtype, long=True)
    lengths = parts[1].diff()
    each = blocks_of_group(len(parts[2]), len(lengths), block[1], 1)
    assert int((lengths > each).sum()) and int((lengths == 0).sum())
    if dtype == torch.int8:
        args = torch.randn(M, K), *parts, torch.rand(N) + 0.1, torch.randn(N), "relu"
        assert torch.equal(block_linear(*args, N=N), ops.block_linear(*args, N=N))
        return
    x, bias = torch.randn(M, K).to(dtype), torch.randn(N)
    got = block_linear(x, *parts, None, bias, N=N)
    assert_near(got, x, weight, x.double() @ weight.double().t() + bias.double(), K)


def test_groups_that_begin_side_by_side() -> None:
    """In groups of 4 blocks a row's second one, from block 4 on, and the next row's first, from 5 on."""
    mask = torch.zeros(6, 7, dtype=torch.bool)
    mask[0, :5] = mask[1, 1:6] = mask[3, 0] = mask[5, 6] = True
    mask = mask.repeat_interleave(16, 0).repeat_interleave(16, 1)
    weight = torch.randint(1, 9, mask.shape) * mask
    parts = ops.block_pack(weight.float(), (16, 16))
    assert blocks_of_group(len(parts[2]), 6, 16, 1) == 4
    x = torch.randint(-9, 9, (3, 112)).float()
    assert torch.equal(block_linear(x, *parts, N=96), x @ weight.float().t())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        (5, 40, 70, (16, 16)),
        (300, 40, 50, (32, 32)),  # several parts of the tokens
        (9, 130, 200, (64, 64)),
        (3, 140, 300, (128, 256)),
        (3, 30, 30, (16, 1)),
        (0, 20, 30, (16, 16)),
    ],
    ids=case_id,
)
def test_gradient_of_values(case: Any, dtype: torch.dtype) -> None:
    M, N, K, (bn, bk) = case
    torch.manual_seed(K)
    (_, crow, col), _ = weight_of(N, K, (bn, bk), dtype)
    x, grad = torch.randn(2 * M, K).to(dtype)[::2], torch.randn(M, N).to(dtype)
    got = block_grad_values(grad, x, crow, col, bn, bk)
    dense = IMPLEMENTATIONS["block_grad_values.dense"]
    assert got.dtype == dtype
    assert_near(got, x, x, dense(grad.double(), x.double(), crow, col, bn, bk), M)
    if M:
        # Where weights are padded there is no gradient, whatever the other operand holds.
        x[0], grad[0] = float("inf"), 1.0
        got = block_grad_values(grad, x, crow, col, bn, bk)
        assert torch.equal(got.isfinite(), dense(grad * 0 + 1, x * 0 + 1, crow, col, bn, bk) == 0)


def test_pruned_weights_meet_no_inf() -> None:
    torch.manual_seed(0)
    parts, weight = weight_of(70, 100, (16, 32), torch.float32)
    x = torch.randn(3, 100)
    x[1, 77] = float("inf")
    kept = weight[:, 64:96] != 0
    got = block_linear(x, *parts, N=70)
    assert torch.equal(~got[1].isfinite(), kept.any(1)) and bool(got[[0, 2]].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("block", [(16, 16), (1, 16)], ids=str)
def test_wrong_indices_read_nothing_else(block: tuple[int, int], dtype: torch.dtype) -> None:
    """x and values lie between others, which a read past them would meet."""
    torch.manual_seed(0)
    N = 70 if block[0] == 16 else 7
    (values, crow, col), _ = weight_of(N, 128, block, dtype)
    around = torch.full((3, *values.shape), 100, dtype=dtype)
    values = around[1].copy_(torch.ones_like(values))
    x = torch.full((6, 128), 1000.0)[2:4].fill_(1.0)
    scale = torch.ones(N) if dtype == torch.int8 else None
    tail = scale, None, "none"
    for rows, columns in (
        (crow * 1000, col), (crow, col + 2**30), (-crow, -col), (crow.flip(0), col), (crow * 0, col),
    ):  # fmt: skip
        got = block_linear(x, values, rows, columns, *tail, N=N)
        if bool((rows.diff() >= 0).all()):  # others leave outputs unwritten
            assert bool((got.abs() <= len(col) * 16 + 1).all())
    if dtype == torch.float32 and block[0] == 16:
        grad = torch.ones(2, N)
        for rows, columns in ((crow * 1000, col), (crow, col + 2**30), (-crow, -col)):
            block_grad_values(grad, x, rows, columns, *block)


def test_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the mean, less where few programs would run, a step's columns at least."""
    assert blocks_of_group(1000, 100, 16, 64) == 20
    monkeypatch.setattr(kernel, "WANTED_PROGRAMS", 512)
    assert blocks_of_group(1000, 100, 16, 64) == 20
    assert blocks_of_group(1000, 100, 16, 1) == 1
    monkeypatch.setattr(kernel, "LEAST_COLUMNS", 256)
    assert blocks_of_group(1000, 100, 16, 1) == 16
    assert [levels_of(rows) for rows in (1, 64, 65, 4096, 4097)] == [1, 1, 2, 2, 3]
    assert serves(16, 1) and serves(1, 64) and not serves(3, 16) and not serves(16, 48)


def test_bad_input() -> None:
    values, crow, col = ops.block_pack(torch.ones(32, 64), (16, 16), refuse_larger=False)
    x, scale = torch.ones(3, 64), torch.ones(32)
    assert block_linear(x[:0], values, crow, col, N=32).shape == (0, 32)
    for text, args in {
        "expected x float32 of rank 2": (x.half(), values, crow, col),
        r"expected values \[blocks, bn, bk\]": (x, values[0], crow, col),
        r"expected crow int32 \(3,\)": (x, values, crow[1:], col),
        r"expected col int32 \(.*,\)": (x, values, crow, col[1:]),
        "expected blocks of powers of two in Triton, got 16 x 15": (x, values[:, :, 1:], crow, col),
        "expected weight_scale with int8 values": (x, values, crow, col, scale),
        r"float32 \(32,\) for int8": (x, values.to(torch.int8), crow, col),
        r"expected bias .* \(32,\)": (x, values, crow, col, None, scale[1:]),
        "expected activation": (x, values, crow, col, None, None, "tanh"),
    }.items():
        with pytest.raises(ValueError, match=text):
            block_linear(*args, N=32)
    with pytest.raises(ValueError, match="expected K <= 133144"):
        block_linear(torch.ones(1, 133_145), values.to(torch.int8), crow, col, scale, N=32)
    grad = torch.ones(3, 32)
    for text, wrong in {
        "expected x float32": (grad, x.half(), crow, col, 16, 16),
        r"block_grad_values: expected x float32 \(3, 64\)": (grad, x[1:], crow, col, 16, 16),
        "expected blocks of at least 16 rows in Triton, got 1 x 16": (
            *(grad, x, torch.zeros(33, dtype=torch.int32), col, 1, 16),
        ),
        "expected blocks of powers of two": (grad, x, crow, col, 16, 12),
    }.items():
        with pytest.raises(ValueError, match=text):
            block_grad_values(*wrong)
