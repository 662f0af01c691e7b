"""block_linear: every kernel against the reference, the dense int8 product and torch; gradients; packing."""

from __future__ import annotations

import re
import subprocess
import sys

import cases
import numpy as np
import pytest
import torch

from trimtab import ops
from trimtab.reference.block_linear import block_linear as reference

op = torch.ops.trimtab.block_linear
BLOCKS = [(1, 16), (16, 16), (32, 32), (64, 64), (3, 5), (48, 12), (80, 4)]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
ACTS = {
    "none": lambda t: t,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda t: torch.nn.functional.gelu(t, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}


def sparse(
    N: int, K: int, block: tuple[int, int], generator: torch.Generator, kept: float = 0.4
) -> torch.Tensor:
    """A float weight with whole blocks of zeros; its first row of blocks is empty, its last is full."""
    bn, bk = block
    rows, columns = -(-N // bn), -(-K // bk)
    mask = torch.rand(rows, columns, generator=generator) < kept
    mask[:1] = False
    if rows > 1:
        mask[-1] = True
    mask = mask.repeat_interleave(bn, 0).repeat_interleave(bk, 1)[:N, :K]
    return torch.randn(N, K, generator=generator) * mask


def packed(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    return ops.block_pack(weight, block, refuse_larger=False)


def assert_close(got: torch.Tensor, want: torch.Tensor, K: int) -> None:
    """NUMERICS.md section 7: fp32 accumulation and one rounding of the output."""
    assert got.shape == want.shape
    output = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[got.dtype]
    bound = 2 * max(K, 1) ** 0.5 * 2.0**-24 + output
    scale = want.double().norm().item()
    error = (got.double() - want.double()).norm().item()
    assert error <= bound * scale + 1e-30, f"{error / max(scale, 1e-30):.3g} > {bound:.3g}"


SHAPES = [(0, 5, 8), (3, 0, 7), (2, 3, 0), (1, 33, 70), (70, 130, 200)]


@pytest.mark.parametrize("block", BLOCKS, ids=cases.ident)
@pytest.mark.parametrize("dtype", FLOATS, ids=cases.ident)
def test_floats(isa: str, dtype: torch.dtype, block: tuple[int, int], generator) -> None:
    for M, N, K in SHAPES:
        weight = sparse(N, K, block, generator).to(dtype)
        values, crow, col = packed(weight, block)
        x = torch.randn(M, K, generator=generator).to(dtype)
        bias = torch.randn(N, generator=generator)
        got = ops.block_linear(x, values, crow, col, None, bias, "none", N=N)
        want = x.double() @ weight.double().t() + bias
        assert got.dtype == dtype
        assert_close(got, want, K)


@pytest.mark.parametrize("block", BLOCKS, ids=cases.ident)
def test_int8_has_the_bits_of_the_dense_product(
    isa: str, block: tuple[int, int], generator
) -> None:
    for M, N, K in SHAPES:
        weight, scale = ops.quantize_int8(sparse(N, K, block, generator))
        weight[weight == 127] = -128  # a user's own weights may hold it
        values, crow, col = packed(weight, block)
        bias = cases.awkward_bias(N, generator)
        for dtype, activation in zip(FLOATS, ("gelu", "none", "silu"), strict=True):
            x = cases.awkward_rows(M, K, dtype, generator)
            got = ops.block_linear(x, values, crow, col, scale, bias, activation, N=N)
            want = ops.int8_linear(x, weight, scale, bias, activation)
            cases.assert_same_bits(got, want)


@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
def test_reference(activation: str, generator) -> None:
    """The oracle itself, float and int8, with NaN and Inf in x: what is pruned is not evaluated."""
    x = cases.awkward_rows(9, 40, torch.float32, generator)
    weight = sparse(30, 40, (8, 8), generator)
    values, crow, col = packed(weight, (8, 8))
    bias = torch.randn(30, generator=generator)
    parts = [cases.to_numpy(t) for t in (x, values, crow, col)]
    want = reference(*parts, 30, None, cases.to_numpy(bias), activation)
    got = ops.block_linear(x, values, crow, col, None, bias, activation, N=30).numpy()
    assert np.array_equal(np.isnan(got), np.isnan(want))
    assert not np.isnan(want[:, :8]).any(), "the first row of blocks is empty"
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    codes, scale = ops.quantize_int8(weight)
    values, crow, col = packed(codes, (8, 8))
    parts = [cases.to_numpy(t) for t in (x, values, crow, col)]
    want = reference(*parts, 30, cases.to_numpy(scale), cases.to_numpy(bias), activation)
    got = ops.block_linear(x, values, crow, col, scale, bias, activation, N=30)
    cases.assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=cases.ident)
@pytest.mark.parametrize("block", [(1, 16), (32, 32)], ids=cases.ident)
def test_threads_and_panels_do_not_matter(
    isa: str, block: tuple[int, int], dtype: torch.dtype, generator
) -> None:
    """Many rows, few rows, any number of threads: the same bits, and for any rank and stride."""
    weight, scale = sparse(200, 320, block, generator), None
    if dtype == torch.int8:
        weight, scale = ops.quantize_int8(weight)
    values, crow, col = packed(weight.to(dtype), block)
    x = torch.randn(300, 640, generator=generator)[:, ::2]
    x = x.to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    whole = ops.block_linear(x, values, crow, col, scale, N=200)
    for count in (1, 2, 3):
        with cases.threads(count):
            cases.assert_same_bits(ops.block_linear(x, values, crow, col, scale, N=200), whole)
    for rows in (slice(7, 8), slice(3, 40), slice(1, 300, 5)):
        got = ops.block_linear(x[rows][None], values, crow, col, scale, N=200)
        cases.assert_same_bits(got[0], whole[rows])


def test_uneven_rows(isa: str, generator) -> None:
    """One row of blocks holds nearly all of them."""
    weight = torch.zeros(96 * 4, 640)
    weight[40] = torch.randn(640, generator=generator)
    weight[300, 5] = 1.0
    values, crow, col = packed(weight, (32, 32))
    assert len(col) == 21
    x = torch.randn(130, 640, generator=generator)
    got = ops.block_linear(x, values, crow, col)
    assert_close(got, x.double() @ weight.double().t(), 640)
    assert not got[:, 128:160].any()


@pytest.mark.parametrize("dtype", FLOATS, ids=cases.ident)
@pytest.mark.parametrize("block", [*BLOCKS[:4], (3, 5)], ids=cases.ident)
def test_gradients(isa: str, block: tuple[int, int], dtype: torch.dtype, generator) -> None:
    """To x, to the kept values and to the bias: those of the dense layer, at the kept blocks."""
    for M, N, K in [(0, 5, 8), (2, 3, 0), (5, 33, 70), (300, 130, 200)]:  # 300: a second chunk
        weight = sparse(N, K, block, generator).to(dtype)
        values, crow, col = packed(weight, block)
        bias = torch.randn(N, generator=generator).to(dtype).requires_grad_()
        x = torch.randn(M, K, generator=generator).to(dtype).requires_grad_()
        values.requires_grad_()
        grad = torch.randn(M, N, generator=generator).to(dtype)
        ops.block_linear(x, values, crow, col, None, bias, N=N).backward(grad)
        kept = ops.block_unpack(torch.ones_like(values), crow, col, N, K)
        assert_close(x.grad, grad.double() @ weight.double(), N)
        dense = ops.block_unpack(values.grad, crow, col, N, K)
        assert_close(dense, (grad.double().t() @ x.double()) * kept, M)
        assert_close(bias.grad, grad.double().sum(0), M)
        assert values.grad.shape == values.shape and values.grad.dtype == dtype


@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
def test_gradients_through_an_activation(activation: str, generator) -> None:
    weight = sparse(40, 48, (16, 16), generator)
    x = torch.randn(3, 4, 48, generator=generator, requires_grad=True)
    values, crow, col = packed(weight, (16, 16))
    values.requires_grad_()
    out = ops.block_linear(x, values, crow, col, None, None, activation, N=40)
    grad = torch.randn(out.shape, generator=generator)
    got = torch.autograd.grad(out, (x, values), grad)
    dense = ops.block_unpack(values, crow, col, 40, 48)
    t = torch.nn.functional.linear(x, dense)
    want = torch.autograd.grad(ACTS[activation](t), (x, values), grad)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_int8_gradient_goes_to_x(generator) -> None:
    weight, scale = ops.quantize_int8(sparse(40, 48, (16, 16), generator))
    values, crow, col = packed(weight, (16, 16))
    x = torch.randn(7, 48, generator=generator, requires_grad=True)
    ops.block_linear(x, values, crow, col, scale, N=40).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(7, 40) @ (weight.float() * scale[:, None]))


def test_registration(generator) -> None:
    weight = sparse(40, 48, (16, 16), generator)
    values, crow, col = packed(weight, (16, 16))
    x, bias = torch.randn(2, 3, 48, generator=generator), torch.randn(40, generator=generator)
    leaves = [t.clone().requires_grad_() for t in (x, values)]
    torch.library.opcheck(op.default, (*leaves, crow, col, None, bias, 2, 40))
    # The rest has no autograd rule of its own to look at.
    short = {"test_utils": ("test_schema", "test_faketensor")}
    codes, scale = ops.quantize_int8(weight)
    codes, *places = packed(codes, (16, 16))
    torch.library.opcheck(op.default, (x, codes, *places, scale, None, 0, 40), **short)
    torch.library.opcheck(op.inference, (x, values, crow, col, None, bias, 3, 40), **short)
    grad = torch.randn(2, 3, 40, generator=generator)
    products = torch.ops.trimtab
    torch.library.opcheck(products.block_grad_x.default, (grad, values, crow, col, 48), **short)
    torch.library.opcheck(products.block_grad_values.default, (grad, x, crow, col, 16, 16), **short)


def test_compile_export_and_autocast(generator) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = sparse(40, 48, (16, 16), generator)
            values, self.crow, self.col = packed(weight, (16, 16))
            self.values = torch.nn.Parameter(values)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ops.block_linear(x, self.values, self.crow, self.col, activation="relu", N=40)

    model = Model()
    run = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for M in (2, 5, 9):
        x = torch.randn(M, 48, generator=generator)
        cases.assert_same_bits(run(x), model(x))
    run(x).sum().backward()
    assert model.values.grad is not None
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("b", min=2)},))
    cases.assert_same_bits(program.module()(x[:3]), model(x[:3]))
    half = model.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert half(x).dtype == torch.bfloat16


