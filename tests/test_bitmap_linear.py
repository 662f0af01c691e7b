"""bitmap_linear: every instruction set against float64 and int8_linear, the format, gradients, bad input."""

from __future__ import annotations

import ctypes
import mmap
import re
from concurrent.futures import ThreadPoolExecutor

import cases
import numpy as np
import pytest
import torch

from trimtab import ops
from trimtab.ops.bitmap_linear import bitmap_mask, bitmap_row_bytes
from trimtab.reference import bitmap_linear as reference

op = torch.ops.trimtab.bitmap_linear

# (M, N, K, share kept): none, one, primes, words of 64 and one beyond, every tile's edge.
SHAPES = [
    (0, 5, 8, 0.5),
    (3, 0, 7, 0.5),
    (2, 3, 0, 0.5),
    (1, 1, 1, 1.0),
    (1, 33, 70, 0.0),
    (1, 131, 1100, 0.3),
    (2, 7, 300, 0.5),
    (3, 20, 161, 0.4),
    (8, 64, 64, 0.5),
    (7, 9, 130, 0.5),
    (4, 16, 65, 1.0),
    (5, 17, 3, 0.7),
    (16, 49, 100, 0.2),
    (6, 50, 1100, 0.5),
    (17, 31, 129, 0.1),
    (18, 40, 130, 0.2),
    (18, 5, 130, 0.9),
    (20, 33, 1100, 0.3),
    (40, 35, 1100, 0.1),
    (70, 100, 1057, 0.05),
    (115, 131, 257, 0.2),
    (130, 65, 257, 0.3),
]


def sparse(N: int, K: int, kept: float, generator: torch.Generator) -> torch.Tensor:
    """A weight with that share kept, its first row empty and its last one whole where there is room."""
    weight = torch.randn(N, K, generator=generator)
    weight[torch.rand(N, K, generator=generator) >= kept] = 0
    if N > 2 and 0 < kept < 1:
        weight[0], weight[-1] = 0, torch.randn(K, generator=generator)
    return weight


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """(int8 weight, its scale, its parts), with some codes that are zero and yet kept."""
    codes, scale = ops.quantize_int8(weight)
    return codes, scale, list(ops.bitmap_pack(codes, weight != 0))


def assert_close(got: torch.Tensor, x, parts, dtype) -> None:
    """NUMERICS.md section 7."""
    want = reference.float64_product(*map(cases.to_numpy, (x, parts[0], parts[1])))
    K, norm = x.shape[1], np.linalg.norm(want)
    bound = 2 * K**0.5 * 2.0**-24 + torch.finfo(dtype).eps / 2
    assert np.linalg.norm(got.double().numpy() - want) <= bound * norm


@pytest.mark.parametrize("shape", SHAPES, ids=cases.ident)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ident)
def test_float(isa: str, dtype: torch.dtype, shape, generator) -> None:
    M, N, K, kept = shape
    x = torch.randn(M, K, generator=generator).to(dtype)
    parts = ops.bitmap_pack(sparse(N, K, kept, generator).to(dtype))
    got = ops.bitmap_linear(x, *parts)
    assert got.shape == (M, N) and got.dtype == dtype
    assert_close(got, x, parts, dtype)
    cases.assert_same_bits(ops.bitmap_linear(x, *parts), got)


@pytest.mark.parametrize("shape", SHAPES, ids=cases.ident)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ident)
def test_int8_has_the_bits_of_int8_linear(isa: str, dtype: torch.dtype, shape, generator) -> None:
    M, N, K, kept = shape
    x = cases.awkward_rows(M, K, dtype, generator)
    codes, scale, parts = quantized(sparse(N, K, kept, generator))
    bias = cases.awkward_bias(N, generator).to(dtype)
    want = ops.int8_linear(x, codes, scale, bias, "gelu")
    cases.assert_same_bits(ops.bitmap_linear(x, *parts, scale, bias, "gelu"), want)
    if N * K < 4000:
        numpy = [cases.to_numpy(t) for t in (x, *parts[:2], scale, bias)]
        cases.assert_same_bits(want, reference.bitmap_linear(*numpy, "gelu"))


@pytest.mark.parametrize("M", [1, 3, 16, 40])
def test_all_of_int8(isa: str, M: int, generator) -> None:
    """-128 too: a user's own weights may hold it."""
    codes = cases.int8(50, 200, generator)
    codes[torch.rand(50, 200, generator=generator) < 0.4] = 0
    x, scale = torch.randn(M, 200, generator=generator), torch.rand(50, generator=generator)
    got = ops.bitmap_linear(x, *ops.bitmap_pack(codes), scale)
    cases.assert_same_bits(got, ops.int8_linear(x, codes, scale))


