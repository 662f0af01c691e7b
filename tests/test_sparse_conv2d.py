"""SparseConv2d: torch.nn.Conv2d's every setting, training, checkpoints, compile, errors."""

from __future__ import annotations

import copy
import io
import re

import cases
import pytest
import torch
from sparse_cases import BLOCK, PATTERNS, assert_near, pruned
from torch import Tensor, nn
from torch.nn import functional as F

import trimtab.optim
from trimtab import ops
from trimtab.nn import SparseConv2d

each_pattern = pytest.mark.parametrize("pattern", PATTERNS)

# (in, out, kernel, options): every kind of stride, padding, dilation, groups; one 1x1.
SHAPES = {
    "plain": (6, 10, 3, {}),
    "1x1": (16, 24, 1, {}),
    "1x1-stride": (16, 24, 1, {"stride": (2, 1), "padding": 1}),
    "stride": (8, 12, (3, 2), {"stride": (2, 3), "padding": (1, 2)}),
    "dilation": (8, 12, 3, {"dilation": (2, 1), "padding": 2, "bias": False}),
    "same": (5, 9, (4, 3), {"padding": "same", "dilation": (1, 2)}),
    "valid": (8, 8, 2, {"padding": "valid"}),
    "groups": (12, 18, 3, {"groups": 3, "padding": 1}),
    "reflect": (8, 12, 3, {"padding": (2, 1), "padding_mode": "reflect"}),
    "circular": (8, 12, 3, {"padding": 1, "padding_mode": "circular", "stride": 2}),
}


def make(
    pattern: str, case: str = "plain", int8: bool = False, dtype: torch.dtype = torch.float32,
    activation: str = "none",
) -> tuple[nn.Conv2d, SparseConv2d]:  # fmt: skip
    torch.manual_seed(0)
    C, O, kernel, options = SHAPES[case]
    dense = pruned(nn.Conv2d(C, O, kernel, **options, dtype=dtype), pattern, 0.15)
    args = {"pattern": pattern, "block": BLOCK_OF.get(case, BLOCK), "int8": int8}
    return dense, SparseConv2d.from_float(dense, activation, **args)


BLOCK_OF = {"groups": (2, 9)}  # what its matrices have room for


def inputs(C: int, dtype: torch.dtype = torch.float32, batch: int = 2) -> Tensor:
    return torch.randn(batch, C, 11, 13, generator=torch.Generator().manual_seed(1)).to(dtype)


def want(dense: nn.Conv2d, x: Tensor) -> Tensor:
    return copy.deepcopy(dense).double()(x.double()).detach()


@each_pattern
@pytest.mark.parametrize("case", SHAPES)
def test_float(pattern: str, case: str) -> None:
    dense, layer = make(pattern, case)
    x = inputs(dense.in_channels)
    assert torch.equal(layer.weight, dense.weight) and layer.bias is dense.bias
    assert_near(layer(x).detach(), x, dense.weight, want(dense, x), dense.weight[0].numel())


def test_depthwise() -> None:
    """Fits where its rows are empty enough; each group is a product of its own."""
    torch.manual_seed(0)
    dense = pruned(nn.Conv2d(16, 32, 5, groups=16, padding=2), "bitmap", 0.1)
    layer = SparseConv2d.from_float(dense)
    x = inputs(16)
    assert_near(layer(x).detach(), x, dense.weight, want(dense, x), 25)


@each_pattern
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=cases.ident)
def test_half(isa: str, pattern: str, dtype: torch.dtype) -> None:
    dense, layer = make(pattern, "stride", dtype=dtype, activation="relu")
    x = inputs(8, dtype)
    assert_near(layer(x).detach(), x, dense.weight, torch.relu(want(dense, x)), 48)


