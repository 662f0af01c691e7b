"""int8_mm: equal to the reference on every instruction set, registration, bad input."""

from __future__ import annotations

import re

import cases
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trimtab import ops
from trimtab.reference.int8_mm import int8_mm as reference


def operands(M: int, N: int, K: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    a, b = cases.int8(M, K, generator), cases.int8(N, K, generator)
    a_scale = torch.rand(M, generator=generator) * 0.01
    b_scale = torch.rand(N, generator=generator) * 0.01
    if M > 2:
        a_scale[0], a_scale[1], a_scale[2] = 0, float("nan"), 1e-40
    return a, b, a_scale, b_scale


def check(a, b, a_scale, b_scale, bias, activation, dtype) -> None:
    want = reference(
        *map(cases.to_numpy, (a, b, a_scale, b_scale, bias)), activation, cases.name(dtype)
    )
    cases.assert_same_bits(ops.int8_mm(a, b, a_scale, b_scale, bias, activation, dtype), want)
    packed = ops.int8_pack(b)
    cases.assert_same_bits(ops.int8_mm(a, packed, a_scale, b_scale, bias, activation, dtype), want)


@pytest.mark.parametrize("shape", cases.SHAPES, ids=cases.ident)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ident)
def test_bits(
    implementation: str, dtype: torch.dtype, shape: tuple[int, int, int], generator
) -> None:
    a, b, a_scale, b_scale = operands(*shape, generator)
    check(a, b, a_scale, b_scale, None, "none", dtype)
    check(a, b, a_scale, b_scale, torch.randn(shape[1], generator=generator), "none", dtype)


@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ident)
def test_epilogue(implementation: str, dtype: torch.dtype, activation: str, generator) -> None:
    a, b, a_scale, b_scale = operands(37, 53, 90, generator)
    for bias_dtype in cases.DTYPES:
        bias = torch.randn(53, generator=generator).to(bias_dtype)
        check(a, b, a_scale, b_scale, bias, activation, dtype)


def check_int8(a, b, a_scale, b_scale, bias, activation, out_scale) -> torch.Tensor:
    arguments = (a, b, a_scale, b_scale, bias)
    want = reference(*map(cases.to_numpy, arguments), activation, "int8", out_scale.numpy())
    got = ops.int8_mm(*arguments, activation, torch.int8, out_scale=out_scale)
    cases.assert_same_bits(got, want)
    out = torch.full_like(got, 99)
    assert ops.int8_mm(*arguments, activation, out=out, out_scale=out_scale) is out
    cases.assert_same_bits(out, want)
    return got


@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
@pytest.mark.parametrize(
    "shape", [(1, 33, 70), (13, 37, 40), (70, 100, 257), (40, 96, 64)], ids=cases.ident
)
def test_int8_out(
    implementation: str, shape: tuple[int, int, int], activation: str, generator
) -> None:
    """Rows of zeros and NaN; columns of NaN and Inf; every kind of scale."""
    a, b, a_scale, b_scale = operands(*shape, generator)
    for value in cases.OUT_SCALES:
        out_scale = torch.tensor([value])
        check_int8(a, b, a_scale, b_scale, None, activation, out_scale)
        bias = cases.awkward_bias(shape[1], generator)
        check_int8(a, b, a_scale, b_scale, bias, activation, out_scale)


