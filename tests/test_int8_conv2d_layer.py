"""Int8Conv2d: what a user does with a layer. Every geometry of nn.Conv2d, checkpoints, moves, errors."""

from __future__ import annotations

import copy
import io
import re
from typing import Any

import cases
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trimtab import ops
from trimtab.nn import Int8Conv2d

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "stride": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)},
    "same": {"kernel_size": 4, "padding": "same", "dilation": 2},
    "valid": {"kernel_size": 3, "padding": "valid", "bias": False},
    "groups": {"kernel_size": 3, "groups": 4, "padding": 1},
    "depthwise": {"kernel_size": 3, "groups": 12, "out_channels": 12, "padding": 1},
    "reflect": {"kernel_size": 5, "padding": 2, "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "replicate"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "stride": 2},
    "circular-same": {"kernel_size": (4, 3), "padding": "same", "padding_mode": "circular"},
}


def make(name: str = "plain", dtype: torch.dtype = torch.float32) -> tuple[nn.Conv2d, Int8Conv2d]:
    torch.manual_seed(0)
    options = {"in_channels": 12, "out_channels": 20} | LAYERS[name]
    layer = nn.Conv2d(**options, dtype=dtype).eval()
    return layer, Int8Conv2d.from_float(layer)


def images(dtype: torch.dtype = torch.float32, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 12, 9, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def same(a: nn.Module, b: nn.Module) -> None:
    cases.assert_same_bits(a(images()), b(images()))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ident)
@pytest.mark.parametrize("name", LAYERS)
def test_forward(isa: str, name: str, dtype: torch.dtype) -> None:
    layer, q = make(name, dtype)
    x = images(dtype)
    weight, scale = ops.quantize_int8(layer.weight.detach().flatten(1))
    weight = weight.reshape(layer.weight.shape)
    shape = (layer.stride, layer.padding, layer.dilation, layer.groups)
    if layer.padding_mode == "zeros":
        want = ops.int8_conv2d(x, weight, scale, layer.bias, *shape)
    else:
        padded = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        want = ops.int8_conv2d(padded, weight, scale, layer.bias, shape[0], 0, *shape[2:])
    with torch.no_grad():
        expected = copy.deepcopy(layer).double()(x.double())
    for layout in (torch.contiguous_format, torch.channels_last):
        got = q(x.contiguous(memory_format=layout))
        if layer.padding_mode != "circular":  # which F.pad returns contiguous, to nn.Conv2d too
            assert got.is_contiguous(memory_format=layout)
        cases.assert_same_bits(got, want)
        assert (got - expected).norm() / expected.norm() < 0.03
    cases.assert_same_bits(q(x[0]), want[0])
    assert q(x[:0]).shape == (0, *want.shape[1:])


def test_stands_for_the_float_layer() -> None:
    layer, q = make("groups")
    assert isinstance(q, nn.Conv2d) and q.bias is layer.bias and not q.training
    assert q.weight.shape == layer.weight.shape and q.weight.dtype == layer.weight.dtype
    steps = (q.weight - layer.weight).abs() / q.weight_scale[:, None, None, None]
    assert steps.max() <= 0.5001
    assert q.extra_repr() == layer.extra_repr()
    for name in nn.Conv2d.__constants__:
        assert getattr(q, name) == getattr(layer, name)


def test_activation_is_fused() -> None:
    layer, _ = make()
    q = Int8Conv2d.from_float(layer, activation="silu")
    plain = Int8Conv2d.from_float(layer)(images())
    torch.testing.assert_close(q(images()), F.silu(plain), rtol=1e-5, atol=1e-6)
    assert q.extra_repr().endswith(", activation=silu")


@pytest.mark.parametrize("groups", [1, 256], ids=["general", "depthwise"])
def test_one_copy_is_resident(groups: int) -> None:
    layer = nn.Conv2d(256, 256, 3, groups=groups)
    q = Int8Conv2d.from_float(layer)
    held = sum(t.numel() * t.element_size() for t in [*q.buffers(), *q.parameters()])
    assert held == q.resident_bytes()
    assert held <= 1.05 * layer.weight.numel() + 8 * 256


@pytest.mark.parametrize("name", ["plain", "groups", "depthwise", "valid"])
def test_state_dict_is_canonical(name: str) -> None:
    layer, q = make(name)
    state = q.state_dict()
    weight, scale = ops.quantize_int8(layer.weight.detach().flatten(1))
    bias = {"bias"} if layer.bias is not None else set()
    assert set(state) == {"weight", "weight_scale", "int8_format"} | bias
    assert torch.equal(state["weight"], weight.reshape(layer.weight.shape))
    assert torch.equal(state["weight_scale"], scale) and state["int8_format"].tolist() == [1]
    buffer = io.BytesIO()
    torch.save(state, buffer)
    options = {"in_channels": 12, "out_channels": 20} | LAYERS[name]
    for assign in (False, True):
        buffer.seek(0)
        fresh = Int8Conv2d(**options)
        fresh.load_state_dict(torch.load(buffer, weights_only=True), assign=assign)
        same(q, fresh)


