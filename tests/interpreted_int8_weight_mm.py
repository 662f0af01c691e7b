"""int8_weight_mm's Triton kernel, interpreted, against a float64 product (NUMERICS.md section 7).

Run by test_triton_int8_weight_mm.py, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import pytest
import torch
from triton_interpret import mend_interpreter, same, to_array

from trimtab.kernels import tuning
from trimtab.kernels.activation import ACTIVATIONS
from trimtab.kernels.int8_weight_mm import int8_weight_mm
from trimtab.reference.int8_mm import epilogue

mend_interpreter()
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, for Inf and NaN

DTYPES = ["float32", "bfloat16", "float16"]
# Half a unit in the last place: what one rounding to the dtype may add, relative to the value.
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
SHAPES = [(0, 3, 5), (3, 0, 5), (1, 1, 1), (1, 17, 31), (5, 7, 16), (17, 33, 129), (130, 65, 264)]


def int8(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def scales(n: int) -> torch.Tensor:
    return torch.rand(n) * 0.01 + 1e-4


def check(a, b, b_scale, bias=None, out_dtype=None, **arguments):
    """Within 2 sqrt(K) eps of fp32 sums, and one rounding of the output."""
    got = int8_weight_mm(a, b, b_scale, bias, "none", out_dtype, **arguments)
    assert got.dtype == (out_dtype or a.dtype)
    want = a.double() @ b.double().t() * b_scale.double()
    if bias is not None:
        want = want + bias.double()
    limit = 2 * a.shape[1] ** 0.5 * 2.0**-23 + ROUNDING[str(got.dtype).removeprefix("torch.")]
    assert got.shape == want.shape
    assert (got.double() - want).norm() <= limit * want.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_shapes(shape: tuple[int, int, int], dtype: str) -> None:
    M, N, K = shape
    torch.manual_seed(K)
    a = torch.randn(M, K).to(getattr(torch, dtype))
    check(a, int8(N, K), scales(N), torch.randn(N))
    check(a, int8(N, K), scales(N), out_dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue_is_exact(activation: str, dtype: str) -> None:
    """Small integers in a: the sum has one value in any order, and the rest is int8_mm's."""
    a, b, b_scale = (
        torch.randint(-8, 9, (13, 40)).to(getattr(torch, dtype)),
        int8(37, 40),
        scales(37),
    )
    bias = torch.randn(37).bfloat16()
    got = int8_weight_mm(a, b, b_scale, bias, activation)
    sums = (a.double() @ b.double().t()).float().numpy()
    want = epilogue(sums, b_scale.numpy(), None, to_array(bias), activation, dtype)
    assert same(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype: str) -> None:
    M, N, K = 19, 35, 33
    floats, bytes_ = torch.randn(80, 80).to(getattr(torch, dtype)), int8(80, 80)
    for a in (floats[3 : 3 + M, 5 : 5 + K], floats[:K, :M].t(), floats[: 2 * M : 2, : 2 * K : 2]):
        for b in (bytes_[3 : 3 + N, 5 : 5 + K], bytes_[:K, :N].t()):
            out = torch.empty(2 * N, M).t()[:, ::2]
            check(a, b, scales(2 * N)[::2], torch.randn(2 * N)[::2], torch.float32, out=out)


def test_nan_and_inf_reach_their_rows_only() -> None:
    a, b = torch.randn(4, 16), int8(7, 16)
    b[b == 0] = 1
    a[1, 2], a[2, 3] = torch.nan, torch.inf
    out = int8_weight_mm(a, b, scales(7))
    assert out[1].isnan().all() and out[2].isinf().all() and out[[0, 3]].isfinite().all()


HALF_CONFIGS = sorted({row.config for rows in tuning.INT8_WEIGHT_MM.values() for row in rows})
FP32_CONFIGS = sorted({row.config for rows in tuning.INT8_WEIGHT_MM_FP32.values() for row in rows})


