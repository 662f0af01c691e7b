"""int8_embedding: one product and one rounding a value, index checks, compile, export, bad input."""

from __future__ import annotations

import re
from typing import Any

import cases
import pytest
import torch

from trimtab import ops
from trimtab.reference.int8_embedding import int8_embedding as reference

op = torch.ops.trimtab.int8_embedding
COLUMNS = [0, 1, 7, 16, 33, 128, 300]


def table(V: int, D: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    scale = 10.0 ** torch.randint(-40, 38, (V,), generator=generator)
    if V > 4:
        scale[1], scale[2], scale[3] = float("nan"), float("inf"), 0
    return cases.int8(V, D, generator), scale


@pytest.mark.parametrize("D", COLUMNS)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=cases.ident)
def test_bits(isa: str, index: torch.dtype, D: int, generator) -> None:
    weight, scale = table(23, D, generator)
    for shape in [(0,), (), (5,), (3, 4, 2), (700,)]:
        indices = torch.randint(0, 23, shape, generator=generator, dtype=index)
        for dtype in cases.DTYPES:
            want = reference(indices.numpy(), weight.numpy(), scale.numpy(), cases.name(dtype))
            got = ops.int8_embedding(indices, weight, scale, dtype)
            cases.assert_same_bits(got, want)
            out = torch.empty(*shape, D, dtype=dtype)
            assert ops.int8_embedding(indices, weight, scale, out=out) is out
            cases.assert_same_bits(out, want)


def test_strides_and_threads(isa: str, generator) -> None:
    weight, scale = table(50, 64, generator)
    indices = torch.randint(0, 50, (600, 40), generator=generator)
    want = ops.int8_embedding(indices.clone(), weight, scale)
    wide = torch.stack([weight, weight], 1).reshape(50, -1)[:, :64].contiguous()
    for count in (1, 3):
        with cases.threads(count):
            cases.assert_same_bits(ops.int8_embedding(indices, weight, scale), want)
    cases.assert_same_bits(
        ops.int8_embedding(indices.t(), weight, scale), want.transpose(0, 1).contiguous()
    )
    cases.assert_same_bits(ops.int8_embedding(indices[::3], weight, scale), want[::3].contiguous())
    spread = torch.stack([weight, wide], 2)[..., 0]
    assert not spread.is_contiguous()
    cases.assert_same_bits(ops.int8_embedding(indices, spread, scale.repeat(2, 1).t()[:, 0]), want)


def test_registration(generator) -> None:
    weight, scale = table(9, 6, generator)
    indices = torch.randint(0, 9, (3, 4), generator=generator)
    for dtype in (None, torch.bfloat16):
        torch.library.opcheck(op.default, (indices, weight, scale, dtype))
    torch.library.opcheck(op.default, (indices.int(), weight, scale))
    torch.library.opcheck(op.out, (indices, weight, scale), {"out": torch.empty(3, 4, 6)})


def test_compile_and_export(generator) -> None:
    weight, scale = table(9, 6, generator)
    torch._dynamo.reset()

    class Model(torch.nn.Module):
        def forward(self, indices: torch.Tensor) -> torch.Tensor:
            return ops.int8_embedding(indices + 1, weight, scale, torch.bfloat16) * 2

    model = Model()
    run = torch.compile(model, fullgraph=True)
    for n in (2, 3, 5, 8):
        indices = torch.randint(0, 8, (n, 3), generator=generator)
        cases.assert_same_bits(run(indices), model(indices))
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (indices,), dynamic_shapes=({0: batch},))
    more = torch.randint(0, 8, (11, 3), generator=generator)
    cases.assert_same_bits(program.module()(more), model(more))


def test_under_grad_and_autocast(generator) -> None:
    weight, scale = table(9, 6, generator)
    indices = torch.tensor([1, 4])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ops.int8_embedding(indices, weight, scale)
    assert got.dtype == torch.float32 and not got.requires_grad


def bad(**changes: Any) -> dict[str, Any]:
    good = {
        "indices": torch.tensor([0, 1]),
        "weight": torch.zeros(3, 4, dtype=torch.int8),
        "weight_scale": torch.ones(3),
    }
    return good | changes


BAD = {
    "index-large": (bad(indices=torch.tensor([[0, 1], [3, 0]])), "in [0, 3), the rows of the table, got 3 at position 2"),
    "index-negative": (bad(indices=torch.tensor([-1], dtype=torch.int32)), "got -1 at position 0"),
    "empty-table": (
        bad(weight=torch.zeros(0, 4, dtype=torch.int8), weight_scale=torch.ones(0)),
        "expected indices in [0, 0)",
    ),
    "index-dtype": (bad(indices=torch.tensor([1.0])), "expected indices of int32 or int64, got [1] float32"),
    "weight-dtype": (bad(weight=torch.zeros(3, 4)), "expected weight of 2-D int8, got [3, 4] float32"),
    "weight-rank": (bad(weight=torch.zeros(3, dtype=torch.int8)), "expected weight of 2-D int8"),
    "scale": (bad(weight_scale=torch.ones(4)), "expected weight_scale [V=3]"),
    "scale-grad": (bad(weight_scale=torch.ones(3, requires_grad=True)), "requires grad"),
    "out-dtype": (bad(out_dtype=torch.int8), "expected out of float32, bfloat16 or float16"),
    "out-shape": (bad(out=torch.empty(2, 5)), "expected contiguous out of [2, 4]"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    arguments, message = BAD[case]
    with pytest.raises(RuntimeError, match=re.escape(message)) as caught:
        ops.int8_embedding(**arguments)
    assert str(caught.value).startswith("int8_embedding")


def test_bad_index_writes_nothing() -> None:
    out = torch.full((2, 4), 7.0)
    weight = torch.ones(3, 4, dtype=torch.int8)
    with pytest.raises(RuntimeError, match="got 5 at position 1"):
        ops.int8_embedding(torch.tensor([0, 5]), weight, torch.ones(3), out=out)
    assert torch.equal(out, torch.full((2, 4), 7.0))