@pytest.mark.parametrize("M", [1, 2, 4, 8, 16, 30, 40])
def test_few_weights_but_a_whole_row(isa: str, M: int, generator) -> None:
    """Kernels that expect few kept weights meet words of 64, in any row of a tile; values end at a page's end."""
    weight = sparse(101, 1100, 0.05, generator)
    weight[[3, 31, 40, 63]] = torch.randn(4, 1100, generator=generator)
    codes, scale, (values, *rest) = quantized(weight)
    x = torch.randn(M, 1100, generator=generator)
    with cases.before_a_page_without_access(values) as at_the_end:
        got = ops.bitmap_linear(x, at_the_end, *rest, scale)
    cases.assert_same_bits(got, ops.int8_linear(x, codes, scale))


@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
def test_bias_and_activation(isa: str, activation: str, generator) -> None:
    x = torch.randn(6, 70, generator=generator)
    parts = ops.bitmap_pack(sparse(33, 70, 0.5, generator))
    bias = torch.randn(33, generator=generator)
    for b in (bias, bias.bfloat16(), bias.half()):
        before = ops.bitmap_linear(x, *parts) + b.float()
        want = reference.activate(activation, before.numpy())
        cases.assert_same_bits(ops.bitmap_linear(x, *parts, None, b, activation), want)


@pytest.mark.parametrize("M", [1, 7, 40])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ident)
def test_nan_and_inf(isa: str, dtype: torch.dtype, M: int, generator) -> None:
    """They reach the outputs whose weight keeps their column, and no other."""
    x = torch.randn(M, 100, generator=generator).to(dtype)
    x[0, 3], x[-1, 50] = float("inf"), float("nan")
    weight = sparse(40, 100, 0.5, generator).to(dtype)
    parts = ops.bitmap_pack(weight)
    got = ops.bitmap_linear(x, *parts)
    want = reference.float64_product(*map(cases.to_numpy, (x, parts[0], parts[1])))
    assert np.array_equal(np.isnan(want), got.isnan().numpy())
    assert np.array_equal(np.isinf(want), got.isinf().numpy())
    assert 0 < got.isfinite().sum() < got.numel() or M == 1


@pytest.mark.parametrize("K", [70, 96])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ident)
def test_scratch_of_an_earlier_call(isa: str, dtype: torch.dtype, K: int, generator) -> None:
    """NaN left in memory that is read as padding does not reach the sums."""
    weight = sparse(20, 130, 0.5, generator).to(dtype)
    with cases.threads(1):
        ops.bitmap_linear(torch.full((16, 130), torch.nan, dtype=dtype), *ops.bitmap_pack(weight))
        x, parts = torch.ones(1, K, dtype=dtype), ops.bitmap_pack(weight[:, :K].contiguous())
        assert_close(ops.bitmap_linear(x, *parts), x, parts, dtype)


@pytest.mark.parametrize("shape", [(32, 16, 12, 0.1), (1, 16, 12, 0.5), (115, 131, 257, 0.2)])
def test_the_first_call_of_a_thread(isa: str, shape, generator) -> None:
    """It has no scratch of an earlier one, and may ask for none."""
    M, N, K, kept = shape
    x, weight = torch.randn(M, K, generator=generator), sparse(N, K, kept, generator)
    bias = torch.randn(N, generator=generator)
    for dtype in cases.DTYPES:
        call = (x.to(dtype), *ops.bitmap_pack(weight.to(dtype)), None, bias)
        want = ops.bitmap_linear(*call)
        with cases.threads(1), ThreadPoolExecutor(1) as fresh:
            cases.assert_same_bits(fresh.submit(ops.bitmap_linear, *call).result(), want)


