"""int8_weight_mm: one order of sums everywhere, gradients, autocast, compile, export, bad input."""

from __future__ import annotations

import re

import cases
import cuda_sim
import numpy as np
import pytest
import torch
import torch._dynamo.testing
from torch.utils.flop_counter import FlopCounterMode

from trimtab import ops
from trimtab.ops import triton_backend
from trimtab.ops.int8_weight_mm import dequantize_weight
from trimtab.reference import int8_weight_mm as reference

op = torch.ops.trimtab.int8_weight_mm

# Bits for the reference: one sequential fma after another is slow in NumPy.
SMALL = [
    (0, 5, 8),
    (3, 0, 7),
    (2, 3, 0),
    (1, 1, 1),
    (1, 33, 70),
    (4, 64, 64),
    (5, 16, 65),
    (9, 81, 131),
]
GROUPS = [None, 4, 32, 52]


def operands(
    N: int, K: int, group_size: int | None, generator: torch.Generator
) -> tuple[torch.Tensor, ...]:
    """weight, weight_scale, zero_point, bias: every int8 code, every zero point."""
    groups = 1 if group_size is None or K == 0 else -(-K // group_size)
    shape = (N,) if group_size is None else (groups, N)
    scale = torch.rand(shape, generator=generator) / 64
    zero = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
    return cases.int8(N, K, generator), scale, zero, torch.randn(N, generator=generator)


@pytest.mark.parametrize("group_size", GROUPS, ids=lambda g: f"group-{g}")
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ident)
@pytest.mark.parametrize("shape", SMALL, ids=cases.ident)
def test_bits(isa: str, shape, dtype, group_size, generator) -> None:
    """NaN, Inf and subnormal rows included; packed and plain; with and without zero point and bias."""
    M, N, K = shape
    x = cases.awkward_rows(M, K, dtype, generator)
    weight, scale, zero, bias = operands(N, K, group_size, generator)
    for zero_point, b in ((zero, bias), (None, None)):
        arrays = map(cases.to_numpy, (x, weight, scale, zero_point, b))
        want = reference.int8_weight_mm(*arrays, group_size, "relu")
        got = ops.int8_weight_mm(x, weight, scale, zero_point, b, group_size, "relu")
        cases.assert_same_bits(got, want)
        packed = ops.int8_pack(weight)
        got = ops.int8_weight_mm(x, packed, scale, zero_point, b, group_size, "relu")
        cases.assert_same_bits(got, want)


@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
@pytest.mark.parametrize("out_dtype", cases.DTYPES, ids=cases.ident)
def test_activation_and_out_dtype(isa: str, activation: str, out_dtype, generator) -> None:
    x = torch.randn(6, 40, generator=generator)
    weight, scale, zero, bias = operands(37, 40, 16, generator)
    bias = bias.to(out_dtype)
    want = reference.int8_weight_mm(
        *map(cases.to_numpy, (x, weight, scale, zero, bias)), 16, activation, cases.name(out_dtype)
    )
    got = ops.int8_weight_mm(x, weight, scale, zero, bias, 16, activation, out_dtype)
    cases.assert_same_bits(got, want)


@pytest.mark.parametrize("group_size", [None, 64], ids=lambda g: f"group-{g}")
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ident)
@pytest.mark.parametrize(
    "shape", [(1, 300, 1000), (7, 65, 4097), (50, 129, 513), (130, 100, 257)], ids=cases.ident
)
def test_every_isa_alike_and_near_float64(shape, dtype, group_size, generator) -> None:
    """NUMERICS.md section 7: within 2 sqrt(K) eps of float32 and one output rounding."""
    M, N, K = shape
    x = torch.randn(M, K, generator=generator).to(dtype)
    weight, scale, zero, _ = operands(N, K, group_size, generator)
    results = []
    for isa in ops.available_isas():
        ops.set_isa(isa)
        results.append(ops.int8_weight_mm(x, weight, scale, zero, None, group_size))
        ops.set_isa(None)
    for result in results[1:]:
        cases.assert_same_bits(result, results[0])
    arrays = map(cases.to_numpy, (x, weight, scale, zero))
    want = torch.from_numpy(reference.float64_product(*arrays, group_size))
    error = (results[0].double() - want).norm() / want.norm()
    assert error <= 2 * K**0.5 * 2**-24 + torch.finfo(dtype).eps


