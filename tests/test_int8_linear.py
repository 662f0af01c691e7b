"""int8_linear: quantize_int8 and int8_mm in one call, gradients, autocast, compile, export, bad input."""

from __future__ import annotations

import re

import cases
import pytest
import torch
import torch._dynamo.testing
from torch.utils.flop_counter import FlopCounterMode

from trimtab import ops
from trimtab.reference.int8_linear import int8_linear as reference

op = torch.ops.trimtab.int8_linear


def operands(N: int, K: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    weight, scale = ops.quantize_int8(torch.randn(N, K, generator=generator))
    return weight, scale, torch.randn(N, generator=generator)


@pytest.mark.parametrize("shape", cases.SHAPES, ids=cases.ident)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ident)
def test_bits(
    implementation: str, dtype: torch.dtype, shape: tuple[int, int, int], generator
) -> None:
    M, N, K = shape
    x = cases.awkward_rows(M, K, dtype, generator)
    weight, scale, bias = operands(N, K, generator)
    want = reference(*map(cases.to_numpy, (x, weight, scale, bias)), "gelu", cases.name(dtype))
    cases.assert_same_bits(ops.int8_linear(x, weight, scale, bias, "gelu"), want)
    cases.assert_same_bits(ops.int8_linear(x, ops.int8_pack(weight), scale, bias, "gelu"), want)


@pytest.mark.parametrize("out_dtype", cases.DTYPES, ids=cases.ident)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ident)
def test_equals_its_two_halves(implementation: str, dtype, out_dtype, generator) -> None:
    x = cases.awkward_rows(50, 200, dtype, generator)
    weight, scale, bias = operands(70, 200, generator)
    q, x_scale = ops.quantize_int8(x)
    for activation in cases.ACTIVATIONS:
        want = ops.int8_mm(q, weight, x_scale, scale, bias, activation, out_dtype)
        got = ops.int8_linear(x, weight, scale, bias, activation, out_dtype)
        cases.assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ident)
def test_int8_out(implementation: str, dtype: torch.dtype, generator) -> None:
    """As its two halves, for rows of zeros, NaN and Inf too."""
    x = cases.awkward_rows(50, 200, dtype, generator)
    weight, scale, _ = operands(70, 200, generator)
    bias = cases.awkward_bias(70, generator)
    for activation in cases.ACTIVATIONS:
        for value in cases.OUT_SCALES:
            out_scale = torch.tensor([value])
            tail = (activation, "int8", out_scale.numpy())
            want = reference(*map(cases.to_numpy, (x, weight, scale, bias)), *tail)
            arguments = (x, weight, scale, bias, activation)
            got = ops.int8_linear(*arguments, torch.int8, out_scale=out_scale)
            cases.assert_same_bits(got, want)
        out = torch.full_like(got, 99)
        assert ops.int8_linear(*arguments, out=out, out_scale=out_scale) is out
        cases.assert_same_bits(out, want)
    cases.assert_same_bits(op.inference(*arguments[:4], 4, torch.int8, out_scale), want)


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
    weight, scale, bias = operands(7, x.shape[-1], generator)
    got = ops.int8_linear(x, weight, scale, bias)
    flat = ops.int8_linear(x.contiguous().reshape(-1, x.shape[-1]), weight, scale, bias)
    assert got.shape == (*x.shape[:-1], 7) and got.is_contiguous()
    cases.assert_same_bits(got, flat.reshape(got.shape))