@pytest.mark.parametrize("M", [4, 100])
def test_threads_do_not_matter(isa: str, M: int, generator) -> None:
    x = torch.randn(M, 200, generator=generator)
    weight = sparse(300, 200, 0.3, generator)
    _, scale, coded = quantized(weight)
    calls = [(x, *coded, scale)]
    calls += [(x.to(dtype), *ops.bitmap_pack(weight.to(dtype))) for dtype in cases.DTYPES[:2]]
    whole = [ops.bitmap_linear(*call) for call in calls]
    for count in (1, 3):
        with cases.threads(count):
            for call, want in zip(calls, whole, strict=True):
                cases.assert_same_bits(ops.bitmap_linear(*call), want)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x.t(),
        lambda x: x[3:4].expand(6, -1),
        lambda x: x[None, :, None].expand(2, -1, 3, -1),
        lambda x: x[0],
        lambda x: x[:0],
    ],
    ids=["columns", "transposed", "expanded-row", "expanded-4d", "1d", "empty"],
)
def test_strides_and_ranks(view, generator) -> None:
    x = view(torch.randn(24, 20, generator=generator))
    parts = ops.bitmap_pack(sparse(7, x.shape[-1], 0.5, generator))
    got = ops.bitmap_linear(x, *parts)
    flat = ops.bitmap_linear(x.contiguous().reshape(-1, x.shape[-1]), *parts)
    assert got.shape == (*x.shape[:-1], 7) and got.is_contiguous()
    cases.assert_same_bits(got, flat.reshape(got.shape))


@pytest.mark.parametrize("M", [12, 20, 72, 905])
def test_tiles_of_the_weight(isa: str, M: int, generator) -> None:
    """More rows of it than a tile; the panels of 72 and 905 rows of x end in a group of two or of one."""
    x = torch.randn(M, 130, generator=generator)
    parts = ops.bitmap_pack(sparse(1100, 130, 0.2, generator))
    with cases.threads(1):
        got = ops.bitmap_linear(x, *parts)
    assert_close(got, x, parts, torch.float32)
    cases.assert_same_bits(ops.bitmap_linear(x, *parts), got)


@pytest.mark.parametrize("dtype", cases.DTYPES[:2], ids=cases.ident)
def test_rows_of_several_passes(isa: str, dtype: torch.dtype, generator) -> None:
    """More rows than the panels' scratch holds."""
    x = torch.randn(70, 70000, generator=generator).to(dtype)
    parts = ops.bitmap_pack(sparse(3, 70000, 0.01, generator).to(dtype))
    assert_close(ops.bitmap_linear(x, *parts), x, parts, dtype)


def last_of_a_page(x: torch.Tensor) -> torch.Tensor:
    """x again, in memory that ends where a page begins that must not be touched."""
    page = mmap.PAGESIZE
    size = -(-x.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    none = 0  # PROT_NONE
    assert libc.mprotect(ctypes.c_void_p(address + size), ctypes.c_size_t(page), none) == 0
    whole = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=size - x.nbytes)
    return whole.reshape(x.shape).copy_(x)


@pytest.mark.parametrize("shape", [(21, 70), (3, 16), (40, 130), (16, 33)], ids=cases.ident)
@pytest.mark.parametrize("dtype", cases.DTYPES[:2], ids=cases.ident)
def test_nothing_past_an_end_is_read(isa: str, dtype: torch.dtype, shape, generator) -> None:
    x = torch.randn(shape, generator=generator).to(dtype)
    tensors = [x, *ops.bitmap_pack(sparse(20, shape[1], 0.4, generator).to(dtype))]
    at_the_end = ops.bitmap_linear(*map(last_of_a_page, tensors))
    cases.assert_same_bits(at_the_end, ops.bitmap_linear(*tensors))


@pytest.mark.parametrize("N", [30, 300, 530])
@pytest.mark.parametrize("M", [5, 90, 300])
def test_tasks(isa: str, M: int, N: int, generator) -> None:
    """Groups of rows of x by tiles of the weight, however many threads they are dealt out to."""
    x = torch.randn(M, 210, generator=generator)[:, :201]
    parts = ops.bitmap_pack(sparse(N, 201, 0.2, generator))
    with cases.threads(1):
        alone = ops.bitmap_linear(x, *parts)
    assert_close(alone, x, parts, torch.float32)
    for count in (2, 3, 7):
        with cases.threads(count):
            cases.assert_same_bits(ops.bitmap_linear(x, *parts), alone)


# --- the format


@pytest.mark.parametrize("K", [0, 1, 7, 64, 65, 130])
@pytest.mark.parametrize("dtype", [*cases.DTYPES, torch.int8], ids=cases.ident)
def test_pack_and_unpack(dtype: torch.dtype, K: int, generator) -> None:
    weight = (sparse(9, K, 0.4, generator) * 20).to(dtype)
    values, bitmap, row_start = ops.bitmap_pack(weight)
    assert bitmap.shape == (9, bitmap_row_bytes(K)) and bitmap.dtype == torch.uint8
    assert torch.equal(values, weight[weight != 0])
    assert torch.equal(row_start[1:] - row_start[:-1], (weight != 0).sum(1))
    assert torch.equal(ops.bitmap_unpack(values, bitmap, K), weight)
    assert np.array_equal(reference.mask_of(bitmap.numpy(), K), bitmap_mask(bitmap, K).numpy())
    assert torch.equal(ops.bitmap_check(values, bitmap, row_start, K), row_start)