@pytest.mark.parametrize("group_size", [None, 64], ids=lambda g: f"group-{g}")
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ident)
@pytest.mark.parametrize(
    "shape", [(1, 70, 1000), (7, 33, 513), (50, 65, 257), (64, 17, 64)], ids=cases.ident
)
def test_cuda_sim_near_float64(shape, dtype, group_size, generator) -> None:
    """The kernel's own order of sums: the same bits in every run, as near as the CPU's."""
    M, N, K = shape
    x = torch.randn(M, K, generator=generator).to(dtype)
    weight, scale, zero, bias = operands(N, K, group_size, generator)
    args = (x, weight, scale, zero, None, group_size)
    got = cuda_sim.Simulator(arch=80).int8_weight_mm(*args)
    again = cuda_sim.Simulator(arch=90, policy="late").int8_weight_mm(*args)
    cases.assert_same_bits(again, got)
    arrays = map(cases.to_numpy, (x, weight, scale, zero))
    want = torch.from_numpy(reference.float64_product(*arrays, group_size))
    error = (got.double() - want).norm() / want.norm()
    assert error <= 2 * K**0.5 * 2**-24 + torch.finfo(dtype).eps
    with_bias = cuda_sim.Simulator(arch=80).int8_weight_mm(*args[:4], bias, group_size, 1)
    assert torch.allclose(with_bias.double(), torch.relu(want + bias), rtol=0.01, atol=0.05)


def test_fma_of_the_reference() -> None:
    """Against exact rational arithmetic, on sums that round twice if taken through float64."""
    from fractions import Fraction

    rng = np.random.default_rng(0)
    a = rng.standard_normal(4000).astype(np.float32)
    b = rng.integers(-255, 256, 4000).astype(np.float32)
    c = (rng.standard_normal(4000) * 2.0 ** rng.integers(-70, 70, 4000)).astype(np.float32)
    # c half a unit beyond a representable number, the product far below float64's last bit.
    a[:9], b[:9], c[:9] = 2**-60, np.arange(-4, 5), 1 + 2**-23
    got = reference.fma(a, b, c)
    for i in range(a.size):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        near = np.float32(float(exact))
        around = [
            near,
            np.nextafter(near, np.float32(np.inf)),
            np.nextafter(near, -np.float32(np.inf)),
        ]
        distance = [abs(Fraction(float(v)) - exact) for v in around]
        assert abs(Fraction(float(got[i])) - exact) == min(distance)


