"""bitmap_conv2d: sums within NUMERICS.md section 7, the same bits however it is cut, bad input."""

from __future__ import annotations

import copy
import re
from typing import Any

import cases
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from trimtab import ops
from trimtab.ops.conv2d import padding_sides, pair
from trimtab.reference import bitmap_conv2d as reference

op = torch.ops.trimtab.bitmap_conv2d

# x, weight, options, share of kept weights. Chunks of 1 to 8 vectors; several blocks of channels; bands.
SHAPES: dict[str, tuple[tuple, tuple, dict[str, Any], float]] = {
    "1x1": ((2, 70, 5, 7), (33, 70, 1, 1), {}, 0.3),
    "1x1-one-of-all": ((1, 1, 3, 3), (1, 1, 1, 1), {}, 1.0),
    "1x1-stride2": ((2, 64, 7, 9), (16, 64, 1, 1), {"stride": 2}, 0.2),
    "1x1-padded": ((1, 6, 5, 4), (7, 6, 1, 1), {"padding": (3, 1), "stride": (3, 2)}, 0.5),
    "3x3": ((2, 16, 9, 7), (24, 16, 3, 3), {}, 0.1),
    "3x3-pad1": ((3, 24, 16, 21), (40, 24, 3, 3), {"padding": 1}, 0.1),
    "3x3-stride2": ((2, 12, 13, 10), (20, 12, 3, 3), {"stride": 2, "padding": 1}, 0.3),
    "stride-2x1-dilation-1x2": (
        (2, 6, 11, 12), (9, 6, 3, 3), {"stride": (2, 1), "dilation": (1, 2), "padding": 2}, 0.4,
    ),
    "stride3-dilation2": (
        (1, 5, 17, 19), (6, 5, 3, 2), {"stride": (3, 2), "dilation": (2, 3), "padding": (2, 0)}, 0.5,
    ),
    "stride3-dilation2-wide": (
        (1, 4, 19, 18), (5, 4, 2, 2), {"stride": 3, "dilation": 2, "padding": (1, 2)}, 0.6,
    ),
    "7x7-stem": ((2, 3, 30, 34), (17, 3, 7, 7), {"stride": 2, "padding": 3}, 0.2),
    "4x4-same-dilation": ((1, 3, 9, 9), (4, 3, 4, 4), {"padding": "same", "dilation": (1, 2)}, 0.5),
    "kernel-smaller-than-stride": ((2, 3, 20, 17), (5, 3, 2, 1), {"stride": (4, 3)}, 0.6),
    "whole-image": ((3, 4, 6, 6), (10, 4, 6, 6), {}, 0.2),
    "groups3": ((2, 12, 7, 8), (18, 4, 3, 3), {"groups": 3, "padding": 1}, 0.4),
    "depthwise": ((2, 20, 9, 7), (20, 1, 3, 3), {"groups": 20, "padding": 1}, 0.5),
    "several-blocks": ((1, 200, 9, 33), (7, 200, 3, 3), {"padding": 1}, 0.05),
    "several-bands": ((1, 40, 70, 60), (3, 40, 3, 3), {"padding": 1}, 0.05),
    "nothing-kept": ((1, 8, 6, 6), (5, 8, 3, 3), {}, 0.0),
    "all-kept": ((1, 8, 6, 6), (5, 8, 3, 3), {}, 1.0),
    "no-images": ((0, 8, 6, 6), (5, 8, 3, 3), {}, 0.5),
}  # fmt: skip
each_shape = pytest.mark.parametrize("shape", SHAPES)


def make(
    shape: str, dtype: torch.dtype, generator
) -> tuple[torch.Tensor, torch.Tensor, tuple, tuple]:
    """x, the dense weight, its parts, and kernel, stride, sides, dilation, groups."""
    x_size, w_size, options, kept = SHAPES[shape]
    x = torch.randn(x_size, generator=generator).to(dtype)
    weight = torch.randn(w_size, generator=generator).to(dtype)
    weight[torch.rand(w_size, generator=generator) >= kept] = 0
    kernel = w_size[2:]
    stride, dilation = (pair(name, options.get(name, 1)) for name in ("stride", "dilation"))
    sides = padding_sides(options.get("padding", 0), kernel, stride, dilation)
    conv = (kernel, stride, sides, dilation, options.get("groups", 1))
    return x, weight, ops.bitmap_pack(weight.flatten(1)), conv