def test_a_mask_keeps_zeros(generator) -> None:
    weight, mask = torch.zeros(4, 70), torch.rand(4, 70, generator=generator) < 0.5
    values, bitmap, row_start = ops.bitmap_pack(weight, mask)
    assert values.numel() == int(mask.sum()) == int(row_start[-1])
    assert torch.equal(bitmap_mask(bitmap, 70), mask)


def parts_of(K: int = 70):
    weight = torch.ones(3, K)
    weight[1, ::2] = 0
    return dict(zip(("values", "bitmap", "row_start"), ops.bitmap_pack(weight), strict=True))


def test_check_finds_what_is_corrupt() -> None:
    good = parts_of()
    bit = good["bitmap"].clone()
    bit[2, 8] |= 0x40  # k = 70
    less = good["bitmap"].clone()
    less[1, 0] &= 0x01
    start = good["row_start"].clone()
    start[1] += 1
    for change, message in (
        ({"bitmap": bit}, "expected no bit past K=70, found one in row 2"),
        ({"bitmap": less}, "got 175 values and 171 bits"),
        ({"values": good["values"][1:]}, "got 174 values and 175 bits"),
        ({"row_start": start}, "expected row_start[1] to be the 70 bits set before row 1, got 71"),
        ({"row_start": start[:3]}, "expected row_start int64 [N + 1=4], got [3] int64"),
        ({"bitmap": good["bitmap"][:, :8]}, "expected bitmap [N, 16] for K=70, got [3, 8] uint8"),
        ({"bitmap": good["bitmap"].int()}, "expected bitmap uint8 [N, 8 * ceil(K / 64)], got"),
        ({"values": good["values"][None]}, "expected values [kept], got [1, 175] float32"),
    ):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            ops.bitmap_check(**good | change, K=70)


def test_pack_refuses() -> None:
    for weight, mask, message in (
        (torch.ones(3), None, "expected weight [N, K] of float32, bfloat16, float16 or int8"),
        (torch.ones(3, 2, dtype=torch.float64), None, "got [3, 2] float64"),
        (torch.ones(3, 2), torch.ones(2, 2, dtype=torch.bool), "expected mask of [3, 2] bool"),
        (torch.ones(3, 2), torch.ones(3, 2), "got [3, 2] float32"),
    ):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            ops.bitmap_pack(weight, mask)


# --- gradients, registration