@each_pattern
@pytest.mark.parametrize("case", ["stride", "groups"])
def test_int8_has_the_bits_of_int8_linear_on_patches(isa: str, pattern: str, case: str) -> None:
    dense, layer = make(pattern, case, int8=True, activation="silu")
    x = inputs(dense.in_channels)
    patches = F.unfold(x, dense.kernel_size, 1, dense.padding, dense.stride).transpose(1, 2)
    weight, scale = ops.quantize_int8(dense.weight.detach().flatten(1))
    each, K = dense.out_channels // dense.groups, weight.shape[1]
    out = []
    for g in range(dense.groups):
        part = slice(g * each, (g + 1) * each)
        rows = patches[..., g * K : (g + 1) * K]
        out.append(ops.int8_linear(rows, weight[part], scale[part], dense.bias[part], "silu"))
    got = layer(x).detach()
    cases.assert_same_bits(got, torch.cat(out, 2).transpose(1, 2).reshape(got.shape).detach())


@each_pattern
def test_one_image_no_image_and_memory_formats(pattern: str) -> None:
    _dense, layer = make(pattern)
    x = inputs(6)
    cases.assert_same_bits(layer(x[0]), layer(x)[0])
    assert layer(x[:0]).shape == (0, 10, 9, 11)
    last = x.to(memory_format=torch.channels_last)
    cases.assert_same_bits(layer(last), layer(x))
    assert layer(x).is_contiguous()
    assert layer(last).is_contiguous(memory_format=torch.channels_last)


@each_pattern
@pytest.mark.parametrize("case", ["stride", "groups", "1x1"])
def test_gradients(pattern: str, case: str) -> None:
    dense, layer = make(pattern, case)
    x = inputs(dense.in_channels).requires_grad_()
    out = layer(x)
    g = torch.randn(out.shape)
    out.backward(g)
    got = x.grad, layer.bias.grad
    x.grad = layer.bias.grad = None
    dense(x).backward(g)
    torch.testing.assert_close(got[0], x.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[1], dense.bias.grad, rtol=1e-4, atol=1e-4)
    layer.values.data.copy_(layer.values.grad)
    grad = layer.weight.detach()
    at = (dense.weight != 0) & (grad != 0)
    assert int(at.sum()) >= 0.9 * int((dense.weight != 0).sum())
    torch.testing.assert_close(grad[at], dense.weight.grad[at], rtol=1e-3, atol=1e-3)


@each_pattern
@pytest.mark.parametrize(
    "optimizer", [torch.optim.AdamW, trimtab.optim.AdamW], ids=["torch", "trimtab"]
)
def test_trains(pattern: str, optimizer: type) -> None:
    """What is pruned stays zero, what is kept learns."""
    dense, layer = make(pattern, "groups")
    steps = optimizer(layer.parameters(), lr=0.02)
    x, target = inputs(12), torch.randn(2, 18, 11, 13, generator=torch.Generator().manual_seed(2))
    losses = []
    for _ in range(20):
        loss = (layer(x) - target).square().mean()
        steps.zero_grad()
        loss.backward()
        steps.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    assert not torch.equal(layer.weight, dense.weight)
    if pattern == "bitmap":  # in a kept block or group zeros train too
        assert not layer.weight[dense.weight == 0].any()


# (in, out, kernel, options), and which output channels keep nothing
ODD = {
    "nothing-kept": ((4, 6, 3, {}), slice(None)),
    "a-group-of-nothing": ((8, 8, 3, {"groups": 2}), slice(0, 4)),
    "one-channel": ((1, 1, (5, 7), {}), slice(0)),
    "one-output": ((27, 1, 1, {}), slice(0)),
    "primes": ((5, 13, (3, 7), {"padding": (1, 3)}), slice(3, 9)),
}


