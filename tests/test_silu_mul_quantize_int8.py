"""silu_mul_quantize_int8: equal to the reference everywhere, strides, registration, bad input."""

from __future__ import annotations

import cases
import pytest
import torch

from trimtab import ops
from trimtab.reference.silu_mul_quantize_int8 import silu_mul_quantize_int8 as reference

SIZES = [(0, 5), (5, 0), (1, 1), (6, 3), (9, 64), (7, 65), (5, 1023), (6, 4096), (2, 20001)]


def check(gate: torch.Tensor, up: torch.Tensor) -> None:
    q, scale = ops.silu_mul_quantize_int8(gate, up)
    want_q, want_scale = reference(cases.to_numpy(gate), cases.to_numpy(up))
    cases.assert_same_bits(q, want_q)
    cases.assert_same_bits(scale, want_scale)


@pytest.mark.parametrize("size", SIZES, ids=cases.ident)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ident)
def test_bits(implementation: str, dtype: torch.dtype, size: tuple[int, int], generator) -> None:
    gate = cases.awkward_rows(*size, dtype, generator)
    check(gate, torch.randn(size, generator=generator).to(dtype))


def test_against_float64(generator) -> None:
    """Within half a step, and the scale to fp32's precision."""
    gate, up = torch.randn(2, 33, 700, generator=generator) * 3
    q, scale = ops.silu_mul_quantize_int8(gate, up)
    want = torch.nn.functional.silu(gate.double()) * up.double()
    torch.testing.assert_close(scale.double(), want.abs().amax(1) / 127, rtol=1e-6, atol=0)
    assert (q * scale.double()[:, None] - want).abs().max() <= 0.5001 * scale.max()


def test_product_is_not_rounded_before_it_is_quantized(generator) -> None:
    gate, up = torch.randn(2, 4, 300, generator=generator).bfloat16()
    for got, want in zip(
        ops.silu_mul_quantize_int8(gate, up),
        ops.silu_mul_quantize_int8(gate.float(), up.float()),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_nan_and_inf(implementation: str) -> None:
    gate = torch.tensor([[float("-inf"), 1.0], [float("inf"), 1.0], [1.0, float("nan")]])
    q, scale = ops.silu_mul_quantize_int8(gate, torch.ones(3, 2))
    assert q[0].tolist() == [0, 127] and scale[0] > 0  # silu(-Inf) is -0
    assert q[1:].tolist() == [[0, 0]] * 2 and bool(scale[1:].isnan().all())


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x.t(),
        lambda x: x[3:4].expand(6, -1),
        lambda x: x[:, 1:18],
        lambda x: x[0],
        lambda x: x.reshape(2, 6, 5, 4).transpose(0, 2),
    ],
    ids=["columns", "transposed", "expanded-row", "halves", "1d", "4d"],
)
def test_strides(view, generator) -> None:
    gate, up = torch.randn(2, 12, 20, generator=generator)
    check(view(gate), view(up))
    check(view(gate), view(up).contiguous())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_do_not_matter(count: int, generator) -> None:
    gate, up = torch.randn(2, 300, 700, generator=generator)
    q, scale = ops.silu_mul_quantize_int8(gate, up)
    with cases.threads(count):
        again, scale_again = ops.silu_mul_quantize_int8(gate, up)
    assert torch.equal(q, again) and torch.equal(scale, scale_again)


def test_out(implementation: str, generator) -> None:
    gate, up = torch.randn(2, 5, 9, generator=generator)
    q, scale = torch.empty(5, 9, dtype=torch.int8), torch.full((5,), torch.nan)
    got = ops.silu_mul_quantize_int8(gate, up, out=(q, scale))
    assert got[0] is q and got[1] is scale
    want = ops.silu_mul_quantize_int8(gate, up)
    assert torch.equal(q, want[0]) and torch.equal(scale, want[1])


def test_opcheck(generator) -> None:
    gate, up = torch.randn(2, 4, 6, generator=generator)
    op = torch.ops.trimtab.silu_mul_quantize_int8
    torch.library.opcheck(op.default, (gate, up))
    q, scale = torch.empty(4, 6, dtype=torch.int8), torch.empty(4)
    torch.library.opcheck(op.out, (gate, up), {"q": q, "scale": scale})


@pytest.mark.parametrize(
    ("gate", "up", "message"),
    [
        (torch.zeros(2, 3).int(), torch.zeros(2, 3), r"expected gate of float32.*got \[2, 3\]"),
        (torch.tensor(1.0), torch.tensor(1.0), r"expected gate of at least one dimension"),
        (torch.zeros(2, 3), torch.zeros(2, 4), r"expected up like gate, \[2, 3\].*got \[2, 4\]"),
        (torch.zeros(2, 3), torch.zeros(2, 3).half(), r"expected up like gate.*float16"),
        (torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3), r"gate requires grad"),
    ],
    ids=["int32", "0d", "shape", "dtype", "requires-grad"],
)
def test_bad_input(gate: torch.Tensor, up: torch.Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=rf"silu_mul_quantize_int8: {message}"):
        ops.silu_mul_quantize_int8(gate, up)


def test_bad_out() -> None:
    gate, up = torch.zeros(2, 2, 3)
    q, scale = torch.empty(2, 3, dtype=torch.int8), torch.empty(2)
    for out, name in (((q, scale[:1]), "scale"), ((q.t(), scale), "q")):
        with pytest.raises(
            RuntimeError, match=rf"silu_mul_quantize_int8: expected contiguous {name} "
        ):
            ops.silu_mul_quantize_int8(gate, up, out=out)