def wanted(x: torch.Tensor, parts: tuple, conv: tuple) -> np.ndarray:
    return reference.float64_conv2d(*map(cases.to_numpy, (x, *parts[:2])), *conv)


def assert_close(got: torch.Tensor, x: torch.Tensor, parts: tuple, conv: tuple) -> None:
    """NUMERICS.md section 7."""
    want = wanted(x, parts, conv)
    K = x.shape[1] // conv[4] * conv[0][0] * conv[0][1]
    bound = 2 * K**0.5 * 2.0**-24 + torch.finfo(x.dtype).eps / 2
    assert got.shape == want.shape and got.dtype == x.dtype and got.is_contiguous()
    assert np.linalg.norm(got.double().numpy() - want) <= bound * np.linalg.norm(want)


@each_shape
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ident)
def test_float(isa: str, dtype: torch.dtype, shape: str, generator) -> None:
    x, _, parts, conv = make(shape, dtype, generator)
    got = op.inference(x, *parts, None, *conv)
    assert_close(got, x, parts, conv)
    # The order of the sums is the taps' own: one image of several, and one thread, have the same bits.
    with cases.threads(1):
        cases.assert_same_bits(op.inference(x, *parts, None, *conv), got)
        if len(x) > 1:
            cases.assert_same_bits(op.inference(x[1:], *parts, None, *conv), got[1:])


@each_shape
def test_of_dense_convolution(shape: str, generator) -> None:
    """The reference above cuts patches; torch's own convolution says that they are the right ones."""
    x, weight, parts, _ = make(shape, torch.float32, generator)
    options = SHAPES[shape][2]
    got = ops.bitmap_conv2d(x, *parts, kernel_size=tuple(weight.shape[2:]), **options)
    torch.testing.assert_close(got, F.conv2d(x, weight, **options), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
@pytest.mark.parametrize("shape", ["3x3-pad1", "1x1"])
def test_bias_and_activation(isa: str, activation: str, shape: str, generator) -> None:
    x, _, parts, conv = make(shape, torch.float32, generator)
    bias = torch.randn(len(parts[1]), generator=generator)
    code = cases.ACTIVATIONS.index(activation)
    for b in (bias, bias.bfloat16(), bias.half()):
        before = op.inference(x, *parts, None, *conv) + b.float()[:, None, None]
        want = reference.activate(activation, before.numpy())
        cases.assert_same_bits(op.inference(x, *parts, b, *conv, code), want)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ident)
def test_nan_and_inf(isa: str, dtype: torch.dtype, generator) -> None:
    """They reach the outputs whose weight keeps their tap, and no other."""
    x, _, parts, conv = make("3x3-pad1", dtype, generator)
    x[0, 3, 4, 5], x[2, 7, 0, 0] = float("inf"), float("nan")
    got, want = op.inference(x, *parts, None, *conv), wanted(x, parts, conv)
    assert np.array_equal(np.isnan(want), got.isnan().numpy())
    assert np.array_equal(np.isinf(want), got.isinf().numpy())
    assert 0 < got.isfinite().sum() < got.numel()


@pytest.mark.parametrize("shape", ["several-bands", "3x3-stride2", "whole-image"])
def test_scratch_of_an_earlier_call(isa: str, shape: str, generator) -> None:
    """NaN left in memory that is read as padding, or past a plane, does not reach the sums."""
    x, _, parts, conv = make(shape, torch.float32, generator)
    with cases.threads(1):
        op.inference(torch.full_like(x, torch.nan).repeat(1, 1, 2, 2), *parts, None, *conv)
        assert_close(op.inference(x, *parts, None, *conv), x, parts, conv)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("shape", ["several-bands", "several-blocks", "groups3"])