@pytest.mark.parametrize("M", [1, 3, 30, 400])
def test_batch_and_threads_do_not_matter(implementation: str, M: int, generator) -> None:
    x = torch.randn(M, 500, generator=generator)
    weight, scale, bias = operands(300, 500, generator)
    whole = ops.int8_linear(x, weight, scale, bias)
    for count in (1, 2, 3):
        with cases.threads(count):
            cases.assert_same_bits(ops.int8_linear(x, weight, scale, bias), whole)
    cases.assert_same_bits(ops.int8_linear(x[M // 2], weight, scale, bias), whole[M // 2])


@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.ident)
def test_gradients(activation: str, dtype: torch.dtype, generator) -> None:
    """To x through the dequantized weight, to the bias: those of the float layer it stands for."""
    x = torch.randn(6, 4, 40, generator=generator).to(dtype).requires_grad_()
    weight, scale, bias = operands(30, 40, generator)
    bias = bias.to(dtype).requires_grad_()
    float_weight = weight.float() * scale[:, None]
    grad = torch.randn(6, 4, 30, generator=generator).to(dtype)
    acts = {
        "none": lambda t: t,
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda t: torch.nn.functional.gelu(t, approximate="tanh"),
        "silu": torch.nn.functional.silu,
    }
    # The float layer sees x as it was quantized; the gradient passes the rounding as if it were not.
    q, x_scale = ops.quantize_int8(x.detach())
    want_x = (q.double() * x_scale[..., None]).requires_grad_()
    want_bias = bias.detach().double().requires_grad_()
    before = torch.nn.functional.linear(want_x, float_weight.double(), want_bias)
    acts[activation](before).backward(grad.double())
    for packed in (weight, ops.int8_pack(weight)):
        x.grad = bias.grad = None
        ops.int8_linear(x, packed, scale, bias, activation).backward(grad)
        assert x.grad is not None and bias.grad is not None
        for got, want in ((x.grad, want_x.grad), (bias.grad, want_bias.grad)):
            error = (got.double() - want).norm() / want.norm()
            assert error < (1e-5 if dtype == torch.float32 else 0.01), error


def test_autocast(generator) -> None:
    x = torch.randn(5, 40, generator=generator)
    weight, scale, bias = operands(30, 40, generator)
    want = ops.int8_linear(x.bfloat16(), weight, scale, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for got in (
            ops.int8_linear(x, weight, scale, bias),
            op.inference(x, weight, scale, bias),
        ):
            assert got.dtype == torch.bfloat16
            cases.assert_same_bits(got, want)


def test_registration(generator) -> None:
    x = torch.randn(3, 5, 16, generator=generator)
    weight, scale, bias = operands(9, 16, generator)
    packed = ops.int8_pack(weight)
    for w in (weight, packed):
        torch.library.opcheck(op.default, (x, w, scale, bias, 3, torch.bfloat16))
        torch.library.opcheck(op.inference, (x, w, scale, bias, 0))
    grads = (x.clone().requires_grad_(), packed, scale, bias.clone().requires_grad_(), 2)
    torch.library.opcheck(op.default, grads)
    codes = (x, packed, scale, bias, 1, torch.int8, torch.ones(1))
    torch.library.opcheck(op.default, codes)
    torch.library.opcheck(op.inference, codes)
    out = torch.empty(3, 5, 9, dtype=torch.int8)
    torch.library.opcheck(op.out, (*codes[:5], torch.ones(1)), {"out": out})
    out = torch.empty(3, 5, 9)
    torch.library.opcheck(op.out, (x, packed, scale, bias), {"out": out})
    assert ops.int8_linear(x, packed, scale, bias, out=out) is out
    cases.assert_same_bits(out, ops.int8_linear(x, packed, scale, bias))
    with FlopCounterMode(display=False) as counter:
        ops.int8_linear(x, packed, scale, bias)
    assert counter.get_total_flops() == 2 * 15 * 16 * 9


def test_compile_has_one_graph_for_all_batch_sizes(generator) -> None:
    weight, scale, bias = operands(9, 16, generator)
    packed = ops.int8_pack(weight)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(
        lambda x: ops.int8_linear(x * 2, packed, scale, bias, "relu") + 1,
        fullgraph=True,
        backend=counter,
    )
    for M in (2, 3, 5, 8, 13, 21, 34, 55):
        x = torch.randn(M, 16, generator=generator)
        cases.assert_same_bits(run(x), ops.int8_linear(x * 2, packed, scale, bias, "relu") + 1)
    assert counter.frame_count <= 2, counter.frame_count  # one static, one dynamic


def test_int8_out_compiles_and_has_no_gradient(generator) -> None:
    weight, scale, bias = operands(9, 16, generator)
    x, one = torch.randn(4, 16, generator=generator), torch.ones(1)
    torch._dynamo.reset()

    def run(x: torch.Tensor) -> torch.Tensor:
        return ops.int8_linear(x, weight, scale, bias, "relu", torch.int8, out_scale=one)

    cases.assert_same_bits(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cases.assert_same_bits(run(x), run(x.bfloat16()))
    x.requires_grad_()
    with torch.no_grad():
        run(x)
    for call in (run, lambda x: op.default(x, weight, scale, bias, 1, torch.int8, one)):
        with pytest.raises(RuntimeError, match="int8_linear with int8 out: x requires grad"):
            call(x)


def test_compile_inductor_and_backward(generator) -> None:
    weight, scale, bias = operands(9, 16, generator)
    torch._dynamo.reset()
    run = torch.compile(lambda x: ops.int8_linear(x, weight, scale, bias).sum(), fullgraph=True)
    x = torch.randn(4, 16, generator=generator, requires_grad=True)
    run(x).backward()
    want = torch.ones(4, 9) @ (weight.float() * scale[:, None])
    torch.testing.assert_close(x.grad, want)


def test_export(generator) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in zip(("w", "s", "b"), operands(9, 16, generator), strict=True):
                self.register_buffer(name, value)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ops.int8_linear(x, self.w, self.s, self.b, "silu")

    model, x = Model(), torch.randn(4, 16, generator=generator)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    more = torch.randn(11, 16, generator=generator)
    cases.assert_same_bits(program.module()(more), model(more))


def bad(**changes):
    good = {
        "x": torch.zeros(2, 8),
        "weight": torch.zeros(3, 8, dtype=torch.int8),
        "weight_scale": torch.ones(3),
    }
    return good | changes


BAD = {
    "x-dtype": (bad(x=torch.zeros(2, 8, dtype=torch.int8)), "expected x of float32, bfloat16"),
    "x-0d": (bad(x=torch.tensor(1.0)), "expected x of at least one dimension, got [] float32"),
    "k-mismatch": (bad(x=torch.zeros(2, 9)), "expected weight [N=3, K=9] int8"),
    "weight-dtype": (bad(weight=torch.zeros(3, 8)), "got [3, 8] float32"),
    "scale-rank": (bad(weight_scale=torch.ones(3, 1)), "expected weight_scale of 1-D float32"),
    "scale-strided": (bad(weight_scale=torch.ones(6)[::2]), "expected a contiguous weight_scale"),
    "bias": (bad(bias=torch.ones(2)), "expected a contiguous bias [N=3], got [2] float32"),
    "out-dtype": (bad(out_dtype=torch.int32), "expected out of float32, bfloat16 or float16"),
    "out-shape": (bad(out=torch.empty(2, 4)), "expected contiguous out of [2, 3]"),
    "code-scale-missing": (
        bad(out_dtype=torch.int8),
        "expected out_scale [1] float32 for int8 out, got None",
    ),
    "code-scale-unasked": (
        bad(out_scale=torch.ones(1)),
        "expected out_scale with int8 out alone, got one with float32",
    ),
    "code-scale-dtype": (
        bad(out_dtype=torch.int8, out_scale=torch.ones(1).half()),
        "expected out_scale [1] float32, got [1] float16",
    ),
    "code-scale-shape": (
        bad(out_dtype=torch.int8, out_scale=torch.tensor(1.0)),
        "expected out_scale [1] float32, got [] float32",
    ),
    "code-grad": (
        bad(x=torch.zeros(2, 8, requires_grad=True), out_dtype=torch.int8, out_scale=torch.ones(1)),
        "with int8 out: x requires grad",
    ),
    "scale-grad": (bad(weight_scale=torch.ones(3, requires_grad=True)), "requires grad"),
    "out-grad": (bad(x=torch.zeros(2, 8, requires_grad=True), out=torch.empty(2, 3)), "with out="),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    arguments, message = BAD[case]
    with pytest.raises(RuntimeError, match=re.escape(message)) as caught:
        ops.int8_linear(**arguments)
    assert str(caught.value).startswith("int8_linear")


@pytest.mark.parametrize("case", [c for c in BAD if "out" not in c and "strided" not in c])
def test_bad_input_while_tracing(case: str) -> None:
    """The fakes refuse what the kernels refuse, so that compile fails early and clearly."""
    arguments, _ = BAD[case]
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {
            k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v
            for k, v in arguments.items()
        }
        with pytest.raises(RuntimeError):
            ops.int8_linear(**fake)