@pytest.mark.parametrize("block", BLOCKS, ids=cases.ident)
def test_pack(block: tuple[int, int], generator) -> None:
    """There and back; as torch.sparse_bsr has it where the block divides; a mask wins over values."""
    for N, K in [(130, 200), (64, 64), (0, 7), (5, 0), (240, 240)]:
        weight = sparse(N, K, block, generator)
        values, crow, col = packed(weight, block)
        ops.block_check(values, crow, col, N, K)
        assert torch.equal(ops.block_unpack(values, crow, col, N, K), weight)
        if N and K and N % block[0] == 0 and K % block[1] == 0:
            bsr = weight.to_sparse_bsr(block)
            assert torch.equal(bsr.values(), values)
            assert torch.equal(bsr.crow_indices(), crow.long())
            assert torch.equal(bsr.col_indices(), col.long())
    mask = torch.zeros(240, 240, dtype=torch.bool)
    mask[100, 7:9] = True
    values, crow, col = ops.block_pack(weight, block, mask)
    assert torch.equal(ops.block_unpack(values, crow, col, 240, 240), weight * mask)
    assert len(col) == len({k // block[1] for k in (7, 8)})


def test_pack_refuses_what_would_be_larger() -> None:
    with pytest.raises(RuntimeError, match=r"block_pack: 4 of 4 blocks of 32 x 32 .*more than"):
        ops.block_pack(torch.ones(64, 64))
    with pytest.raises(RuntimeError, match="expected a block of at least 1"):
        ops.block_pack(torch.ones(64, 64), (0, 4))
    with pytest.raises(RuntimeError, match=re.escape("expected mask [N=4, K=4] bool")):
        ops.block_pack(torch.ones(4, 4), (2, 2), torch.ones(4, 4))
    with pytest.raises(RuntimeError, match=re.escape("expected weight [N, K]")):
        ops.block_pack(torch.ones(4))


def good() -> dict:
    weight = torch.zeros(8, 12)
    weight[:4, :4] = weight[4:, 4:] = 1.0  # blocks (0, 0), (1, 1), (1, 2)
    values, crow, col = packed(weight, (4, 4))
    return {"x": torch.ones(2, 12), "values": values, "crow": crow, "col": col, "N": 8}


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


BAD = {
    "x-dtype": ({"x": torch.ones(2, 12).int()}, "expected x of float32"),
    "x-0d": ({"x": torch.tensor(1.0)}, "expected x of at least one dimension"),
    "values-dtype": ({"values": torch.ones(3, 4, 4).half()}, "values"),
    "values-rank": ({"values": torch.ones(3, 16)}, "values [blocks, bn, bk]"),
    "values-block": ({"values": torch.ones(3, 0, 4)}, "blocks of at least 1 x 1"),
    "crow-dtype": ({"crow": torch.tensor([0, 1, 3])}, "crow"),
    "crow-size": ({"crow": ints(0, 3)}, "crow [3]"),
    "crow-falls": ({"crow": ints(0, 4, 3)}, "crow to rise from 0 to the 3 blocks, got crow[1] = 4"),
    "crow-begin": ({"crow": ints(1, 1, 3)}, "got crow[0] = 1"),
    "crow-end": ({"crow": ints(0, 1, 2)}, "got crow[2] = 2"),
    "col-count": ({"col": ints(0, 1)}, "expected col [blocks=3]"),
    "col-high": ({"col": ints(0, 1, 3)}, "expected col in [0, 3), got col[2] = 3"),
    "col-low": ({"col": ints(0, -1, 2)}, "got col[1] = -1"),
    "col-K": ({"x": torch.ones(2, 8)}, "expected col in [0, 2), got col[2] = 2"),
    "N": ({"N": 13}, "crow [5]"),
    "bias": ({"bias": torch.ones(7)}, "expected a contiguous bias [N=8]"),
    "scale-unasked": ({"weight_scale": torch.ones(8)}, "weight_scale"),
    "scale-missing": ({"values": torch.ones(3, 4, 4).char()}, "weight_scale [N=8]"),
    "scale-grad": ({"weight_scale": torch.ones(8, requires_grad=True)}, "requires grad"),
}
READ = {"crow-falls", "crow-begin", "crow-end", "col-high", "col-low", "col-K", "values-block"}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    changes, message = BAD[case]
    arguments = good() | changes
    with pytest.raises(RuntimeError, match=re.escape(message)) as caught:
        ops.block_linear(**arguments)
    assert str(caught.value).startswith("block_linear")
    if case in READ or "dtype" in case:
        return
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {
            k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v
            for k, v in arguments.items()
        }
        with pytest.raises(RuntimeError):
            ops.block_linear(**fake)


CORRUPT = {
    "values": ({"values": torch.ones(3, 4)}, "expected values [blocks, bn, bk]"),
    "crow-size": ({"crow": ints(0, 3)}, "expected crow [3] int32 for N=8 in blocks of 4"),
    "crow-dtype": ({"crow": torch.tensor([0, 1, 3])}, "got [3] int64"),
    "crow-falls": ({"crow": ints(0, 4, 3)}, "with a fall after row 1"),
    "crow-end": ({"crow": ints(0, 1, 2)}, "to rise from 0 to blocks=3, got 0 to 2"),
    "col-count": ({"col": ints(0, 1)}, "expected col [blocks=3]"),
    "col-high": (
        {"col": ints(0, 1, 3)},
        "expected col in [0, 3) for K=12 in blocks of 4; not so at 2",
    ),
    "col-low": ({"col": ints(0, -1, 2)}, "not so at 1"),
    "col-order": (
        {"col": ints(0, 2, 1)},
        "expected col to rise within a row of blocks; not so after 1",
    ),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_check_names_what_is_corrupt(case: str) -> None:
    changes, message = CORRUPT[case]
    weight = {k: v for k, v in good().items() if k != "x"} | {"K": 12}
    ops.block_check(**weight)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        ops.block_check(**weight | changes)


def test_bad_gradients() -> None:
    g = good()
    grad_x, grad_values = torch.ops.trimtab.block_grad_x, torch.ops.trimtab.block_grad_values
    grad = torch.ones(2, 8)
    with pytest.raises(RuntimeError, match="block_grad_x: expected grad and values of one dtype"):
        grad_x(grad.half(), g["values"], g["crow"], g["col"], 12)
    with pytest.raises(RuntimeError, match=r"block_grad_x: expected col in \[0, 2\)"):
        grad_x(grad, g["values"], g["crow"], g["col"], 8)
    with pytest.raises(
        RuntimeError, match="block_grad_values: expected grad and x of as many rows"
    ):
        grad_values(grad, torch.ones(3, 12), g["crow"], g["col"], 4, 4)
    with pytest.raises(RuntimeError, match="block_grad_values: expected blocks of at least 1 x 1"):
        grad_values(grad, g["x"], g["crow"], g["col"], 0, 4)


SHORT_OF_MEMORY = """
import resource, torch
from trimtab import ops
torch.set_num_threads(2)
x = torch.zeros(256, 1 << 16, dtype=torch.bfloat16)
values = torch.ones(1, 16, 16, dtype=torch.bfloat16)
parts = values, torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
ops.block_linear(x[:32, :64], *parts)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (1 << 20),) * 2)
grad = x[:, :16]
calls = (lambda: ops.block_linear(x, *parts),
         lambda: torch.ops.trimtab.block_grad_values(grad, x, *parts[1:], 16, 16))
for call in calls:
    try:
        call()
    except RuntimeError as error:
        print(error)
"""


def test_no_memory_in_a_thread() -> None:
    """What a task fills itself, 8 MiB, 4 MiB: an error and no crash where it can't be had."""
    run = subprocess.run([sys.executable, "-c", SHORT_OF_MEMORY], capture_output=True, text=True)
    for op in ("block_linear", "block_grad_values"):
        assert f"{op}: no memory for scratch in a thread" in run.stdout, run.stdout + run.stderr