@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.ident)
def test_gradients(activation: str, dtype: torch.dtype, generator) -> None:
    """To x, the kept values and the bias: those of the masked dense layer."""
    x = torch.randn(6, 4, 70, generator=generator).to(dtype).requires_grad_()
    weight = sparse(30, 70, 0.5, generator).to(dtype)
    values, bitmap, row_start = ops.bitmap_pack(weight)
    values.requires_grad_()
    bias = torch.randn(30, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(6, 4, 30, generator=generator).to(dtype)
    ops.bitmap_linear(x, values, bitmap, row_start, None, bias, activation).backward(grad)
    acts = {
        "none": lambda t: t,
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda t: torch.nn.functional.gelu(t, approximate="tanh"),
        "silu": torch.nn.functional.silu,
    }
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    acts[activation](torch.nn.functional.linear(*wide)).backward(grad.double())
    kept = wide[1].grad[weight != 0]
    for got, want in ((x.grad, wide[0].grad), (values.grad, kept), (bias.grad, wide[2].grad)):
        assert got.dtype == dtype
        error = (got.double() - want).norm() / want.norm()
        assert error < (1e-5 if dtype == torch.float32 else 0.01), error


def test_gradient_of_int8(generator) -> None:
    x = torch.randn(5, 70, generator=generator, requires_grad=True)
    codes, scale, parts = quantized(sparse(30, 70, 0.5, generator))
    ops.bitmap_linear(x, *parts, scale).sum().backward()
    want = torch.ones(5, 30) @ (codes.float() * scale[:, None])
    torch.testing.assert_close(x.grad, want)


def test_autocast(generator) -> None:
    """float32 values take part in the autocast dtype, as a dense weight does."""
    x, weight = torch.randn(5, 70, generator=generator), sparse(30, 70, 0.5, generator)
    parts = ops.bitmap_pack(weight)
    _, scale, coded = quantized(weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, got8 = ops.bitmap_linear(x, *parts), ops.bitmap_linear(x, *coded, scale)
    want = ops.bitmap_linear(x.bfloat16(), parts[0].bfloat16(), *parts[1:])
    cases.assert_same_bits(got, want)
    cases.assert_same_bits(got8, ops.bitmap_linear(x.bfloat16(), *coded, scale))


def test_registration(generator) -> None:
    x = torch.randn(3, 5, 70, generator=generator)
    weight, bias = sparse(9, 70, 0.5, generator), torch.randn(9, generator=generator)
    values, *rest = ops.bitmap_pack(weight)
    _, scale, coded = quantized(weight)
    schema = ("test_schema", "test_faketensor")
    torch.library.opcheck(op.inference, (x, *coded, scale, bias, 1), test_utils=schema)
    grads = (x.clone().requires_grad_(), values.clone().requires_grad_(), *rest)
    torch.library.opcheck(op.default, (*grads, None, bias.clone().requires_grad_(), 2))


def test_compile_and_export(generator) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            values, bitmap, row_start = ops.bitmap_pack(sparse(9, 70, 0.5, generator))
            self.values = torch.nn.Parameter(values)
            self.register_buffer("bitmap", bitmap)
            self.register_buffer("row_start", row_start)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ops.bitmap_linear(
                x * 2, self.values, self.bitmap, self.row_start, activation="relu"
            )

    model, x = Model(), torch.randn(4, 70, generator=generator)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    more = torch.randn(11, 70, generator=generator)
    cases.assert_same_bits(program.module()(more), model(more))
    torch._dynamo.reset()
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    model(x).sum().backward()
    want, model.values.grad = model.values.grad, None
    run(x).sum().backward()
    torch.testing.assert_close(model.values.grad, want)


# --- bad input


def bad(**changes):
    return {"x": torch.zeros(2, 70), **parts_of()} | changes


def coded(**changes):
    values = parts_of()["values"].to(torch.int8)
    return bad(values=values, weight_scale=torch.ones(3)) | changes


BAD = {
    "x-dtype": (bad(x=torch.zeros(2, 70, dtype=torch.int8)), "expected x of float32, bfloat16"),
    "x-0d": (bad(x=torch.tensor(1.0)), "expected x of at least one dimension, got [] float32"),
    "k": (bad(x=torch.zeros(2, 60)), "expected a contiguous bitmap [N, 8] for K=60, got [3, 16]"),
    "dtypes": (bad(x=torch.zeros(2, 70).half()), "expected values of int8 or of the dtype of x"),
    "values-2d": (bad(values=torch.zeros(3, 4)), "values [kept], got [3, 4] float32"),
    "count": (
        bad(values=torch.zeros(9)),
        "expected row_start from 0 to the 9 values, got 0 to 175",
    ),
    "bitmap": (bad(bitmap=torch.zeros(3, 16)), "expected bitmap of 2-D uint8, got [3, 16] float32"),
    "start-dtype": (bad(row_start=torch.zeros(4)), "row_start"),
    "start-size": (bad(row_start=torch.zeros(3, dtype=torch.int64)), "row_start"),
    "scale-missing": (coded(weight_scale=None), "expected weight_scale [N=3] float32 for int8"),
    "scale-size": (coded(weight_scale=torch.ones(4)), "weight_scale [N=3]"),
    "scale-unasked": (bad(weight_scale=torch.ones(3)), "expected weight_scale with int8 values al"),
    "scale-grad": (coded(weight_scale=torch.ones(3, requires_grad=True)), "requires grad"),
    "bias": (bad(bias=torch.ones(2)), "expected a contiguous bias [N=3], got [2] float32"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    arguments, message = BAD[case]
    with pytest.raises(RuntimeError, match=re.escape(message)) as caught:
        ops.bitmap_linear(**arguments)
    assert str(caught.value).startswith("bitmap_linear")


@pytest.mark.parametrize("case", [c for c in BAD if c != "count"])
def test_bad_input_while_tracing(case: str) -> None:
    arguments, message = BAD[case]
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {
            k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v
            for k, v in arguments.items()
        }
        with pytest.raises(RuntimeError, match=re.escape(message)):
            ops.bitmap_linear(**fake)


def test_activation_name() -> None:
    with pytest.raises(ValueError, match="bitmap_linear: expected activation in"):
        ops.bitmap_linear(**bad(), activation="tanh")