@each_pattern
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("case", ODD)
def test_odd_and_empty(pattern: str, int8: bool, case: str) -> None:
    (C, O, kernel, options), empty = ODD[case]
    torch.manual_seed(0)
    dense = pruned(nn.Conv2d(C, O, kernel, **options), pattern, 0.3)
    with torch.no_grad():
        dense.weight[empty] = 0
    layer = SparseConv2d.from_float(dense, pattern=pattern, block=(1, 4), int8=int8)
    x = inputs(C).requires_grad_()
    out, exact = layer(x), want(dense, x.detach())
    assert out.shape == exact.shape
    assert (out - exact).norm() <= (0.02 if int8 else 1e-6) * exact.norm()
    out.sum().backward()
    gradient = x.grad
    x.grad = None
    nn.functional.conv2d(x, layer.weight, None, 1, dense.padding, 1, dense.groups).sum().backward()
    torch.testing.assert_close(gradient, x.grad, rtol=1e-4, atol=1e-4)


@each_pattern
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_checkpoint_copies_and_meta(pattern: str, int8: bool) -> None:
    _dense, layer = make(pattern, "groups", int8)
    x = inputs(12)
    options = {"pattern": pattern, "block": (2, 9), "int8": int8}
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert state["sparse_format"].tolist()[2:] == [18, 4, 3, 3]
    fresh = SparseConv2d(12, 18, 3, groups=3, padding=1, **options)
    fresh(x)
    fresh.load_state_dict(state)
    meta = SparseConv2d(12, 18, 3, groups=3, padding=1, device="meta", **options)
    meta.to_empty(device="cpu").bias.data.zero_()
    assert not meta(x).any()  # an empty weight, of which no group reads out of bounds
    meta.load_state_dict(state)
    for other in (fresh, meta, copy.deepcopy(layer)):
        cases.assert_same_bits(other(x), layer(x))


def test_corrupt_checkpoint_changes_nothing() -> None:
    _, layer = make("bitmap", "groups")
    before, state = copy.deepcopy(layer), layer.state_dict()
    state["bitmap"] = state["bitmap"].clone()
    state["bitmap"][4, 5] = 255
    with pytest.raises(RuntimeError, match="SparseConv2d: .*(no bit past K=36|as many values)"):
        layer.load_state_dict(state)
    cases.assert_same_bits(layer(inputs(12)), before(inputs(12)))


@each_pattern
@pytest.mark.parametrize("case", ["same", "groups"])
def test_compile_and_export(pattern: str, case: str) -> None:
    dense, layer = make(pattern, case)
    layer.requires_grad_(False)
    x = inputs(dense.in_channels)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    cases.assert_same_bits(compiled(x), layer(x))
    program = torch.export.export(layer, (x,))
    cases.assert_same_bits(program.module()(x), layer(x))


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="SparseConv2d: expected an nn.Conv2d, got Linear"):
        SparseConv2d.from_float(nn.Linear(2, 2))
    dense = pruned(nn.Conv2d(8, 4, 3), "2:4")
    with torch.no_grad():
        dense.weight[2, 1, 0] = 1  # columns 9, 10 and 11: two in the group of 8 to 11 at least
        dense.weight[2, 0, 2, 2] = 1
    message = "third at weight[2, 1, 0, 1]: row 2, columns 8 to 11"
    with pytest.raises(ValueError, match=re.escape(message)):
        SparseConv2d.from_float(dense, pattern="2:4")
    with torch.no_grad():
        dense.weight[0, 3, 2, 1] = float("nan")
    with pytest.raises(ValueError, match=re.escape("got weight[0, 3, 2, 1]")):
        SparseConv2d.from_float(dense, pattern="2:4")
    with pytest.raises(
        ValueError, match="SparseConv2d: expected a weight that bitmap makes smaller"
    ):
        SparseConv2d.from_float(nn.Conv2d(16, 16, 3, groups=16))
    _, layer = make("bitmap")
    with pytest.raises(
        RuntimeError, match=r"SparseConv2d: expected x \[B, 6, H, W\].* got \[2, 5, 9, 9\]"
    ):
        layer(torch.zeros(2, 5, 9, 9))
    with pytest.raises(RuntimeError, match="SparseConv2d: expected an image that the kernel 3x3"):
        layer(torch.zeros(2, 6, 2, 9))
