"""quantize_affine and dequantize_affine: the bits of the NumPy reference on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from trimtab import ops
from trimtab.ops import triton_backend
from trimtab.reference import quantize_affine as reference
from trimtab.reference.dtypes import to_float32

ISAS = [isa for isa in ops.available_isas() if isa in ("scalar", "avx2", "avx512")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (shape, group_size): one element, nothing, primes, groups that do and do not divide the row
SHAPES = [
    ((1, 1), None),
    ((0, 7), 4),
    ((3, 0), None),
    ((3, 0), 4),
    ((5, 31), None),
    ((3, 1023), 128),
    ((7, 97), 13),
    ((2, 3, 64), 32),
    ((4, 40), 1),
    ((5, 33), 1000),
    ((17,), 8),
]


def name_of(value: object) -> str:
    return str(value).removeprefix("torch.").replace(" ", "").strip("()").replace(",", "x")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    ops.set_isa(request.param)
    yield request.param
    ops.set_isa(None)


def to_array(t: torch.Tensor) -> np.ndarray:
    """As the reference takes it: bfloat16 as its bits."""
    return t.view(torch.int16).numpy().view(np.uint16) if t.dtype == torch.bfloat16 else t.numpy()


def same_floats(got: torch.Tensor, want: np.ndarray) -> bool:
    """The same bits, except that any NaN equals any NaN."""
    got_values, want_values = to_float32(to_array(got)), to_float32(want)
    if got_values.shape != want_values.shape or to_array(got).dtype != want.dtype:
        return False
    nan = np.isnan(want_values)
    equal = got_values.view(np.uint32) == want_values.view(np.uint32)
    return bool(np.array_equal(np.isnan(got_values), nan) and (equal | nan).all())


def check(x: torch.Tensor, bits: int = 8, group_size: int | None = None) -> None:
    """Codes, factors and the way back, bit for bit."""
    q, scale, zero = ops.quantize_affine(x, bits, group_size)
    want_q, want_scale, want_zero = reference.quantize_affine(
        to_array(x.contiguous()), bits, group_size
    )
    assert np.array_equal(q.numpy(), want_q)
    assert same_floats(scale, want_scale)
    assert np.array_equal(zero.numpy(), want_zero)
    for dtype in DTYPES:
        back = ops.dequantize_affine(q, scale, zero, group_size, dtype)
        want = reference.dequantize_affine(
            want_q, want_scale, want_zero, group_size, name_of(dtype)
        )
        assert same_floats(back, want), dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("shape", "group_size"), SHAPES, ids=name_of)
def test_shapes(
    isa: str, shape: tuple[int, ...], group_size: int | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(len(shape))
    for bits in (2, 4, 8):
        check((torch.randn(shape) * 3).to(dtype), bits, group_size)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width(isa: str, bits: int) -> None:
    """Both ends of the code range are reached, and the error is at most half a step and a rounding."""
    torch.manual_seed(bits)
    x = torch.randn(64, 256) + torch.randn(64, 1)
    check(x, bits)
    q, scale, zero = ops.quantize_affine(x, bits)
    assert int(q.min()) == 0 and int(q.max()) == 2**bits - 1
    error = (ops.dequantize_affine(q, scale, zero) - x).abs()
    # Where hi and -lo both round away from 0 the clamp adds up to another half step at the top end.
    assert (error <= scale * 1.001).all()
    assert (error <= scale * 0.501).double().mean() > 0.99


def bits_of(*words: int) -> torch.Tensor:
    return torch.from_numpy(np.array(words, dtype=np.uint32).view(np.float32))


NAN, INF, ONE, TINY, MAX = 0x7FC00000, 0x7F800000, 0x3F800000, 0x00000001, 0x7F7FFFFF
SIGN = 0x80000000
ROWS = {
    "zeros": [0, SIGN, 0, 0],
    "nan": [ONE, NAN, ONE, 0],
    "negative_nan_with_payload": [ONE, 0xFFC12345, 0, 0],
    "inf": [ONE, INF, 0, 0],
    "minus_inf": [ONE, SIGN | INF, 0, 0],
    "nan_first_then_numbers": [NAN, ONE, SIGN | ONE, ONE],
    "range_without_reciprocal": [TINY, SIGN | TINY, 0x00800000, 0],
    "smallest_range_with_reciprocal": [0x037F0001, 0, 0, TINY],
    "largest_range_without_reciprocal": [0x037F0000, 0, 0, TINY],
    "subnormal_elements": [0x05000000, 0x007FFFFF, 0x807FFFFF, TINY],
    "largest_finite": [MAX, 0, ONE, 0],
    "range_overflows": [MAX, SIGN | MAX, ONE, SIGN | 0x7E800000],
    "range_overflows_by_little": [MAX, SIGN | 0x73800000, ONE, 0],
    "ends_both_round_up": [0x42FF0000, SIGN | 0x42FF0000, ONE, 0],
}


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("row", ROWS)
def test_awkward_rows(isa: str, row: str, bits: int) -> None:
    """Beside ordinary rows, and at every place of a row longer than a vector."""
    x = bits_of(*ROWS[row])
    check(torch.stack([torch.randn(4), x, torch.randn(4)]), bits)
    long = torch.zeros(8, 37)
    for i, place in enumerate((0, 5, 8, 15, 16, 29, 31, 33)):
        long[i, place : place + 4] = x
    check(long, bits)
    check(torch.cat([x, torch.randn(7), x]), bits, group_size=4)
    for dtype in (torch.bfloat16, torch.float16):
        check(x[None].to(dtype), bits)


@pytest.mark.parametrize("constant", [3.7, -3.7, 1e-30, -1e30, 65504.0, 0.0, -0.0])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_constant_row(isa: str, constant: float, bits: int) -> None:
    """No division by zero: it comes back as itself, but for the rounding of the scale."""
    x = torch.full((3, 19), constant)
    q, scale, zero = ops.quantize_affine(x, bits)
    back = ops.dequantize_affine(q, scale, zero)
    torch.testing.assert_close(back, x, rtol=3e-7, atol=0)
    assert torch.isfinite(scale).all()
    if constant == 0:
        assert not q.any() and not scale.any() and not zero.any()
    else:
        assert (zero == (0 if constant > 0 else 2**bits - 1)).all()


def test_zero_is_exact(isa: str) -> None:
    x = torch.randn(32, 65) + 4
    x[:, 7] = 0
    for bits in (2, 3, 8):
        assert (ops.dequantize_affine(*ops.quantize_affine(x, bits))[:, 7] == 0).all()


def test_spoilt_group_spoils_only_itself(isa: str) -> None:
    x = torch.randn(2, 24)
    clean = ops.quantize_affine(x, 8, 8)
    x[0, 9] = float("nan")
    x[1, 23] = float("-inf")
    q, scale, zero = ops.quantize_affine(x, 8, 8)
    assert scale.isnan().tolist() == [[False, True, False], [False, False, True]]
    whole = ~scale.isnan()
    assert torch.equal(scale[whole], clean[1][whole]) and torch.equal(zero[whole], clean[2][whole])
    assert not q[0, 8:16].any() and not zero[0, 1].any()
    assert ops.dequantize_affine(q, scale, zero, 8).isnan().sum() == 16


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_strides(isa: str, dtype: torch.dtype) -> None:
    """A slice, every other row, a transpose, one row repeated."""
    base = torch.randn(32, 48).to(dtype)
    for x in (base[:, 3:20], base[::3], base[:, ::2], base.t(), base[:1].expand(5, 48)):
        check(x, 8, 16)
    q, scale, zero = ops.quantize_affine(base, 8, 16)
    columns = q.t().contiguous().t()
    assert torch.equal(
        ops.dequantize_affine(columns, scale, zero, 16), ops.dequantize_affine(q, scale, zero, 16)
    )


def test_same_for_any_batch_and_thread_count(isa: str) -> None:
    x = torch.randn(70, 5000)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.quantize_affine(x, 8, 96))
            back = ops.dequantize_affine(*results[-1], 96)
            assert torch.equal(back[3:4], ops.dequantize_affine(*(t[3:4] for t in results[-1]), 96))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))
    single = ops.quantize_affine(x[41], 8, 96)
    assert all(torch.equal(a, b[41]) for a, b in zip(single, results[0]))


def test_out_variants() -> None:
    x = torch.randn(6, 50).bfloat16()
    want = ops.quantize_affine(x, 5, 20)
    out = (
        torch.full((6, 50), 99, dtype=torch.uint8),
        torch.full((6, 3), 99.0),
        torch.full((6, 3), 99, dtype=torch.uint8),
    )
    assert ops.quantize_affine(x, 5, 20, out=out) is out
    assert all(torch.equal(a, b) for a, b in zip(out, want))
    for dtype in DTYPES:
        back = torch.empty(6, 50, dtype=dtype)
        assert ops.dequantize_affine(*want, 20, out=back) is back
        assert torch.equal(back, ops.dequantize_affine(*want, 20, dtype))


@pytest.mark.parametrize("group_size", [None, 16, 7], ids=lambda g: f"group-{g}")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_cuda_path_of_dequantize(dtype: torch.dtype, group_size: int | None) -> None:
    """What serves on a GPU, run here on the CPU: the same bits."""
    q, scale, zero = ops.quantize_affine(torch.randn(3, 5, 40), 8, group_size)
    got = triton_backend._dequantize_affine(q, scale, zero, group_size, dtype)
    assert torch.equal(got, ops.dequantize_affine(q, scale, zero, group_size, dtype))


def test_bad_input_is_refused() -> None:
    x = torch.randn(4, 16)
    q, scale, zero = ops.quantize_affine(x, 8, 8)
    cases = [
        (lambda: ops.quantize_affine(x, 1), r"quantize_affine: expected bits in 2\.\.8, got 1"),
        (lambda: ops.quantize_affine(x, 9), r"quantize_affine: expected bits in 2\.\.8, got 9"),
        (
            lambda: ops.quantize_affine(x, 8, 0),
            "^quantize_affine: expected group_size >= 1 or None, got 0",
        ),
        (lambda: ops.quantize_affine(x, 8, -4), "expected group_size >= 1 or None, got -4"),
        (lambda: ops.quantize_affine(x.double()), "expected x of float32, .* got .* float64"),
        (lambda: ops.quantize_affine(torch.tensor(1.0)), "at least one dimension"),
        (
            lambda: ops.quantize_affine(x.clone().requires_grad_()),
            r"x requires grad.*x\.detach\(\)",
        ),
        (lambda: ops.dequantize_affine(q.to(torch.int8), scale, zero, 8), "expected q .*uint8"),
        (
            lambda: ops.dequantize_affine(q, scale, zero),
            "dequantize_affine: expected contiguous scale with 1 groups a row",
        ),
        (lambda: ops.dequantize_affine(q, scale.double(), zero, 8), "expected scale .*float32"),
        (lambda: ops.dequantize_affine(q, scale, zero[:2], 8), "zero_point with 2 groups a row"),
        (
            lambda: ops.dequantize_affine(q, scale.t().contiguous().t(), zero, 8),
            "expected contiguous scale",
        ),
        (
            lambda: ops.dequantize_affine(q, scale, zero, 8, torch.float64),
            "expected out of float32",
        ),
        (
            lambda: ops.dequantize_affine(q, scale, zero, 8, out=torch.empty(4, 15)),
            r"expected contiguous out of \[4, 16\]",
        ),
    ]
    for call, message in cases:
        with pytest.raises(RuntimeError, match=message):
            call()


def test_refused_out_is_left_alone() -> None:
    q = torch.full((4, 16), 7, dtype=torch.uint8)
    zero = torch.full((4, 2), 7, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"expected contiguous scale of \[4, 2\] float32"):
        ops.quantize_affine(torch.randn(4, 16), 8, 8, out=(q, torch.empty(4, 3), zero))
    assert (q == 7).all() and (zero == 7).all()


@pytest.mark.parametrize("group_size", [None, 8, 7], ids=["row", "8", "7"])
def test_opcheck(group_size: int | None) -> None:
    x = torch.randn(3, 20)
    namespace = torch.ops.trimtab
    torch.library.opcheck(namespace.quantize_affine.default, (x, 4, group_size))
    q, scale, zero = ops.quantize_affine(x, 4, group_size)
    torch.library.opcheck(namespace.dequantize_affine.default, (q, scale, zero, group_size))
    outs = {"q": q.clone(), "scale": scale.clone(), "zero_point": zero.clone()}
    torch.library.opcheck(namespace.quantize_affine.out, (x, 4, group_size), outs)
    out = {"out": torch.empty(3, 20)}
    torch.library.opcheck(namespace.dequantize_affine.out, (q, scale, zero, group_size), out)


class RoundTrip(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.dequantize_affine(*ops.quantize_affine(x, 6, 16), 16, torch.bfloat16)


def test_compiles_without_a_break() -> None:
    compiled = torch.compile(RoundTrip(), fullgraph=True, backend="aot_eager")
    for rows in (1, 2, 5):
        x = torch.randn(rows, 40)
        assert torch.equal(compiled(x), RoundTrip()(x))


def test_exports() -> None:
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(RoundTrip(), (torch.randn(4, 40),), dynamic_shapes=({0: batch},))
    x = torch.randn(9, 40)
    assert torch.equal(program.module()(x), RoundTrip()(x))
