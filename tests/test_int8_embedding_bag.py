"""int8_embedding_bag: sums in index order, equal on every instruction set; offsets, padding, bad input."""

from __future__ import annotations

import re
from typing import Any

import cases
import pytest
import torch
from torch.nn import functional as F

from trimtab import ops
from trimtab.reference.int8_embedding_bag import int8_embedding_bag as reference

op = torch.ops.trimtab.int8_embedding_bag
LENGTHS = [0, 3, 1, 0, 40, 7, 2, 0]


def table(V: int, D: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return cases.int8(V, D, generator), torch.rand(V, generator=generator) ** 4


def offsets_of(lengths: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=dtype).cumsum(0, dtype=dtype)


@pytest.mark.parametrize("D", [0, 1, 17, 64, 1100])
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=cases.ident)
def test_bits_with_offsets(isa: str, index: torch.dtype, mode: str, D: int, generator) -> None:
    weight, scale = table(11, D, generator)
    ends = offsets_of(LENGTHS, index)
    indices = torch.randint(0, 11, (int(ends[-1]),), generator=generator, dtype=index)
    bags = [part.numpy() for part in indices.split(LENGTHS)]
    for dtype in cases.DTYPES:
        for padding in (None, 4, -11):
            row = None if padding is None else padding % 11
            args = (weight.numpy(), scale.numpy(), mode)
            want = reference(bags, *args, padding_idx=row, out_dtype=cases.name(dtype))
            for offsets, last in ((ends[:-1], False), (ends, True)):
                got = ops.int8_embedding_bag(
                    indices, weight, scale, offsets, mode, None, padding, last, dtype
                )
                cases.assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ident)
def test_per_sample_weights(isa: str, dtype: torch.dtype, generator) -> None:
    weight, scale = table(11, 35, generator)
    indices = torch.randint(0, 11, (6, 9), generator=generator)
    samples = torch.randn(6, 9, generator=generator).to(dtype)
    want = reference(
        list(indices.numpy()), weight.numpy(), scale.numpy(),
        per_sample_weights=list(samples.float().numpy()), padding_idx=3,
    )  # fmt: skip
    got = ops.int8_embedding_bag(indices, weight, scale, None, "sum", samples, 3)
    cases.assert_same_bits(got, want)
    flat = ops.int8_embedding_bag(
        indices.reshape(-1), weight, scale, torch.arange(0, 54, 9), "sum", samples.reshape(-1), 3
    )
    cases.assert_same_bits(flat, want)


def test_specials_are_seen(isa: str) -> None:
    weight = torch.tensor([[1, -2], [3, 0], [0, 0]], dtype=torch.int8)
    scale = torch.tensor([float("nan"), 1e38, -1.0])
    got = ops.int8_embedding_bag(torch.tensor([[0, 1], [1, 1], [2, 2]]), weight, scale, mode="sum")
    assert got[0].isnan().all() and got[1].tolist() == [float("inf"), 0.0]
    assert not torch.signbit(got[2]).any()  # sums begin at +0


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_is_close_to_torch(mode: str, generator) -> None:
    weight, scale = table(50, 24, generator)
    indices = torch.randint(0, 50, (300,), generator=generator)
    offsets = offsets_of([30] * 9)
    want = F.embedding_bag(
        indices, weight.double() * scale.double()[:, None], offsets, mode=mode, padding_idx=7
    )
    got = ops.int8_embedding_bag(indices, weight, scale, offsets, mode, padding_idx=7)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_threads_and_strides(isa: str, generator) -> None:
    weight, scale = table(50, 200, generator)
    indices = torch.randint(0, 50, (90, 60), generator=generator)
    want = ops.int8_embedding_bag(indices, weight, scale)
    for count in (1, 3):
        with cases.threads(count):
            cases.assert_same_bits(ops.int8_embedding_bag(indices, weight, scale), want)
    turned = indices.t().contiguous().t()
    cases.assert_same_bits(ops.int8_embedding_bag(turned, weight, scale), want)
    out = torch.empty(90, 200)
    assert ops.int8_embedding_bag(indices, weight, scale, out=out) is out
    cases.assert_same_bits(out, want)


def test_no_bags_and_mixed_index_dtypes(generator) -> None:
    weight, scale = table(5, 3, generator)
    none = torch.zeros(0, dtype=torch.int64)
    assert ops.int8_embedding_bag(none, weight, scale, none).shape == (0, 3)
    assert ops.int8_embedding_bag(none, weight, scale, torch.zeros(1).long(), "sum", None, None, True).shape == (0, 3)  # fmt: skip
    assert ops.int8_embedding_bag(torch.zeros(0, 4).long(), weight, scale).shape == (0, 3)
    empty = ops.int8_embedding_bag(torch.zeros(2, 0).long(), weight, scale)
    assert torch.equal(empty, torch.zeros(2, 3))
    indices = torch.tensor([1, 2, 4], dtype=torch.int32)
    mixed = ops.int8_embedding_bag(indices, weight, scale, torch.tensor([0, 1]))
    cases.assert_same_bits(mixed, ops.int8_embedding_bag(indices.long(), weight, scale, torch.tensor([0, 1])))  # fmt: skip