def test_safetensors_deepcopy_pickle(tmp_path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    _, q = make("depthwise")
    safetensors.save_file(q.state_dict(), tmp_path / "q.safetensors")
    fresh = Int8Conv2d(12, 12, 3, groups=12, padding=1)
    fresh.load_state_dict(safetensors.load_file(tmp_path / "q.safetensors"))
    same(q, fresh)
    same(q, copy.deepcopy(q))
    buffer = io.BytesIO()
    torch.save(q, buffer)
    buffer.seek(0)
    same(q, torch.load(buffer, weights_only=False))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ident)
def test_to_dtype_keeps_scales_and_weight(dtype: torch.dtype) -> None:
    _, q = make("groups")
    packed, scale = q.packed.clone(), q.weight_scale.clone()
    q.to(dtype)
    assert q.weight_scale.dtype == torch.float32 and torch.equal(q.weight_scale, scale)
    assert torch.equal(q.packed, packed) and q.bias.dtype == dtype and q.weight.dtype == dtype
    assert q(images(dtype)).dtype == dtype


def test_to_memory_format_changes_nothing() -> None:
    _, q = make()
    before = q(images())
    cases.assert_same_bits(q.to(memory_format=torch.channels_last)(images()), before)


@pytest.mark.parametrize("name", ["plain", "depthwise", "groups"])
def test_meta_and_back(name: str) -> None:
    layer, q = make(name)
    state = q.state_dict()
    meta = copy.deepcopy(q).to("meta")
    assert all(t.device.type == "meta" for t in [*meta.buffers(), *meta.parameters()])
    assert meta.packed.shape == layer.weight.shape
    assert meta(images().to("meta")).shape == q(images()).shape
    options = {"in_channels": 12, "out_channels": 20} | LAYERS[name]
    with torch.device("meta"):
        born = Int8Conv2d(**options)
    for module in (meta, born):
        empty = module.to_empty(device="cpu")
        empty.load_state_dict(state)
        same(q, empty)
    assigned = Int8Conv2d(**options, device="meta")
    assigned.load_state_dict(state, assign=True)
    same(q, assigned)


BAD_STATES = {
    "float": (
        {"weight": torch.zeros(20, 12, 3, 3)},
        "expected an int8 weight, got float32: load a",
    ),
    "shape": (
        {"weight": torch.zeros(20, 12, 9, dtype=torch.int8)},
        "expected weight [20, 12, 3, 3] int8, got [20, 12, 9] int8",
    ),
    "scale": ({"weight_scale": torch.zeros(19)}, "expected weight_scale [20] float32"),
    "version": ({"int8_format": torch.tensor([2], dtype=torch.int32)}, "version 1, got 2"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_bad_checkpoint_changes_nothing(case: str) -> None:
    changes, message = BAD_STATES[case]
    _, q = make()
    before = q(images())
    state = {k: v + 1 if k == "bias" else v.clone() for k, v in q.state_dict().items()} | changes
    with pytest.raises(RuntimeError, match=re.escape(message)):
        q.load_state_dict(state)
    cases.assert_same_bits(q(images()), before)


@pytest.mark.parametrize("name", ["plain", "depthwise", "reflect"])
def test_gradients_and_training(name: str) -> None:
    layer, q = make(name)
    x = images().requires_grad_()
    q(x).square().sum().backward()
    assert x.grad is not None and q.bias.grad is not None and layer.weight.grad is None
    got, x.grad = x.grad, None
    layer(x).square().sum().backward()
    assert (got - x.grad).norm() / x.grad.norm() < 0.05
    with torch.no_grad():
        assert not q(x).requires_grad


@pytest.mark.parametrize("name", ["plain", "depthwise", "reflect", "same"])
def test_compile_and_export(name: str) -> None:
    _, q = make(name)
    torch._dynamo.reset()
    run = torch.compile(q, fullgraph=True)
    for batch in (1, 2, 5):
        x = images(batch=batch)
        with torch.no_grad():
            cases.assert_same_bits(run(x), q(x))
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(q, (images(),), dynamic_shapes=({0: batch},))
    cases.assert_same_bits(program.module()(images(batch=7)), q(images(batch=7)))


def test_refusals() -> None:
    with pytest.raises(TypeError, match="expected an nn.Conv2d, got Linear"):
        Int8Conv2d.from_float(nn.Linear(2, 3))
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        Int8Conv2d.from_float(nn.Conv2d(2, 3, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="expected activation in"):
        Int8Conv2d.from_float(nn.Conv2d(2, 3, 1), activation="tanh")
    with pytest.raises(ValueError, match="groups"):
        Int8Conv2d(3, 4, 1, groups=2)
    _, q = make()
    with pytest.raises(RuntimeError, match=re.escape("expected x [B, C, H, W], got [12, 9]")):
        q(torch.zeros(12, 9))