@pytest.mark.parametrize("M", [1, 3, 9, 30, 200])
def test_batch_and_threads_do_not_matter(isa: str, M: int, generator) -> None:
    x = torch.randn(M, 300, generator=generator)
    weight, scale, zero, bias = operands(200, 300, 64, generator)
    args = (ops.int8_pack(weight), scale, zero, bias, 64, "silu")
    whole = ops.int8_weight_mm(x, *args)
    for count in (1, 2, 3):
        with cases.threads(count):
            cases.assert_same_bits(ops.int8_weight_mm(x, *args), whole)
    cases.assert_same_bits(ops.int8_weight_mm(x[M // 2], *args), whole[M // 2])
    cases.assert_same_bits(ops.int8_weight_mm(x[: M // 2 + 1], *args), whole[: M // 2 + 1])


def test_more_rows_than_one_pass_holds(generator) -> None:
    """Scratch is bounded at 16 MiB of activations: 4,194,304 floats, here 1,048 rows."""
    x = torch.randn(1100, 4000, generator=generator)
    weight, scale, zero, bias = operands(33, 4000, None, generator)
    whole = ops.int8_weight_mm(x, weight, scale, zero, bias)
    cases.assert_same_bits(ops.int8_weight_mm(x[1040:], weight, scale, zero, bias), whole[1040:])


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x.t(),
        lambda x: x[3:4].expand(6, -1),
        lambda x: x[None, :, None].expand(2, -1, 3, -1),
        lambda x: x[0],
        lambda x: x.reshape(3, 8, 5, 4).transpose(0, 2),
        lambda x: x[:0],
    ],
    ids=["columns", "transposed", "expanded-row", "expanded-4d", "1d", "4d", "empty"],
)
def test_strides_and_ranks(view, generator) -> None:
    x = view(torch.randn(24, 20, generator=generator))
    weight, scale, zero, bias = operands(7, x.shape[-1], None, generator)
    got = ops.int8_weight_mm(x, weight, scale, zero, bias)
    flat = x.contiguous().reshape(-1, x.shape[-1])
    assert got.shape == (*x.shape[:-1], 7) and got.is_contiguous()
    want = ops.int8_weight_mm(flat, weight, scale, zero, bias)
    cases.assert_same_bits(got, want.reshape(got.shape))


def test_no_bound_on_K(generator) -> None:
    """The int32 products stop at K = 133,144; this sum is in float32."""
    x = torch.randn(2, 140_000, generator=generator)
    weight, scale, _, _ = operands(3, 140_000, None, generator)
    want = torch.from_numpy(reference.float64_product(*map(cases.to_numpy, (x, weight, scale))))
    error = (ops.int8_weight_mm(x, weight, scale).double() - want).norm() / want.norm()
    assert error <= 2 * 140_000**0.5 * 2**-24


def test_affine_weight_is_what_it_stands_for(generator) -> None:
    """quantize_affine of a weight, moved to int8 by half the codes: the product of its dequantization."""
    weight = torch.randn(40, 96, generator=generator)
    x = torch.randn(8, 96, generator=generator)
    q, scale, zero = ops.quantize_affine(weight, 4, 32)
    back = ops.dequantize_affine(q, scale, zero, 32)
    shifted = (q.to(torch.int16) - 8).to(torch.int8)
    zero_point = (zero.to(torch.int16) - 8).to(torch.int8).t().contiguous()
    scale = scale.t().contiguous()
    torch.testing.assert_close(dequantize_weight(shifted, scale, zero_point, 96, 32, x.dtype), back)
    got = ops.int8_weight_mm(x, shifted, scale, zero_point, None, 32)
    want = x.double() @ back.double().t()
    assert (got - want).norm() / want.norm() < 2 * 96**0.5 * 2**-24


def test_out(generator) -> None:
    x = torch.randn(5, 24, generator=generator)
    weight, scale, zero, bias = operands(9, 24, 8, generator)
    for dtype in cases.DTYPES:
        out = torch.full((5, 9), 7.0, dtype=dtype)
        assert ops.int8_weight_mm(x, weight, scale, zero, bias, 8, "gelu", out=out) is out
        want = ops.int8_weight_mm(x, weight, scale, zero, bias, 8, "gelu", dtype)
        cases.assert_same_bits(out, want)


@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
@pytest.mark.parametrize("group_size", [None, 8], ids=lambda g: f"group-{g}")
def test_gradients(activation: str, group_size: int | None, generator) -> None:
    """Those of a float layer with the dequantized weight."""
    x = torch.randn(2, 5, 20, generator=generator, requires_grad=True)
    weight, scale, zero, bias = operands(11, 20, group_size, generator)
    bias.requires_grad_()
    out = ops.int8_weight_mm(x, ops.int8_pack(weight), scale, zero, bias, group_size, activation)
    grad = torch.randn(out.shape, generator=generator)
    got = torch.autograd.grad(out, (x, bias), grad)

    plain = dequantize_weight(weight, scale, zero, 20, group_size, torch.float32)
    t = torch.nn.functional.linear(x, plain, bias)
    functional = torch.nn.functional
    act = {
        "none": lambda t: t,
        "relu": functional.relu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda t: functional.gelu(t, approximate="tanh"),
        "silu": functional.silu,
    }[activation]
    torch.testing.assert_close(
        got, torch.autograd.grad(act(t), (x, bias), grad), rtol=1e-4, atol=1e-4
    )


def test_autocast(generator) -> None:
    x = torch.randn(3, 16, generator=generator, requires_grad=True)
    weight, scale, zero, bias = operands(5, 16, None, generator)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.int8_weight_mm(x, weight, scale, zero, bias)
        plain = op.inference(x.detach(), weight, scale, zero, bias)
    want = ops.int8_weight_mm(x.bfloat16(), weight, scale, zero, bias)
    assert got.dtype == torch.bfloat16 and torch.equal(got, want) and torch.equal(plain, want)
    got.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_flops(generator) -> None:
    weight, scale, _, _ = operands(5, 16, None, generator)
    with FlopCounterMode(display=False) as counter:
        ops.int8_weight_mm(torch.randn(2, 3, 16), weight, scale)
    assert counter.get_total_flops() == 2 * 6 * 5 * 16


@pytest.mark.parametrize("overload", ["default", "inference"])
@pytest.mark.parametrize("group_size", [None, 8], ids=lambda g: f"group-{g}")
def test_opcheck(overload: str, group_size: int | None, generator) -> None:
    weight, scale, zero, bias = operands(5, 20, group_size, generator)
    grad = overload == "default"
    x = torch.randn(3, 20, requires_grad=grad)
    if grad:
        bias.requires_grad_()
    args = (x, ops.int8_pack(weight), scale, zero, bias, group_size, 2)
    torch.library.opcheck(getattr(op, overload), args)


def test_opcheck_out(generator) -> None:
    weight, scale, zero, bias = operands(5, 20, 8, generator)
    args = (torch.randn(3, 20), weight, scale, zero, bias, 8)
    torch.library.opcheck(op.out, args, {"out": torch.empty(3, 5)})


class Layer(torch.nn.Module):
    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.weight, self.scale, self.zero, self.bias = operands(12, 24, 8, generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.int8_weight_mm(x, self.weight, self.scale, self.zero, self.bias, 8, "relu") * 2


def test_compiles_once_for_eight_batch_sizes(generator) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    layer = Layer(generator)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for rows in (2, 3, 4, 5, 7, 8, 16, 33):
        x = torch.randn(rows, 24, generator=generator)
        cases.assert_same_bits(compiled(x), layer(x))
    assert counter.frame_count <= 2


def test_exports(generator) -> None:
    layer = Layer(generator)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(layer, (torch.randn(4, 24),), dynamic_shapes=({0: batch},))
    x = torch.randn(9, 24, generator=generator)
    cases.assert_same_bits(program.module()(x), layer(x))


@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
def test_cuda_path_of_groups_and_zero_points(activation: str, generator) -> None:
    """What serves on a GPU for many rows, run here on the CPU."""
    x = torch.randn(2, 3, 40, generator=generator)
    args = (*operands(11, 40, 16, generator), 16, cases.ACTIVATIONS.index(activation))
    got = triton_backend._int8_weight_mm_dequantized(x, *args, torch.float32)
    want = op.inference(x, *args, torch.float32)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


BAD = {
    "x dtype": (lambda a: {**a, "x": a["x"].double()}, "expected x of float32, bfloat16 or float16, got [3, 16] float64"),
    "x rank": (lambda a: {**a, "x": torch.tensor(1.0)}, "expected x of at least one dimension"),
    "K mismatch": (lambda a: {**a, "x": torch.randn(3, 15)}, "expected weight [N=5, K=15] int8 or its packed form, got [5, 16] int8"),
    "weight dtype": (lambda a: {**a, "weight": a["weight"].float()}, "expected weight of int8, got [5, 16] float32"),
    "scale length": (lambda a: {**a, "weight_scale": torch.ones(4)}, "expected a contiguous bias [N=4], got [5] float32"),
    "scale dtype": (lambda a: {**a, "weight_scale": torch.ones(5).double()}, "expected weight_scale of 1-D float32"),
    "groups": (lambda a: {**a, "group_size": 8}, "expected weight_scale [groups=2, N] for K=16 and group_size 8, got [5] float32"),
    "group size 0": (lambda a: {**a, "group_size": 0}, "expected group_size >= 1 or None, got 0"),
    "group size 6": (lambda a: {**a, "group_size": 6}, "expected group_size to be a multiple of 4, or K=16 or more, got 6"),
    "zero dtype": (lambda a: {**a, "zero_point": torch.zeros(5)}, "expected zero_point of int8, got [5] float32"),
    "zero shape": (lambda a: {**a, "zero_point": torch.zeros(1, 5, dtype=torch.int8)}, "zero_point of the shape of weight_scale [5] float32, got [1, 5] int8"),
    "bias length": (lambda a: {**a, "bias": torch.zeros(6)}, "expected a contiguous bias [N=5], got [6] float32"),
    "out dtype": (lambda a: {**a, "out_dtype": torch.float64}, "expected out of float32, bfloat16 or float16"),
    "out shape": (lambda a: {**a, "out": torch.empty(3, 4)}, "expected contiguous out of [3, 5] float32, got [3, 4] float32"),
    "scale grad": (lambda a: {**a, "weight_scale": torch.ones(5, requires_grad=True)}, "weight_scale requires grad"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case: str, generator) -> None:
    weight, scale, zero, bias = operands(5, 16, None, generator)
    good = {
        "x": torch.randn(3, 16),
        "weight": weight,
        "weight_scale": scale,
        "zero_point": zero,
        "bias": bias,
    }
    spoil, message = BAD[case]
    with pytest.raises(RuntimeError, match=re.escape(message)):
        ops.int8_weight_mm(**spoil(good))


def test_unknown_activation(generator) -> None:
    weight, scale, _, _ = operands(5, 16, None, generator)
    with pytest.raises(ValueError, match="int8_weight_mm: expected activation in .*, got 'tanh'"):
        ops.int8_weight_mm(torch.randn(3, 16), weight, scale, activation="tanh")