@pytest.mark.parametrize(
    ("config", "dtype"),
    [(c, "bfloat16") for c in HALF_CONFIGS] + [(c, "float32") for c in FP32_CONFIGS],
    ids=str,
)
def test_every_config(config: tuning.MatmulConfig, dtype: str) -> None:
    """A tile and a bit in each direction."""
    M, N, K = config.BLOCK_M + 1, config.BLOCK_N + 3, config.BLOCK_K + 4
    check(torch.randn(M, K).to(getattr(torch, dtype)), int8(N, K), scales(N), config=config)


GROUPS = [(1, 70, 256, 64), (5, 33, 100, 32), (17, 129, 264, 128), (3, 9, 70, 4), (4, 5, 300, 100)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "zero-point"])
@pytest.mark.parametrize("case", GROUPS, ids=lambda c: "x".join(map(str, c)))
def test_groups(case: tuple[int, int, int, int], zero: bool, dtype: str) -> None:
    """All values of b and zero, whose difference takes nine bits."""
    M, N, K, size = case
    groups = -(-K // size)
    torch.manual_seed(K)
    a, b = (
        torch.randn(M, K).to(getattr(torch, dtype)),
        torch.randint(-128, 128, (N, K)).to(torch.int8),
    )
    b_scale, bias = torch.rand(groups, N) * 0.01 + 1e-4, torch.randn(N)
    zero_point = torch.randint(-128, 128, (groups, N)).to(torch.int8) if zero else None
    got = int8_weight_mm(
        a, b, b_scale, bias, out_dtype=torch.float32, zero_point=zero_point, group_size=size
    )
    values, each = b.double(), torch.arange(K) // size
    if zero_point is not None:
        values = values - zero_point.double()[each].t()
    want = a.double() @ (values * b_scale.double()[each].t()).t() + bias.double()
    assert (got.double() - want).norm() <= 2 * K**0.5 * 2.0**-23 * want.norm()


@pytest.mark.parametrize("shape", [(37,), (1, 37)], ids=["N", "1xN"])
def test_zero_point_of_one_group(shape: tuple[int, ...]) -> None:
    """Small integers: the sum is exact, and so is the rest."""
    a, b, b_scale = torch.randint(-8, 9, (13, 40)).float(), int8(37, 40), scales(37)
    zero = int8(37)
    got = int8_weight_mm(
        a, b, b_scale.reshape(shape), zero_point=zero.reshape(shape), group_size=64
    )
    sums = (a.double() @ (b.double() - zero.double()[:, None]).t()).float().numpy()
    assert same(got, epilogue(sums, b_scale.numpy(), None, None, "none", "float32"))


def test_every_step_of_a_group_is_its_own() -> None:
    """Integers and scales that are powers of two: exact, whatever the group's length and the tile's."""
    M, N, K = 3, 21, 520
    a, b = torch.randint(-8, 9, (M, K)).bfloat16(), int8(N, K)
    for size in (4, 12, 36, 128, 256, 516):
        groups, each = -(-K // size), torch.arange(K) // size
        b_scale = torch.randint(-3, 4, (groups, N)).float().exp2()
        want = a.double() @ (b.double() * b_scale.double()[each].t()).t()
        got = int8_weight_mm(a, b, b_scale, out_dtype=torch.float32, group_size=size)
        assert torch.equal(got.double(), want), size


def test_refusals() -> None:
    a, b = torch.ones(3, 4), int8(5, 4)
    with pytest.raises(ValueError, match=r"expected b_scale float32 \(2, 5\) on cpu, got"):
        int8_weight_mm(torch.ones(3, 8), int8(5, 8), scales(5), group_size=4)
    with pytest.raises(ValueError, match=r"expected zero_point int8 \(5,\) on cpu, got"):
        int8_weight_mm(a, b, scales(5), zero_point=int8(4))
    with pytest.raises(ValueError, match=r"int8_weight_mm: expected a float32 .* got int8"):
        int8_weight_mm(b, b, scales(5))
    with pytest.raises(ValueError, match=r"expected b int8 \(5, 4\) on cpu, got int8 \(5, 3\)"):
        int8_weight_mm(a, b[:, :3], scales(5))
