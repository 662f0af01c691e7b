"""int8_conv2d: equal to im2col and int8_mm on every instruction set, gradients, compile, bad input."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import cases
import numpy as np
import pytest
import torch
import torch._dynamo.testing
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from trimtab import ops
from trimtab.ops.conv2d import padding_sides, pair
from trimtab.reference.int8_conv2d import int8_conv2d as reference
from trimtab.reference.int8_conv2d import patches

op = torch.ops.trimtab.int8_conv2d


@dataclass(frozen=True)
class Case:
    x: tuple[int, int, int, int]
    w: tuple[int, int, int, int]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def geometry(self) -> tuple:
        """stride, sides, dilation, groups, as the reference takes them."""
        o = self.options
        stride, dilation = pair("stride", o.get("stride", 1)), pair("d", o.get("dilation", 1))
        sides = padding_sides(o.get("padding", 0), self.w[2:], stride, dilation)
        return stride, sides, dilation, o.get("groups", 1)


CASES = {
    "1x1": Case((2, 70, 5, 7), (33, 70, 1, 1)),
    "1x1-one-channel": Case((1, 1, 3, 3), (1, 1, 1, 1)),
    "1x1-stride2": Case((2, 64, 7, 9), (16, 64, 1, 1), {"stride": 2}),
    "3x3": Case((2, 16, 9, 7), (24, 16, 3, 3)),
    "3x3-pad1": Case((3, 64, 6, 11), (65, 64, 3, 3), {"padding": 1}),
    "3x3-pad-uneven-sizes": Case((1, 5, 6, 8), (7, 5, 3, 3), {"padding": (2, 1)}),
    "3x3-stride2-pad1": Case((2, 12, 13, 10), (20, 12, 3, 3), {"stride": 2, "padding": 1}),
    "3x3-stride-2x1-dilation-1x2": Case(
        (2, 6, 11, 12), (9, 6, 3, 3), {"stride": (2, 1), "dilation": (1, 2), "padding": 2}
    ),
    "3x3-dilation3": Case((1, 64, 12, 12), (8, 64, 3, 3), {"dilation": 3, "padding": 3}),
    "7x7-stem": Case((2, 3, 30, 34), (17, 3, 7, 7), {"stride": 2, "padding": 3}),
    "2x5-same": Case((2, 8, 6, 9), (5, 8, 2, 5), {"padding": "same"}),
    "4x4-same-dilation": Case((1, 3, 9, 9), (4, 3, 4, 4), {"padding": "same", "dilation": (1, 2)}),
    "3x2-valid": Case((1, 7, 8, 8), (6, 7, 3, 2), {"padding": "valid"}),
    "patchify": Case((2, 3, 32, 32), (48, 3, 16, 16), {"stride": 16}),
    "whole-image": Case((5, 4, 6, 6), (10, 4, 6, 6)),
    "groups3": Case((2, 12, 7, 8), (18, 4, 3, 3), {"groups": 3, "padding": 1}),
    "groups2-wide": Case((1, 128, 5, 6), (34, 64, 3, 3), {"groups": 2, "padding": 1}),
    "depthwise": Case((2, 48, 9, 7), (48, 1, 3, 3), {"groups": 48, "padding": 1}),
    "depthwise-5x5-stride2": Case((2, 33, 11, 70), (33, 1, 5, 5), {"groups": 33, "stride": 2}),
    "depthwise-2x2-dilation2": Case((1, 5, 6, 9), (5, 1, 2, 2), {"groups": 5, "dilation": 2}),
    "depthwise-multiplier2": Case((2, 6, 8, 7), (12, 1, 3, 3), {"groups": 6, "padding": 1}),
    "wide-line": Case((1, 4, 3, 300), (3, 4, 3, 3), {"padding": 1}),
    "empty-batch": Case((0, 3, 8, 8), (4, 3, 3, 3), {"padding": 1}),
}


def operands(
    case: Case, dtype: torch.dtype, generator: torch.Generator
) -> tuple[torch.Tensor, ...]:
    x = torch.randn(case.x, generator=generator) * 3
    O = case.w[0]
    weight = cases.int8(O, int(np.prod(case.w[1:])), generator).reshape(case.w)
    scale = torch.rand(O, generator=generator) / 100
    return x.to(dtype), weight, scale, torch.randn(O, generator=generator).to(dtype)


def want(case: Case, x, weight, scale, bias, activation="none", out_dtype=None) -> np.ndarray:
    args = [cases.to_numpy(t) for t in (x, weight, scale, bias)]
    name = None if out_dtype is None else cases.name(out_dtype)
    return reference(*args, *case.geometry, activation, name)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("name", CASES)
def test_bits(isa: str, name: str, layout: str, generator) -> None:
    case = CASES[name]
    for dtype in cases.DTYPES:
        x, weight, scale, bias = operands(case, dtype, generator)
        if layout == "channels-last":
            x = x.contiguous(memory_format=torch.channels_last)
        expected = want(case, x, weight, scale, bias, "gelu")
        got = ops.int8_conv2d(x, weight, scale, bias, activation="gelu", **case.options)
        cases.assert_same_bits(got, expected)
        packed = ops.int8_conv2d_pack(weight, case.options.get("groups", 1))
        assert torch.equal(
            ops.int8_conv2d_unpack(packed, case.w, case.options.get("groups", 1)), weight
        )
        again = ops.int8_conv2d(
            x, packed, scale, bias, activation="gelu", kernel_size=case.w[2:], **case.options
        )
        cases.assert_same_bits(again, expected)
        last = not x.is_contiguous()
        assert got.is_contiguous(
            memory_format=torch.channels_last if last else torch.contiguous_format
        )


@pytest.mark.parametrize("name", ["3x3-pad1", "3x3-stride-2x1-dilation-1x2", "4x4-same-dilation"])
def test_equals_int8_mm_over_patches(isa: str, name: str, generator) -> None:
    case = CASES[name]
    x, weight, scale, bias = operands(case, torch.float32, generator)
    q, x_scale = ops.quantize_int8(x.reshape(case.x[0], -1))
    stride, sides, dilation, _ = case.geometry
    rows = patches(q.reshape(x.shape).numpy(), case.w[2:], stride, sides, dilation)
    B, OH, OW = rows.shape[:3]
    rows = torch.from_numpy(np.ascontiguousarray(rows).reshape(B * OH * OW, -1))
    for activation in cases.ACTIVATIONS:
        for out_dtype in cases.DTYPES:
            flat = ops.int8_mm(
                rows, weight.flatten(1), x_scale.repeat_interleave(OH * OW), scale, bias,
                activation, out_dtype,
            )  # fmt: skip
            got = ops.int8_conv2d(
                x, weight, scale, bias, activation=activation, out_dtype=out_dtype, **case.options
            )
            cases.assert_same_bits(got, flat.reshape(B, OH, OW, -1).permute(0, 3, 1, 2))


def test_is_close_to_the_float_convolution(generator) -> None:
    x = torch.randn(2, 32, 20, 20, generator=generator)
    w = torch.randn(40, 32, 3, 3, generator=generator)
    weight, scale = ops.quantize_int8(w.flatten(1))
    got = ops.int8_conv2d(x, weight.reshape(w.shape), scale, padding=1)
    exact = F.conv2d(x.double(), w.double(), padding=1)
    assert (got - exact).norm() / exact.norm() < 0.02


VIEWS = {
    "channel-slice": lambda x: x[:, ::2],
    "width-slice": lambda x: x[..., ::2],
    "crop": lambda x: x[:, :, 1:-1, 2:],
    "transposed": lambda x: x.transpose(2, 3),
    "batch-slice": lambda x: x[::2],
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    "channels-last-crop": lambda x: x.contiguous(memory_format=torch.channels_last)[:, :, 1:],
    "channels-last-batch-slice": lambda x: x.contiguous(memory_format=torch.channels_last)[1:2],
    "unbatched": lambda x: x[1],
}


@pytest.mark.parametrize("name", VIEWS)
def test_strides(isa: str, name: str, generator) -> None:
    x = VIEWS[name](torch.randn(4, 8, 9, 10, generator=generator))
    weight = cases.int8(5, x.shape[-3] * 9, generator).reshape(5, x.shape[-3], 3, 3)
    scale = torch.rand(5, generator=generator)
    got = ops.int8_conv2d(x, weight, scale, padding=1)
    plain = x.contiguous().clone()
    cases.assert_same_bits(got, ops.int8_conv2d(plain, weight, scale, padding=1))
    assert got.dim() == x.dim()


@pytest.mark.parametrize("groups", [1, 6], ids=["general", "depthwise"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_bad_images_stay_alone(isa: str, groups: int, layout, generator) -> None:
    """NaN and Inf spoil their own image, a zero image gives the bias, a tiny one too."""
    case = Case((6, 6, 300, 5), (6, 6 // groups, 3, 3), {"padding": 1, "groups": groups})
    x, weight, scale, bias = operands(case, torch.float32, generator)
    x[1, 3, 299, 4] = float("nan")
    x[2, 0, 0, 0] = float("-inf")
    x[3] = 0
    x[4] = 1e-40
    got = ops.int8_conv2d(x.contiguous(memory_format=layout), weight, scale, bias, **case.options)
    cases.assert_same_bits(got, want(case, x, weight, scale, bias))
    assert got[1:3].isnan().all() and not got[[0, 3, 4, 5]].isnan().any()
    assert torch.equal(got[3], bias[:, None, None].expand_as(got[3]))


@pytest.mark.parametrize("groups", [1, 2, 16], ids=["general", "groups2", "depthwise"])
def test_batch_and_threads_do_not_matter(isa: str, groups: int, generator) -> None:
    # 40 images take several rounds of scratch memory.
    case = Case((40, 16, 70, 33), (16, 16 // groups, 3, 3), {"padding": 1, "groups": groups})
    x, weight, scale, bias = operands(case, torch.float32, generator)
    whole = ops.int8_conv2d(x, weight, scale, bias, **case.options)
    for count in (1, 3):
        with cases.threads(count):
            cases.assert_same_bits(ops.int8_conv2d(x, weight, scale, bias, **case.options), whole)
    for image in (0, 17, 39):
        one = ops.int8_conv2d(x[image], weight, scale, bias, **case.options)
        cases.assert_same_bits(one, whole[image])


def test_large_sum_is_exact(isa: str) -> None:
    """K = 133144 of 127 * 127, just below 2^31."""
    channels = 133_144 // 4
    x = torch.ones(1, channels, 2, 2)
    weight = torch.full((1, channels, 2, 2), 127, dtype=torch.int8)
    got = ops.int8_conv2d(x, weight, torch.ones(1))
    exact = np.float32(127 * 127 * 133_144) * (np.float32(1) / np.float32(127))
    assert got.item() == exact


@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
@pytest.mark.parametrize(
    "name", ["3x3-stride2-pad1", "2x5-same", "4x4-same-dilation", "groups3", "depthwise"]
)
def test_gradients(activation: str, name: str, generator) -> None:
    """To x through the dequantized weight, to the bias: those of the float layer it stands for."""
    case = CASES[name]
    x, weight, scale, bias = operands(case, torch.float32, generator)
    x, bias = x.requires_grad_(), bias.requires_grad_()
    stride, (top, bottom, left, right), dilation, groups = case.geometry
    # The float layer sees x as it was quantized; the gradient passes the rounding as if it were not.
    q, x_scale = ops.quantize_int8(x.detach().flatten(1))
    want_x = (q.double() * x_scale[:, None]).reshape(x.shape).requires_grad_()
    want_bias = bias.detach().double().requires_grad_()
    padded = F.pad(want_x, (left, right, top, bottom))
    real = weight.double() * scale.double()[:, None, None, None]
    before = F.conv2d(padded, real, want_bias, stride, 0, dilation, groups)
    acts = {"gelu_tanh": lambda t: F.gelu(t, approximate="tanh"), "none": lambda t: t}
    after = acts.get(activation, getattr(F, activation, None))(before)
    grad = torch.randn(after.shape, generator=generator)
    after.backward(grad.double())
    for w in (weight, ops.int8_conv2d_pack(weight, groups)):
        x.grad = bias.grad = None
        ops.int8_conv2d(
            x, w, scale, bias, activation=activation, kernel_size=case.w[2:], **case.options
        ).backward(grad)
        assert x.grad is not None and bias.grad is not None
        for got, expected in ((x.grad, want_x.grad), (bias.grad, want_bias.grad)):
            assert (got.double() - expected).norm() / expected.norm() < 2e-5


def test_autocast(generator) -> None:
    x, weight, scale, bias = operands(CASES["3x3"], torch.float32, generator)
    expected = ops.int8_conv2d(x.bfloat16(), weight, scale, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ops.int8_conv2d(x, weight, scale, bias)
        assert got.dtype == torch.bfloat16
        cases.assert_same_bits(got, expected)


def test_registration(generator) -> None:
    case = CASES["groups3"]
    x, weight, scale, bias = operands(case, torch.float32, generator)
    last = x.contiguous(memory_format=torch.channels_last)
    packed = ops.int8_conv2d_pack(weight, 3)
    shape = ([3, 3], [2, 1], [1, 0, 2, 1], [1, 2], 3)
    for images in (x, last):
        for w in (weight, packed):
            torch.library.opcheck(op.default, (images, w, scale, bias, *shape, 3, torch.bfloat16))
            torch.library.opcheck(op.inference, (images, w, scale, None, *shape))
    grads = (x.clone().requires_grad_(), packed, scale, bias.clone().requires_grad_(), *shape, 2)
    torch.library.opcheck(op.default, grads)
    torch.library.opcheck(torch.ops.trimtab.int8_conv2d_pack.default, (weight, 3))
    torch.library.opcheck(torch.ops.trimtab.int8_conv2d_unpack.default, (packed, list(case.w), 3))
    expected = op(x, packed, scale, bias, *shape)
    for layout in (torch.contiguous_format, torch.channels_last):
        out = torch.empty(expected.shape, memory_format=layout)
        torch.library.opcheck(op.out, (x, packed, scale, bias, *shape), {"out": out})
        op.out(x, packed, scale, bias, *shape, out=out)
        cases.assert_same_bits(out, expected)
    out = torch.empty(18, 5, 6)
    assert ops.int8_conv2d(x[0], weight, scale, bias, groups=3, out=out) is out
    cases.assert_same_bits(out, ops.int8_conv2d(x, weight, scale, bias, groups=3)[0])
    with FlopCounterMode(display=False) as counter:
        ops.int8_conv2d(x, weight, scale, bias, groups=3)
    assert counter.get_total_flops() == 2 * (2 * 18 * 5 * 6) * (4 * 9)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compile_has_one_graph_for_all_batch_sizes(layout, generator) -> None:
    _, weight, scale, bias = operands(CASES["3x3"], torch.float32, generator)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def model(x: torch.Tensor) -> torch.Tensor:
        return ops.int8_conv2d(x * 2, weight, scale, bias, padding="same", activation="relu") + 1

    run = torch.compile(model, fullgraph=True, backend=counter)
    for B in (2, 3, 5, 8, 13, 21, 34, 55):
        x = torch.randn(B, 16, 6, 5, generator=generator).contiguous(memory_format=layout)
        cases.assert_same_bits(run(x), model(x))
    assert counter.frame_count <= 2, counter.frame_count  # one static, one dynamic


def test_compile_inductor_and_backward(generator) -> None:
    x, weight, scale, bias = operands(CASES["3x3"], torch.float32, generator)
    torch._dynamo.reset()
    run = torch.compile(
        lambda x: ops.int8_conv2d(x, weight, scale, bias, padding=1).sum(), fullgraph=True
    )
    x.requires_grad_()
    run(x).backward()
    real = weight.float() * scale[:, None, None, None]
    ones = torch.ones(x.shape[0], real.shape[0], *x.shape[2:])
    torch.testing.assert_close(x.grad, torch.nn.grad.conv2d_input(x.shape, real, ones, padding=1))


def bad(**changes: Any) -> dict[str, Any]:
    good = {
        "x": torch.zeros(2, 4, 5, 6),
        "weight": torch.zeros(6, 4, 3, 3, dtype=torch.int8),
        "weight_scale": torch.ones(6),
    }
    return good | changes


BAD = {
    "x-dtype": (bad(x=torch.zeros(2, 4, 5, 6).double()), "expected x of float32, bfloat16"),
    "x-rank": (bad(x=torch.zeros(4, 5)), "expected x [B, C, H, W], got [4, 5] float32"),
    "channels": (bad(x=torch.zeros(2, 5, 5, 6)), "expected weight [O=6, C/groups=5, 3, 3]"),
    "groups": (bad(groups=3), "expected groups that divide 4 input and 6 output channels, got 3"),
    "weight-dtype": (bad(weight=torch.zeros(6, 4, 3, 3)), "got [6, 4, 3, 3] float32"),
    "packed": (
        bad(weight=torch.zeros(99, dtype=torch.int8), kernel_size=3),
        "expected a contiguous packed weight of 1536 bytes (from int8_conv2d_pack), got [99] int8",
    ),
    "scale": (bad(weight_scale=torch.ones(7)), "expected weight [O=7, "),
    "bias": (bad(bias=torch.ones(5)), "expected a contiguous bias [N=6], got [5] float32"),
    "kernel-too-large": (
        bad(x=torch.zeros(2, 4, 2, 6)),
        "a kernel no larger than the padded image",
    ),
    "padding": (bad(padding=-1), "expected padding of 4 integers >= 0, got [-1, -1, -1, -1]"),
    "stride": (bad(stride=(0, 1)), "expected stride of 2 integers >= 1, got [0, 1]"),
    "out-dtype": (bad(out_dtype=torch.int32), "expected out of float32, bfloat16 or float16"),
    "out-shape": (bad(out=torch.empty(2, 6, 3, 5)), "expected contiguous out of [2, 6, 3, 4]"),
    "scale-grad": (bad(weight_scale=torch.ones(6, requires_grad=True)), "requires grad"),
    "k": (
        bad(
            x=torch.zeros(1, 133_145, 1, 1), weight=torch.zeros(6, 133_145, 1, 1, dtype=torch.int8)
        ),
        "expected K <= 133144",
    ),
}
VALUE = {
    "activation": (bad(activation="tanh"), "expected activation in"),
    "same-stride": (bad(padding="same", stride=2), "expected stride 1 with padding 'same'"),
    "padding-name": (bad(padding="full"), "expected padding 'same' or 'valid', got 'full'"),
    "no-kernel-size": (bad(weight=torch.zeros(9, dtype=torch.int8)), "expected kernel_size with a"),
}


@pytest.mark.parametrize("case", [*BAD, *VALUE])
def test_bad_input(case: str) -> None:
    arguments, message = (BAD | VALUE)[case]
    kind = RuntimeError if case in BAD else ValueError
    with pytest.raises(kind, match=re.escape(message)) as caught:
        ops.int8_conv2d(**arguments)
    assert str(caught.value).startswith("int8_conv2d")


@pytest.mark.parametrize(
    "case", ["x-dtype", "x-rank", "channels", "groups", "weight-dtype", "packed", "scale", "k"]
)
def test_bad_input_while_tracing(case: str) -> None:
    """The fakes refuse what the kernels refuse, so that compile fails early and clearly."""
    arguments, _ = BAD[case]
    with torch._subclasses.FakeTensorMode() as mode:
        fake = {
            k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v
            for k, v in arguments.items()
        }
        with pytest.raises(RuntimeError, match="int8_conv2d"):
            ops.int8_conv2d(**fake)
