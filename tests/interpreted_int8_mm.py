"""int8_mm's and int8_linear's Triton kernels, interpreted: the reference's bits, everywhere.

Run by test_triton_int8_mm.py, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import pytest
import torch
from triton_interpret import from_bits, mend_interpreter, same, to_array

from trimtab.kernels import tuning
from trimtab.kernels.activation import ACTIVATIONS
from trimtab.kernels.int8_linear import int8_linear
from trimtab.kernels.int8_mm import MAX_K, int8_mm
from trimtab.kernels.launch import k_alignment
from trimtab.reference.int8_linear import int8_linear as linear_reference
from trimtab.reference.int8_mm import int8_mm as reference

mend_interpreter()
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, for Inf and NaN

DTYPES = ["float32", "bfloat16", "float16"]
# M, N, K: nothing, ones, primes, one more than a tile, a few tiles with a group cut short
SHAPES = [
    (0, 3, 5),
    (3, 0, 5),
    (3, 5, 0),
    (1, 1, 1),
    (1, 17, 31),
    (5, 7, 16),
    (17, 33, 129),
    (65, 67, 127),
    (130, 65, 264),
    (300, 131, 20),
]


def int8(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def scales(n: int) -> torch.Tensor:
    return torch.rand(n) * 0.01 + 1e-4


def check(a, b, a_scale, b_scale, bias=None, activation="none", dtype="float32", **arguments):
    out_dtype = getattr(torch, dtype)
    got = int8_mm(a, b, a_scale, b_scale, bias, activation, out_dtype, **arguments)
    arrays = [None if t is None else to_array(t) for t in (a, b, a_scale, b_scale, bias)]
    want = reference(*arrays, activation, dtype)
    assert same(got, want)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_shapes(shape: tuple[int, int, int]) -> None:
    M, N, K = shape
    torch.manual_seed(K)
    bias = torch.randn(N).bfloat16()
    check(int8(M, K), int8(N, K), scales(M), scales(N), bias, "gelu", "bfloat16")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias_dtype", [None, *DTYPES])
def test_epilogue(bias_dtype: str | None, activation: str, dtype: str) -> None:
    M, N, K = 13, 37, 40
    bias = None if bias_dtype is None else torch.randn(N).to(getattr(torch, bias_dtype))
    check(int8(M, K), int8(N, K), scales(M), scales(N), bias, activation, dtype)


# Zero, subnormal, huge (the product overflows), Inf, NaN, negative.
AWKWARD = from_bits(
    [0, 0x80000000, 1, 0x00400000, 0x7F000000, 0x7F800000, 0x7FC00000, 0xC0490FDB, 0x38D1B717]
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_awkward_scales_and_bias(activation: str, dtype: str) -> None:
    """Each awkward scale of a meets each of b, and each bias."""
    n, K = len(AWKWARD), 24
    b_scale = AWKWARD.repeat_interleave(n)
    check(int8(n, K), int8(n * n, K), AWKWARD, b_scale, AWKWARD.repeat(n), activation, dtype)


@pytest.mark.parametrize("out_scale", [0.02, 1e-6, 2.0, 1e-40, float("inf"), float("nan")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_int8_out(activation: str, out_scale: float) -> None:
    """Each awkward scale of a meets each of b, and each bias; and a plain product."""
    n, K = len(AWKWARD), 24
    scale = torch.tensor([out_scale])
    b_scale = AWKWARD.repeat_interleave(n)
    awkward = (int8(n, K), int8(n * n, K), AWKWARD, b_scale, AWKWARD.repeat(n))
    plain = (int8(13, K), int8(37, K), scales(13), scales(37), None)
    for operands in (awkward, plain):
        want = reference(
            *[None if t is None else t.numpy() for t in operands], activation, "int8", scale.numpy()
        )
        got = int8_mm(*operands, activation, torch.int8, out_scale=scale)
        assert got.dtype == torch.int8 and (got.numpy() == want).all()
        out = torch.empty_like(got)
        assert int8_mm(*operands, activation, out=out, out_scale=scale) is out
        assert torch.equal(out, got)


def test_linear_int8_out() -> None:
    x, w, w_scale, scale = torch.randn(5, 33), int8(7, 33), scales(7), torch.tensor([0.03])
    x[1, 2] = torch.nan
    arrays = (x.numpy(), w.numpy(), w_scale.numpy())
    want = linear_reference(*arrays, None, "gelu", "int8", scale.numpy())
    got = int8_linear(x, w, w_scale, None, "gelu", torch.int8, out_scale=scale)
    assert (got.numpy() == want).all() and (got[1] == 0).all()


def test_the_longest_sum() -> None:
    """127 * 127 * K just fits int32, and rounds on its way to fp32."""
    a = torch.full((2, MAX_K), 127, dtype=torch.int8)
    a[1] = -127
    one = torch.ones(2)
    check(a, a.flip(0), one, one)
    with pytest.raises(ValueError, match=f"int8_mm: expected K <= {MAX_K}, .* got {MAX_K + 1}"):
        int8_mm(int8(1, MAX_K + 1), int8(1, MAX_K + 1), one[:1], one[:1])


@pytest.mark.parametrize(("K", "align"), [(48, 16), (40, 8), (36, 4), (38, 1), (37, 1)])
def test_alignment(K: int, align: int) -> None:
    a, b = int8(19, K), int8(21, K)
    assert k_alignment(a, b) == align
    check(a, b, scales(19), scales(21))


def test_strides() -> None:
    M, N, K = 19, 35, 33
    wide = int8(80, 80)
    views_a = [wide[3 : 3 + M, 5 : 5 + K], wide[: 2 * M : 2, : 2 * K : 2], wide[:K, :M].t()]
    views_b = [wide[40 : 40 + N, 7 : 7 + K], wide[: 2 * N : 2, : 2 * K : 2], wide[:K, :N].t()]
    for a in views_a:
        for b in views_b:
            check(a, b, scales(2 * M)[::2], scales(2 * N)[::2], torch.randn(2 * N)[::2])
    check(int8(1, K).expand(M, K), views_b[0], scales(M), scales(N))


def test_out() -> None:
    M, N, K = 19, 35, 33
    a, b, a_scale, b_scale = int8(M, K), int8(N, K), scales(M), scales(N)
    want = int8_mm(a, b, a_scale, b_scale, out_dtype=torch.float16)
    for make in (
        lambda: torch.empty(M, N, dtype=torch.float16),
        lambda: torch.empty(N, M, dtype=torch.float16).t(),
        lambda: torch.empty(2 * M, 3 * N, dtype=torch.float16)[::2, ::3],
    ):
        out = make()
        assert int8_mm(a, b, a_scale, b_scale, out=out) is out
        assert torch.equal(out, want)
    frame = torch.full((M + 2, N + 2), 7.0)
    check(a, b, a_scale, b_scale, out=frame[1:-1, 1:-1])
    frame[1:-1, 1:-1] = 7.0
    assert (frame == 7.0).all(), "wrote outside of out"


CONFIGS = sorted({row.config for rows in tuning.INT8_MM.values() for row in rows})


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_config(config: tuning.MatmulConfig) -> None:
    """A tile and a bit in each direction."""
    M, N, K = config.BLOCK_M + 1, config.BLOCK_N + 3, config.BLOCK_K + 4
    check(int8(M, K), int8(N, K), scales(M), scales(N), config=config)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(33,), (0, 33), (5, 33), (2, 3, 33), (2, 0, 33), (4, 0)], ids=str
)
def test_linear(shape: tuple[int, ...], dtype: str) -> None:
    x = torch.randn(shape).to(getattr(torch, dtype))
    w, w_scale, bias = int8(7, shape[-1]), scales(7), torch.randn(7)
    want = linear_reference(to_array(x), w.numpy(), w_scale.numpy(), bias.numpy(), "silu")
    assert same(int8_linear(x, w, w_scale, bias, "silu"), want)


def test_linear_with_a_padded_weight() -> None:
    """Whatever lies beyond K in the weight has no say."""
    x, w, w_scale = torch.randn(5, 33), int8(7, 48), scales(7)
    want = linear_reference(x.numpy(), w[:, :33].numpy(), w_scale.numpy())
    assert same(int8_linear(x, w, w_scale), want)


def test_linear_with_a_nan_row() -> None:
    x, w, w_scale = torch.randn(3, 8), int8(7, 8), scales(7)
    x[1, 2] = torch.nan
    out = int8_linear(x, w, w_scale, out_dtype=torch.bfloat16)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


def test_refusals() -> None:
    a, b, s3, s5 = int8(3, 4), int8(5, 4), scales(3), scales(5)
    for arguments, message in (
        ((a.float(), b, s3, s5), "int8_mm: expected a int8 of rank 2, got float32"),
        ((a, b[:, :3], s3, s5), r"expected b int8 \(5, 4\) on cpu, got int8 \(5, 3\)"),
        ((a, b, s5, s5), r"expected a_scale float32 \(3,\) on cpu, got float32 \(5,\)"),
        ((a, b, s3, s5.double()), r"expected b_scale float32 \(5,\)"),
        ((a, b, s3, s5, s3), r"expected bias float32 or bfloat16 or float16 \(5,\)"),
        ((a, b, s3, s5, None, "tanh"), "int8_mm: expected activation .* got 'tanh'"),
        ((a, b, s3, s5, None, "none", torch.int32), "expected out_dtype .* got torch.int32"),
        ((a, b, s3, s5, None, "none", torch.int8), r"out_scale float32 \(1,\) .* got None"),
        ((a, b, s3, s5, None, "none", None, s3), "expected out float32"),
    ):
        with pytest.raises(ValueError, match=message):
            int8_mm(*arguments)
    with pytest.raises(ValueError, match="expected out_scale with int8 out alone, got .*bfloat16"):
        int8_mm(a, b, s3, s5, out_scale=s3[:1])
    with pytest.raises(ValueError, match=r"expected out_scale float32 \(1,\) on cpu, got .*\(3,\)"):
        int8_mm(a, b, s3, s5, None, "none", torch.int8, out_scale=s3)
    with pytest.raises(ValueError, match=r"expected strides of out below .*, got \(1, 8388608\)"):
        int8_mm(a, b, s3, s5, out=torch.empty_strided((3, 5), (1, 2**23)))
    with pytest.raises(ValueError, match=r"int8_linear: expected x .* K <= 4, w's, got float32"):
        int8_linear(torch.ones(3, 5), b, s5)