def test_int8_out_rounds_and_clamps(implementation: str) -> None:
    """Sums from -300 to 300 halved: ties to even, +-127 from 254 on; NaN is 0, Inf +-127."""
    sums = torch.arange(-300, 301)
    a = torch.stack([sums // 3, sums - sums // 3 * 3], 1).to(torch.int8)
    b = torch.tensor([[3, 1]], dtype=torch.int8)
    got = check_int8(a, b, torch.ones(601), torch.ones(1), None, "none", torch.tensor([2.0]))
    assert torch.equal(got[:, 0], (sums / 2).round().clamp(-127, 127).to(torch.int8))
    infinite = torch.tensor([float("nan"), float("inf"), float("-inf")])
    one = torch.ones(1)
    got = check_int8(b, b.expand(3, 2).contiguous(), one, torch.ones(3), infinite, "none", one)
    assert got.tolist() == [[0, 127, -127]]


def test_int8_out_feeds_the_next_product(implementation: str, generator) -> None:
    a, b, a_scale, b_scale = operands(40, 48, 64, generator)
    c, c_scale = cases.int8(24, 48, generator), torch.rand(24, generator=generator) * 0.01
    scale = torch.tensor([0.05])
    q = check_int8(a, b, a_scale, b_scale, None, "relu", scale)
    check(q, c, scale.expand(40).contiguous(), c_scale, None, "none", torch.bfloat16)


@pytest.mark.parametrize(
    "shape",
    [(20, 70, 1100), (32, 96, 4100), (49, 65, 2100), (100, 33, 1500), (513, 70, 1030)],
    ids=cases.ident,
)
def test_long_sums_in_cuts(implementation: str, shape: tuple[int, int, int], generator) -> None:
    """K beyond what one pass of the AMX kernel keeps in L1; odd row and column pairs."""
    check(*operands(*shape, generator), None, "none", torch.float32)


def test_random_shapes(isa: str, generator) -> None:
    """Two million outputs an instruction set; `make bits` runs the hundred million."""
    done = 0
    while done < 2_000_000:
        M, N = (int(v) for v in torch.randint(1, 700, (2,), generator=generator))
        K = int(torch.randint(1, 300, (1,), generator=generator))
        a, b, a_scale, b_scale = operands(M, N, K, generator)
        want = reference(*map(cases.to_numpy, (a, b, a_scale, b_scale)))
        got = ops.int8_mm(a, b, a_scale, b_scale, out_dtype=torch.float32)
        cases.assert_same_bits(got, want)
        done += M * N


def test_largest_sum_is_exact(implementation: str) -> None:
    K = ops.library.MAX_K
    a = torch.full((2, K), 127, dtype=torch.int8)
    b = torch.full((3, K), -127, dtype=torch.int8)
    got = ops.int8_mm(a, b, torch.ones(2), torch.ones(3), out_dtype=torch.float32)
    want = torch.tensor(-127 * 127 * K, dtype=torch.int32).to(torch.float32)
    assert torch.equal(got, want.expand(2, 3))


@pytest.mark.parametrize("M", [1, 4, 5, 33, 130])
def test_batch_and_threads_do_not_matter(implementation: str, M: int, generator) -> None:
    a, b, a_scale, b_scale = operands(M, 300, 200, generator)
    whole = ops.int8_mm(a, b, a_scale, b_scale)
    for count in (1, 2, 3):
        with cases.threads(count):
            cases.assert_same_bits(ops.int8_mm(a, b, a_scale, b_scale), whole)
    for m in (0, M // 2, M - 1):
        row = ops.int8_mm(a[m : m + 1], b, a_scale[m : m + 1], b_scale)
        cases.assert_same_bits(row, whole[m : m + 1])


def test_many_rows_in_several_passes(generator) -> None:
    """More rows than one pass holds (16 MiB of panels)."""
    a, b, a_scale, b_scale = operands(9000, 17, 2048, generator)
    check(a, b, a_scale, b_scale, None, "none", torch.float32)


def test_strided(generator) -> None:
    a, b, a_scale, b_scale = operands(40, 60, 80, generator)
    want = ops.int8_mm(a[::2, :33].contiguous(), b[:, 5:38].contiguous(), a_scale[:20], b_scale)
    cases.assert_same_bits(ops.int8_mm(a[::2, :33], b[:, 5:38], a_scale[:20], b_scale), want)
    at = a.t().contiguous().t()
    cases.assert_same_bits(
        ops.int8_mm(at, b, a_scale, b_scale), ops.int8_mm(a, b, a_scale, b_scale)
    )


def test_registration(generator) -> None:
    a, b, a_scale, b_scale = operands(9, 7, 10, generator)
    bias = torch.randn(7, generator=generator)
    op = torch.ops.trimtab.int8_mm
    torch.library.opcheck(op.default, (a, b, torch.ones(9), b_scale, bias, 2, torch.float32))
    torch.library.opcheck(op.default, (a, ops.int8_pack(b), torch.ones(9), b_scale))
    codes = (a, b, torch.ones(9), b_scale, bias, 2, torch.int8, torch.ones(1))
    torch.library.opcheck(op.default, codes)
    out = torch.empty(9, 7, dtype=torch.int8)
    torch.library.opcheck(op.out, (*codes[:6], torch.ones(1)), {"out": out})
    out = torch.empty(9, 7)
    torch.library.opcheck(op.out, (a, b, torch.ones(9), b_scale, bias, 0), {"out": out})
    assert ops.int8_mm(a, b, a_scale, b_scale, out=out) is out
    cases.assert_same_bits(out, ops.int8_mm(a, b, a_scale, b_scale, out_dtype=torch.float32))
    with FlopCounterMode(display=False) as counter:
        ops.int8_mm(a, b, a_scale, b_scale)
    assert counter.get_total_flops() == 2 * 9 * 7 * 10


def bad(**changes):
    """The arguments of a good call with some replaced."""
    good = {
        "a": torch.zeros(2, 8, dtype=torch.int8),
        "b": torch.zeros(3, 8, dtype=torch.int8),
        "a_scale": torch.ones(2),
        "b_scale": torch.ones(3),
    }
    return good | changes


BAD = {
    "a-dtype": (bad(a=torch.zeros(2, 8)), "expected a of 2-D int8, got [2, 8] float32"),
    "a-rank": (bad(a=torch.zeros(8, dtype=torch.int8)), "expected a of 2-D int8, got [8] int8"),
    "b-dtype": (bad(b=torch.zeros(3, 8)), "got [3, 8] float32"),
    "k-mismatch": (bad(b=torch.zeros(3, 9, dtype=torch.int8)), "expected weight [N=3, K=8] int8"),
    "a-scale-length": (bad(a_scale=torch.ones(3)), "expected contiguous a_scale [M=2], got [3]"),
    "a-scale-dtype": (bad(a_scale=torch.ones(2).double()), "expected a_scale of 1-D float32"),
    "b-scale-length": (bad(b_scale=torch.ones(4)), "expected weight [N=4, K=8] int8"),
    "bias-length": (bad(bias=torch.ones(4)), "expected a contiguous bias [N=3], got [4]"),
    "bias-dtype": (bad(bias=torch.ones(3).double()), "expected bias of float32, bfloat16"),
    "out-dtype": (bad(out_dtype=torch.float64), "expected out of float32, bfloat16 or float16"),
    "packed-size": (
        bad(b=torch.zeros(100, dtype=torch.int8)),
        "expected a packed weight of 1088 bytes (from int8_pack) for N=3 and the K=8",
    ),
    "packed-strided": (bad(b=torch.zeros(2176, dtype=torch.int8)[::2]), "contiguous packed weight"),
    "packed-misaligned": (
        bad(b=torch.zeros(1088 + 1, dtype=torch.int8)[1:]),
        "expected b_packed aligned to 64 bytes",
    ),
    "out-shape": (bad(out=torch.empty(3, 2)), "expected contiguous out of [2, 3] float32"),
    "out-scale-missing": (
        bad(out_dtype=torch.int8),
        "expected out_scale [1] float32 for int8 out, got None",
    ),
    "out-scale-and-int8-out": (
        bad(out=torch.empty(2, 3, dtype=torch.int8)),
        "expected out_scale [1] float32 for int8 out, got None",
    ),
    "out-scale-unasked": (
        bad(out_scale=torch.ones(1)),
        "expected out_scale with int8 out alone, got one with bfloat16",
    ),
    "out-scale-dtype": (
        bad(out_dtype=torch.int8, out_scale=torch.ones(1).double()),
        "expected out_scale [1] float32, got [1] float64",
    ),
    "out-scale-shape": (
        bad(out_dtype=torch.int8, out_scale=torch.ones(3)),
        "expected out_scale [1] float32, got [3] float32",
    ),
    "out-scale-grad": (
        bad(out_dtype=torch.int8, out_scale=torch.ones(1, requires_grad=True)),
        "out_scale requires grad",
    ),
    "scale-grad": (bad(b_scale=torch.ones(3, requires_grad=True)), "b_scale requires grad"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    arguments, message = BAD[case]
    with pytest.raises(RuntimeError, match=re.escape(message)) as caught:
        ops.int8_mm(**arguments)
    assert str(caught.value).startswith("int8_mm: ")


def test_k_above_the_bound() -> None:
    K = ops.library.MAX_K + 1
    a = torch.zeros(1, K, dtype=torch.int8)
    with pytest.raises(RuntimeError, match=f"int8_mm: expected K <= 133144.*got K={K}"):
        ops.int8_mm(a, a, torch.ones(1), torch.ones(1))


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match="int8_mm: expected activation in .*got 'tanh'"):
        ops.int8_mm(**bad(), activation="tanh")


@pytest.mark.parametrize(
    ("name", "message"),
    [("sse", 'expected scalar, avx2, avxvnni, avx512 or amx, got "sse"'), ("", "")],
    ids=["unknown", "empty"],
)
def test_isa_names(name: str, message: str) -> None:
    before = ops.get_isa()
    if message:
        with pytest.raises(ValueError, match=message):
            ops.set_isa(name)
    else:
        ops.set_isa(name)
    assert ops.get_isa() == before