def test_registration(generator) -> None:
    weight, scale = table(9, 6, generator)
    indices = torch.randint(0, 9, (12,), generator=generator)
    offsets = torch.tensor([0, 3, 3, 12])
    samples = torch.randn(12, generator=generator)
    for args in (
        (indices, weight, scale, offsets, 1),
        (indices, weight, scale, offsets, 0, samples, 4, True, torch.bfloat16),
        (indices.reshape(4, 3), weight, scale),
    ):
        torch.library.opcheck(op.default, args)
    torch.library.opcheck(
        op.out, (indices.reshape(4, 3), weight, scale), {"out": torch.empty(4, 6)}
    )


def test_compile_and_export(generator) -> None:
    weight, scale = table(9, 6, generator)
    torch._dynamo.reset()

    class Model(torch.nn.Module):
        def forward(self, indices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
            return ops.int8_embedding_bag(indices, weight, scale, offsets, "mean", None, 2) * 2

    model = Model()
    run = torch.compile(model, fullgraph=True)
    for n in (12, 15, 21, 30):
        args = (torch.randint(0, 9, (n,), generator=generator), torch.arange(0, n, 3))
        cases.assert_same_bits(run(*args), model(*args))
    dims = ({0: torch.export.Dim("n", min=2)}, {0: torch.export.Dim("bags", min=2)})
    program = torch.export.export(model, args, dynamic_shapes=dims)
    more = (torch.randint(0, 9, (40,), generator=generator), torch.tensor([0, 5, 17]))
    cases.assert_same_bits(program.module()(*more), model(*more))


def bad(**changes: Any) -> dict[str, Any]:
    good = {
        "indices": torch.tensor([0, 1]),
        "weight": torch.zeros(3, 4, dtype=torch.int8),
        "weight_scale": torch.ones(3),
        "offsets": torch.tensor([0, 1]),
    }
    return good | changes


SAMPLES = {"per_sample_weights": torch.ones(2), "mode": "sum"}
BAD = {
    "index": (bad(indices=torch.tensor([0, 3])), "expected indices in [0, 3)"),
    "index-dtype": (bad(indices=torch.tensor([0.0])), "expected indices of int32 or int64"),
    "no-offsets": (bad(offsets=None), "expected indices [n] with offsets or [bags, n] without"),
    "offsets-and-2d": (bad(indices=torch.zeros(2, 2).long()), "or [bags, n] without, got [2, 2]"),
    "offsets-begin": (bad(offsets=torch.tensor([1, 2])), "offsets that begin at 0"),
    "offsets-fall": (bad(offsets=torch.tensor([0, 2, 1])), "got 1 at position 2"),
    "offsets-end": (bad(offsets=torch.tensor([0, 3])), "stay <= 2, the number of indices, got 3"),
    "offsets-none": (bad(offsets=torch.zeros(0).long()), "expected no indices for no bags, got 2"),
    "offsets-dtype": (bad(offsets=torch.tensor([0.0])), "1-D offsets of the indices' dtype"),
    "no-last-offset": (
        bad(offsets=torch.zeros(0).long(), include_last_offset=True), "at least one offset",
    ),
    "samples-shape": (bad(**SAMPLES | {"per_sample_weights": torch.ones(3)}), "of the indices' sizes"),
    "samples-dtype": (
        bad(**SAMPLES | {"per_sample_weights": torch.ones(2).double()}), "got [2] float64",
    ),
    "samples-grad": (
        bad(**SAMPLES | {"per_sample_weights": torch.ones(2, requires_grad=True)}), "requires grad",
    ),
    "scale": (bad(weight_scale=torch.ones(2)), "expected weight_scale [V=3]"),
    "out": (bad(out=torch.empty(3, 4)), "expected contiguous out of [2, 4]"),
}  # fmt: skip
VALUE = {
    "mode": (bad(mode="max"), "expected mode in ['sum', 'mean'], got 'max'"),
    "mean-samples": (bad(per_sample_weights=torch.ones(2)), "with mode 'sum' only, got 'mean'"),
    "padding": (bad(padding_idx=3), "expected padding_idx in [-3, 3), got 3"),
}


@pytest.mark.parametrize("case", [*BAD, *VALUE])
def test_bad_input(case: str) -> None:
    arguments, message = (BAD | VALUE)[case]
    with pytest.raises(RuntimeError if case in BAD else ValueError, match=re.escape(message)) as e:
        ops.int8_embedding_bag(**arguments)
    assert str(e.value).startswith("int8_embedding_bag")
