"""rms_norm_quantize_int8: equal to the reference everywhere, strides, registration, bad input."""

from __future__ import annotations

import cases
import pytest
import torch

from trimtab import ops
from trimtab.reference.rms_norm_quantize_int8 import rms_norm_quantize_int8 as reference

# Around a chunk (8), what a GPU's warp takes (1024), the partial sums (2048) and their second and
# fifth round.
SIZES = [
    (0, 5),
    (5, 0),
    (1, 1),
    (6, 3),
    (9, 64),
    (5, 1023),
    (5, 1025),
    (5, 2048),
    (6, 4099),
    (2, 9001),
]


def check(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> None:
    q, scale = ops.rms_norm_quantize_int8(x, weight, eps)
    want_q, want_scale = reference(cases.to_numpy(x), cases.to_numpy(weight), eps)
    cases.assert_same_bits(q, want_q)
    cases.assert_same_bits(scale, want_scale)


@pytest.mark.parametrize("size", SIZES, ids=cases.ident)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ident)
def test_bits(implementation: str, dtype: torch.dtype, size: tuple[int, int], generator) -> None:
    x = cases.awkward_rows(*size, dtype, generator)
    weight = torch.rand(size[1], generator=generator) + 0.5
    check(x, weight.to(dtype))
    check(x, weight, 0.0)


def test_against_float64(generator) -> None:
    """Within half a step, and the scale to fp32's precision."""
    x, weight = torch.randn(33, 700, generator=generator), torch.rand(700, generator=generator)
    q, scale = ops.rms_norm_quantize_int8(x, weight)
    want = torch.nn.functional.rms_norm(x.double(), (700,), weight.double(), 1e-6)
    torch.testing.assert_close(scale.double(), want.abs().amax(1) / 127, rtol=1e-6, atol=0)
    assert (q * scale.double()[:, None] - want).abs().max() <= 0.5001 * scale.max()


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
    x = view(torch.randn(12, 20, generator=generator))
    weight = torch.randn(2 * x.shape[-1], generator=generator)
    check(x, weight[::2])
    check(x, weight[1 : 1 + x.shape[-1]])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_and_batch_do_not_matter(count: int, generator) -> None:
    x, weight = torch.randn(300, 700, generator=generator), torch.rand(700, generator=generator)
    q, scale = ops.rms_norm_quantize_int8(x, weight)
    with cases.threads(count):
        again, scale_again = ops.rms_norm_quantize_int8(x, weight)
    row, row_scale = ops.rms_norm_quantize_int8(x[123], weight)
    assert torch.equal(q, again) and torch.equal(scale, scale_again)
    assert torch.equal(q[123], row) and scale[123] == row_scale


def test_out(implementation: str, generator) -> None:
    x, weight = torch.randn(5, 9, generator=generator), torch.rand(9, generator=generator)
    q, scale = torch.empty(5, 9, dtype=torch.int8), torch.full((5,), torch.nan)
    got = ops.rms_norm_quantize_int8(x, weight, 0.5, out=(q, scale))
    assert got[0] is q and got[1] is scale
    want = ops.rms_norm_quantize_int8(x, weight, 0.5)
    assert torch.equal(q, want[0]) and torch.equal(scale, want[1])


def test_opcheck(generator) -> None:
    x, weight = torch.randn(4, 6, generator=generator), torch.rand(6, generator=generator)
    op = torch.ops.trimtab.rms_norm_quantize_int8
    torch.library.opcheck(op.default, (x, weight, 1e-5))
    q, scale = torch.empty(4, 6, dtype=torch.int8), torch.empty(4)
    torch.library.opcheck(op.out, (x, weight, 1e-5), {"q": q, "scale": scale})


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(2, 3).int(), torch.zeros(3), r"expected x of float32.*got \[2, 3\]"),
        (torch.tensor(1.0), torch.zeros(1), r"expected x of at least one dimension"),
        (torch.zeros(2, 3), torch.zeros(2), r"expected weight \[K\].*got \[2\]"),
        (torch.zeros(2, 3), torch.zeros(3).half(), r"expected weight \[K\].*float16"),
        (torch.zeros(2, 3, requires_grad=True), torch.zeros(3), r"x requires grad"),
    ],
    ids=["int32", "0d", "shape", "dtype", "requires-grad"],
)
def test_bad_input(x: torch.Tensor, weight: torch.Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=rf"rms_norm_quantize_int8: {message}"):
        ops.rms_norm_quantize_int8(x, weight)


def test_bad_out() -> None:
    x, weight = torch.zeros(2, 3), torch.zeros(3)
    q, scale = torch.empty(2, 3, dtype=torch.int8), torch.empty(2)
    for out, name in (((q, scale[:1]), "scale"), ((q.t(), scale), "q")):
        with pytest.raises(
            RuntimeError, match=rf"rms_norm_quantize_int8: expected contiguous {name} "
        ):
            ops.rms_norm_quantize_int8(x, weight, out=out)
