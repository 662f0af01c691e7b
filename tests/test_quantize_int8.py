"""quantize_int8: equal to the reference on every instruction set, strides, registration, bad input."""

from __future__ import annotations

import cases
import pytest
import torch

from trimtab import ops
from trimtab.reference.quantize_int8 import quantize_int8 as reference

SIZES = [(0, 5), (5, 0), (1, 1), (6, 3), (9, 64), (7, 65), (5, 1023), (64, 4096)]


def check(x: torch.Tensor) -> None:
    q, scale = ops.quantize_int8(x)
    want_q, want_scale = reference(cases.to_numpy(x))
    cases.assert_same_bits(q, want_q)
    cases.assert_same_bits(scale, want_scale)


@pytest.mark.parametrize("size", SIZES, ids=cases.ident)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ident)
def test_bits(implementation: str, dtype: torch.dtype, size: tuple[int, int], generator) -> None:
    check(cases.awkward_rows(*size, dtype, generator))


def test_halves_round_to_even(implementation: str) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 63.5]])
    q, scale = ops.quantize_int8(x)
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, 64]] and scale.tolist() == [1.0]


def test_special_rows(implementation: str) -> None:
    tiny = 1e-38  # 127 / 1e-38 overflows
    x = torch.tensor([[0.0, -0.0], [1.0, float("nan")], [float("inf"), 1.0], [tiny, -tiny]])
    q, scale = ops.quantize_int8(x)
    assert q.tolist() == [[0, 0]] * 4
    assert scale[0] == 0 and scale[3] == 0 and bool(scale[1:3].isnan().all())


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x.t(),
        lambda x: x[3:4].expand(6, -1),
        lambda x: x[None, :, None].expand(2, -1, 3, -1),
        lambda x: x[::2],
        lambda x: x[0],
        lambda x: x.reshape(2, 6, 5, 4).transpose(0, 2),
    ],
    ids=["columns", "transposed", "expanded-row", "expanded-4d", "rows", "1d", "4d"],
)
def test_strides(view, generator) -> None:
    check(view(cases.awkward_rows(12, 20, torch.float32, generator)))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_and_batch_do_not_matter(count: int, generator) -> None:
    x = torch.randn(300, 700, generator=generator)
    q, scale = ops.quantize_int8(x)
    with cases.threads(count):
        again, scale_again = ops.quantize_int8(x)
    row, row_scale = ops.quantize_int8(x[123])
    assert torch.equal(q, again) and torch.equal(scale, scale_again)
    assert torch.equal(q[123], row) and scale[123] == row_scale


def test_out(generator) -> None:
    x = torch.randn(5, 9, generator=generator)
    q, scale = torch.empty(5, 9, dtype=torch.int8), torch.empty(5)
    got = ops.quantize_int8(x, out=(q, scale))
    assert got[0] is q and got[1] is scale
    want = ops.quantize_int8(x)
    assert torch.equal(q, want[0]) and torch.equal(scale, want[1])


def test_opcheck(generator) -> None:
    x = torch.randn(4, 6, generator=generator)
    torch.library.opcheck(torch.ops.trimtab.quantize_int8.default, (x,))
    q, scale = torch.empty(4, 6, dtype=torch.int8), torch.empty(4)
    torch.library.opcheck(torch.ops.trimtab.quantize_int8.out, (x,), {"q": q, "scale": scale})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.zeros(2, 3, dtype=torch.int32), r"quantize_int8: expected x .*got \[2, 3\]"),
        (lambda: torch.zeros(2, 3, dtype=torch.float64), r"quantize_int8: .*float64"),
        (lambda: torch.tensor(1.0), r"quantize_int8: expected x of at least one dimension"),
        (lambda: torch.zeros(2, 3, requires_grad=True), r"quantize_int8: x requires grad"),
    ],
    ids=["int32", "float64", "0d", "requires-grad"],
)
def test_bad_input(make, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.quantize_int8(make())


def test_bad_out() -> None:
    x = torch.zeros(2, 3)
    q, scale = torch.empty(2, 3, dtype=torch.int8), torch.empty(3)
    with pytest.raises(RuntimeError, match=r"quantize_int8: expected contiguous scale of \[2\]"):
        ops.quantize_int8(x, out=(q, scale))
    with pytest.raises(RuntimeError, match=r"quantize_int8: expected contiguous q of \[2, 3\]"):
        ops.quantize_int8(x, out=(q.t(), scale))