def test_threads_do_not_matter(isa: str, shape: str, count: int, generator) -> None:
    """More threads cut shorter bands and parts of the outputs."""
    x, _, parts, conv = make(shape, torch.float32, generator)
    want = op.inference(x, *parts, None, *conv)
    with cases.threads(count):
        cases.assert_same_bits(op.inference(x, *parts, None, *conv), want)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x[:, :, ::2, 1:],
        lambda x: x.transpose(2, 3),
        lambda x: x[1:2].expand(3, -1, -1, -1),
        lambda x: x[::2],
        lambda x: x[0],
    ],
    ids=["channels-last", "pixels", "transposed", "expanded", "images", "3d"],
)
def test_strides_and_ranks(view, generator) -> None:
    x, weight, parts, _ = make("3x3-pad1", torch.float32, generator)
    x = view(x)
    got = ops.bitmap_conv2d(x, *parts, padding=1)
    cases.assert_same_bits(got, ops.bitmap_conv2d(x.contiguous(), *parts, padding=1))
    torch.testing.assert_close(got, F.conv2d(x, weight, padding=1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("shape", ["stride-2x1-dilation-1x2", "groups3", "4x4-same-dilation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.ident)
def test_gradients(activation: str, shape: str, dtype: torch.dtype, generator) -> None:
    """To x, the kept values and the bias: those of the masked dense layer."""
    x, weight, (values, *rest), conv = make(shape, dtype, generator)
    bias = torch.randn(len(weight), generator=generator).to(dtype)
    leaves = [t.requires_grad_() for t in (x, values, bias)]
    out = op.default(x, values, *rest, bias, *conv, cases.ACTIVATIONS.index(activation))
    grad = torch.randn(out.shape, generator=generator).to(dtype)
    out.backward(grad)
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    dense = F.conv2d(*wide, **SHAPES[shape][2])
    (F.gelu(dense) if activation == "gelu" else dense).backward(grad.double())
    kept = wide[1].grad[weight != 0]
    for leaf, want in zip(leaves, (wide[0].grad, kept, wide[2].grad), strict=True):
        assert leaf.grad.dtype == dtype
        error = (leaf.grad.double() - want).norm() / want.norm()
        assert error < (1e-5 if dtype == torch.float32 else 0.01), error


def test_autocast(generator) -> None:
    x, _, parts, conv = make("3x3", torch.float32, generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = op.default(x, *parts, None, *conv)
    want = op.default(x.bfloat16(), parts[0].bfloat16(), *parts[1:], None, *conv)
    cases.assert_same_bits(got, want)


def test_registration(generator) -> None:
    x, weight, (values, *rest), conv = make("3x3-stride2", torch.float32, generator)
    bias = torch.randn(len(weight), generator=generator)
    schema = ("test_schema", "test_faketensor")
    torch.library.opcheck(op.inference, (x, values, *rest, bias, *conv, 1), test_utils=schema)
    grads = (x.clone().requires_grad_(), values.clone().requires_grad_(), *rest)
    torch.library.opcheck(op.default, (*grads, bias.clone().requires_grad_(), *conv, 2))


def test_compile_and_flops(generator) -> None:
    x, _, parts, _ = make("3x3", torch.float32, generator)

    def run(x: torch.Tensor) -> torch.Tensor:
        return ops.bitmap_conv2d(x * 2, *parts, activation="relu")

    compiled = torch.compile(run, fullgraph=True, backend="eager", dynamic=True)
    for images in (x, x[:, :, 2:].repeat(2, 1, 1, 1)):
        cases.assert_same_bits(compiled(images), run(images))
    with FlopCounterMode(display=False) as counter:
        run(x)
    assert counter.get_total_flops() == 2 * 2 * 7 * 5 * parts[0].numel()


def test_bad_input(generator) -> None:
    x, _, parts, _ = make("3x3", torch.float32, generator)
    good = {"x": x, "values": parts[0], "bitmap": parts[1], "row_start": parts[2], "bias": None}
    for change, message in (
        ({"x": x[0, 0]}, "expected x [B, C, H, W], got [9, 7] float32"),
        ({"x": x.double()}, "expected x of float32, bfloat16 or float16, got"),
        ({"x": x.half()}, "expected values of int8 or of the dtype of x, float16"),
        ({"x": x[:, :8]}, "expected a contiguous bitmap [N, 16] for K=72, got [24, 24] uint8"),
        ({"x": x[:, :, :2]}, "expected a kernel no larger than the padded image, got kernel 3x3"),
        ({"values": parts[0][1:]}, "expected row_start from 0 to the"),
        ({"values": parts[0].to(torch.int8)}, "expected values of the dtype of x, got"),
        ({"bitmap": parts[1].int()}, "expected bitmap of 2-D uint8"),
        ({"row_start": parts[2][1:]}, "expected a contiguous row_start [N + 1=25], got [24] int64"),
        ({"bias": torch.ones(3)}, "expected a contiguous bias [N=24], got [3] float32"),
        ({"kernel_size": (3,)}, "expected kernel_size of one or two integers, got (3,)"),
        ({"kernel_size": 0}, "expected kernel_size of 2 integers >= 1, got [0, 0]"),
        ({"stride": 0}, "expected stride of 2 integers >= 1, got [0, 0]"),
        ({"padding": -1}, "expected padding of 4 integers >= 0, got [-1, -1, -1, -1]"),
        ({"padding": "full"}, "expected padding 'same' or 'valid', got 'full'"),
        ({"padding": "same", "stride": 2}, "expected stride 1 with padding 'same', got (2, 2)"),
        ({"groups": 5}, "expected groups that divide 16 input and 24 output channels, got 5"),
        ({"activation": "tanh"}, "expected activation in"),
    ):
        with pytest.raises(
            (RuntimeError, ValueError), match=re.escape(f"bitmap_conv2d: {message}")
        ):
            ops.bitmap_conv2d(**good | change)


def test_bits_that_disagree_with_row_start_stay_in_bounds(isa: str, generator) -> None:
    """More bits than values, and fewer: no crash, zeros at the worst; a row_start that jumps is named."""
    x, _, (values, bitmap, row_start), conv = make("groups3", torch.float32, generator)
    last = torch.zeros_like(row_start)
    last[-1] = len(values)  # more than K, all in one row
    ones, zeros = torch.full_like(bitmap, 255), torch.zeros_like(bitmap)
    for bits, start in ((ones, row_start), (zeros, row_start), (ones, last)):
        got = op.inference(x, values, bits, start, None, *conv)
        assert got.shape == (2, 18, 7, 8) and got.isfinite().all()
    # Bits past K = 36 are nobody's: the first K values are the last row's weight.
    want = F.conv2d(x[:, 8:], values[:36].reshape(1, 4, 3, 3), padding=1)
    torch.testing.assert_close(got[:, -1:], want, atol=1e-4, rtol=1e-4)
    wild = copy.deepcopy(row_start)
    wild[3] = 10**12
    with pytest.raises(
        RuntimeError, match=r"expected row_start to rise, got row_start\[4\] = \d+ after 10"
    ):
        op.inference(x, values, bitmap, wild, None, *conv)


def test_a_bit_past_K_is_no_weight(isa: str, generator) -> None:
    """Where the last block of channels is a short one, and row_start gives the bit room."""
    x, _, (values, bitmap, row_start), conv = make("several-blocks", torch.float32, generator)
    want = op.inference(x, values, bitmap, row_start, None, *conv)
    more, longer, start = torch.cat([values, values[:1]]), bitmap.clone(), row_start.clone()
    longer[-1, 1800 // 8] |= 1
    start[-1] += 1
    cases.assert_same_bits(op.inference(x, more, longer, start, None, *conv), want)
