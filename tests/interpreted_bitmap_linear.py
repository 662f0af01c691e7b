"""bitmap_linear's Triton kernel, interpreted, against float64 and against the CPU's bits.

Run by test_triton_bitmap_linear.py, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from sparse_cases import assert_near
from triton_interpret import at_the_end, mend_interpreter

from trimtab import ops
from trimtab.kernels.bitmap_linear import bitmap_linear, share_of

mend_interpreter()
kernel = importlib.import_module("trimtab.kernels.bitmap_linear")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One part and several, a last one that is shorter; words that end within a step; tiles of M and N.
SHAPES = [(1, 1, 1), (3, 67, 130), (17, 3, 600), (2, 5, 0), (0, 7, 9)]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "LEAST_STEPS", 2)
    monkeypatch.setattr(kernel, "COUNTED", 4)


def weight_of(N: int, K: int, kept: float, dtype: torch.dtype) -> torch.Tensor:
    """Rows with nothing and with everything kept among them."""
    weight = torch.where(torch.rand(N, K) < kept, torch.randn(N, K), 0.0)
    weight[1::7], weight[2::7] = 0.0, torch.randn(K)
    return (40 * weight).clamp(-127, 127).to(dtype) if dtype == torch.int8 else weight.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    M, N, K = shape
    torch.manual_seed(K)
    weight = weight_of(N, K, 0.4, dtype)
    x, bias = torch.randn(2 * M, K).to(dtype)[::2], torch.randn(N)
    parts = ops.bitmap_pack(weight)
    if M and K:  # a row more would be in memory that cannot be read
        x, parts = at_the_end(x.contiguous()), tuple(map(at_the_end, parts))
    got = bitmap_linear(x, *parts, None, bias, "relu")
    want = (x.double() @ weight.double().t() + bias.double()).relu()
    assert_near(got, x, weight, want, K)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_is_exact(shape: tuple[int, int, int]) -> None:
    M, N, K = shape
    x_dtype = DTYPES[M % 3]
    torch.manual_seed(K)
    weight = weight_of(N, K, 0.4, torch.int8)
    x, scale, bias = torch.randn(M, K).to(x_dtype), torch.rand(N) + 0.1, torch.randn(N)
    if M > 1 and K:
        x[1, K // 2] = float("nan")
    args = x, *ops.bitmap_pack(weight), scale, bias, "gelu"
    got, want = bitmap_linear(*args), ops.bitmap_linear(*args)
    assert got.dtype == want.dtype and torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(), want.nan_to_num())


def test_parts() -> None:
    """By the weight's shape alone: rows fill a GPU, or parts of them do, of two steps at least."""
    assert [share_of(N, 128, 2) for N in (64, 16384, 32768)] == [16, 64, 128]
    assert share_of(64, 8, 2) == 4 and share_of(64, 0, 2) == 4 and share_of(64, 33, 1) == 5


@pytest.mark.parametrize("K", [100, 600])
def test_pruned_weights_meet_no_inf(K: int) -> None:
    """And a sum that overflows stays what it is; kept zeros are kept."""
    torch.manual_seed(K)
    x, weight = torch.randn(3, K), weight_of(20, K, 0.5, torch.float32)
    mask = weight != 0
    weight[mask & (torch.rand(20, K) < 0.2)] = 0.0
    x[1, 7], x[2, 9] = float("inf"), float("nan")
    weight[:, :2], mask[:, :2], x[:, :2] = 0.0, False, 0.0
    weight[5, :2], mask[5, :2], x[0, :2] = 3e38, True, 3e38
    got = bitmap_linear(x, *ops.bitmap_pack(weight, mask))
    for m, k in ((1, 7), (2, 9)):
        assert torch.equal(~got[m].isfinite(), mask[:, k])
    assert bool(got[0, 5].isinf()) and bool(got[0, :5].isfinite().all())
    masked = torch.where(mask[None], weight * x[:, None], torch.zeros(())).sum(-1)
    torch.testing.assert_close(got, masked, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_wrong_parts_read_nothing_else(dtype: torch.dtype) -> None:
    """Values lie between others, which a read past them would meet: the interpreter reads anywhere."""
    torch.manual_seed(0)
    weight = weight_of(20, 200, 0.3, dtype)
    values, bitmap, start = ops.bitmap_pack(weight)
    count = values.numel()
    around = torch.full((3 * count,), 100, dtype=dtype)
    values = around[count : 2 * count].copy_(torch.where(values == 0, values, 1))
    x, scale = torch.ones(2, 200), torch.full((20,), 1.0) if dtype == torch.int8 else None
    for wrong in (start + 2**40, -start, start * 3, start + count // 2):
        got = bitmap_linear(x, values, torch.full_like(bitmap, 255), wrong, scale)
        assert bool((got <= 201).all())


def test_bad_input() -> None:
    values, bitmap, start = ops.bitmap_pack(torch.ones(16, 64))
    x, scale = torch.ones(3, 64), torch.ones(16)
    for text, args in {
        "expected x float32 of rank 2": (x.half(), values, bitmap, start),
        r"expected bitmap uint8 \(16, 16\)": (torch.ones(3, 65), values, bitmap, start),
        r"expected row_start int64 \(17,\)": (x, values, bitmap, start[1:]),
        "at most 32 rows in Triton, got M=33": (torch.ones(33, 64), values, bitmap, start),
        "expected weight_scale with int8 values": (x, values, bitmap, start, scale),
        r"float32 \(16,\) for int8": (x, values.to(torch.int8), bitmap, start),
        r"expected bias .* \(16,\)": (x, values, bitmap, start, None, scale[1:]),
        "expected activation": (x, values, bitmap, start, None, None, "tanh"),
    }.items():
        with pytest.raises(ValueError, match=f"bitmap_linear: .*{text}|{text}"):
            bitmap_linear(*args)
    long = 133_145
    with pytest.raises(ValueError, match="expected K <= 133144"):
        bitmap_linear(
            torch.ones(1, long), torch.ones(0, dtype=torch.int8),
            torch.zeros(1, (long + 63) // 64 * 8, dtype=torch.uint8), torch.zeros(2).long(), scale[:1],
        )  # fmt: skip
