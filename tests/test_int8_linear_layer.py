"""Int8Linear: what a user does with a layer. Checkpoints, copies, moves, compile, export, LoRA, errors."""

from __future__ import annotations

import copy
import io
import re

import cases
import pytest
import torch
import torch._dynamo.testing
from torch import nn

from trimtab import ops
from trimtab.nn import Int8Linear
from trimtab.nn.int8_weight import padded_rows


def make(dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[nn.Linear, Int8Linear]:
    torch.manual_seed(0)
    layer = nn.Linear(40, 30, bias=bias, dtype=dtype).eval()
    return layer, Int8Linear.from_float(layer)


def same(a: Int8Linear, b: Int8Linear) -> None:
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)).to(a.dtype)
    cases.assert_same_bits(a(x), b(x))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ident)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_forward(isa: str, dtype: torch.dtype, bias: bool, generator) -> None:
    layer, q = make(dtype, bias)
    x = torch.randn(2, 7, 40, generator=generator).to(dtype)
    weight, scale = ops.quantize_int8(layer.weight.detach())
    cases.assert_same_bits(q(x), ops.int8_linear(x, weight, scale, layer.bias))
    error = (q(x).double() - layer(x).double()).norm() / layer(x).double().norm()
    assert error < 0.02
    assert q.bias is layer.bias and isinstance(q, nn.Linear) and not q.training


def test_weight_is_the_float_one_it_stands_for() -> None:
    layer, q = make()
    assert q.weight.shape == layer.weight.shape and q.weight.dtype == layer.weight.dtype
    # Half a step of the row's scale, and a little for its own rounding.
    steps = (q.weight - layer.weight).abs() / q.weight_scale[:, None]
    assert steps.max() <= 0.5001


def test_one_copy_is_resident() -> None:
    layer = nn.Linear(1000, 1024)
    q = Int8Linear.from_float(layer)
    held = sum(t.numel() * t.element_size() for t in [*q.buffers(), *q.parameters()])
    assert held == q.resident_bytes()
    assert held <= 1.05 * 1000 * 1024 + 4 * 1024 + 4 * 1024


def test_state_dict_is_canonical() -> None:
    layer, q = make()
    state = q.state_dict()
    weight, scale = ops.quantize_int8(layer.weight.detach())
    assert set(state) == {"weight", "weight_scale", "bias", "int8_format"}
    assert torch.equal(state["weight"], weight) and torch.equal(state["weight_scale"], scale)
    assert state["int8_format"].tolist() == [1]


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_torch_save_weights_only(assign: bool) -> None:
    _, q = make()
    buffer = io.BytesIO()
    torch.save(q.state_dict(), buffer)
    buffer.seek(0)
    fresh = Int8Linear(40, 30)
    fresh.load_state_dict(torch.load(buffer, weights_only=True), assign=assign)
    same(q, fresh)


def test_safetensors(tmp_path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    _, q = make()
    safetensors.save_file(q.state_dict(), tmp_path / "q.safetensors")
    fresh = Int8Linear(40, 30)
    fresh.load_state_dict(safetensors.load_file(tmp_path / "q.safetensors"))
    same(q, fresh)


def test_deepcopy_and_pickle() -> None:
    _, q = make()
    same(q, copy.deepcopy(q))
    buffer = io.BytesIO()
    torch.save(q, buffer)
    buffer.seek(0)
    same(q, torch.load(buffer, weights_only=False))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ident)
def test_to_dtype_keeps_scales_and_weight(dtype: torch.dtype, generator) -> None:
    _, q = make()
    packed, scale = q.packed.clone(), q.weight_scale.clone()
    q.to(dtype)
    assert q.weight_scale.dtype == torch.float32 and torch.equal(q.weight_scale, scale)
    assert torch.equal(q.packed, packed) and q.bias.dtype == dtype and q.weight.dtype == dtype
    x = torch.randn(3, 40, generator=generator).to(dtype)
    weight, _ = ops.int8_unpack(packed, 30, 40), None
    cases.assert_same_bits(q(x), ops.int8_linear(x, weight, scale, q.bias))


def test_meta_and_back() -> None:
    _, q = make()
    state = q.state_dict()
    meta = copy.deepcopy(q).to("meta")
    assert all(t.device.type == "meta" for t in [*meta.buffers(), *meta.parameters()])
    assert meta(torch.randn(3, 40, device="meta")).shape == (3, 30)
    with torch.device("meta"):
        born = Int8Linear(40, 30)
    for module in (meta, born):
        empty = module.to_empty(device="cpu")
        empty.load_state_dict(state)
        same(q, empty.eval())
    assigned = Int8Linear(40, 30, device="meta")
    assigned.load_state_dict(state, assign=True)
    same(q, assigned)


def test_to_device_changes_layout_and_back() -> None:
    """A CPU keeps the packed form, other devices [N, K]; meta stands in for them here."""
    _, q = make()
    assert q.packed.dim() == 1
    assert copy.deepcopy(q).to("meta").packed.shape == (30, 40)


def bad_state(q: Int8Linear, **changes) -> dict[str, torch.Tensor]:
    state = {k: v.clone() for k, v in q.state_dict().items()} | changes
    return {k: v for k, v in state.items() if v is not None}


BAD_STATES = {
    "float": (
        {"weight": torch.zeros(30, 40)},
        "expected an int8 weight, got float32: load a float",
    ),
    "shape": ({"weight": torch.zeros(30, 41, dtype=torch.int8)}, "expected weight [30, 40] int8"),
    "scale": ({"weight_scale": torch.zeros(29)}, "expected weight_scale [30] float32"),
    "scale-dtype": ({"weight_scale": torch.zeros(30).half()}, "expected weight_scale [30] float32"),
    "version": ({"int8_format": torch.tensor([2], dtype=torch.int32)}, "version 1, got 2"),
    "version-dtype": ({"int8_format": torch.tensor([1.0])}, "expected int8_format int32 [1]"),
    "no-scale": ({"weight_scale": None}, "expected 0.weight_scale beside the others"),
    "no-version": ({"int8_format": None}, "expected 0.int8_format beside the others"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_bad_checkpoint_changes_nothing(case: str) -> None:
    changes, message = BAD_STATES[case]
    _, q = make()
    model = nn.Sequential(q)
    before = copy.deepcopy(q)
    state = {f"0.{k}": v for k, v in bad_state(q, **changes).items()}
    state["0.bias"] = torch.full((30,), 7.0)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        model.load_state_dict(state)
    same(q, before)


def test_missing_checkpoint_is_named() -> None:
    _, q = make()
    with pytest.raises(RuntimeError, match="Missing key.*weight.*weight_scale.*int8_format"):
        q.load_state_dict({"bias": torch.zeros(30)})
    result = q.load_state_dict({}, strict=False)
    assert set(result.missing_keys) == {"weight", "weight_scale", "int8_format", "bias"}


def test_lora_on_top_trains(generator) -> None:
    _, q = make()
    for parameter in q.parameters():
        parameter.requires_grad_(False)
    down, up = nn.Linear(40, 4, bias=False), nn.Linear(4, 30, bias=False)
    nn.init.zeros_(up.weight)
    first = nn.Linear(40, 40)  # below: its gradient comes through the int8 layer
    optimizer = torch.optim.Adam([*down.parameters(), *up.parameters(), *first.parameters()], 0.01)
    x, target = torch.randn(64, 40, generator=generator), torch.randn(64, 30, generator=generator)
    losses = []
    for _ in range(60):
        h = first(x)
        loss = ((q(h) + up(down(h))) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert first.weight.grad is not None and first.weight.grad.abs().sum() > 0
    assert losses[-1] < 0.7 * losses[0]


def test_bias_gradient_and_no_grad() -> None:
    _, q = make()
    x = torch.randn(5, 40)
    q(x).sum().backward()
    assert torch.equal(q.bias.grad, torch.full((30,), 5.0))
    with torch.no_grad():
        assert not q(x).requires_grad
    with torch.inference_mode():
        assert not q(x).requires_grad


def test_compile_and_export(generator) -> None:
    _, q = make()
    model = nn.Sequential(q, nn.ReLU(), Int8Linear.from_float(nn.Linear(30, 20), "gelu"))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for M in (2, 3, 5, 8, 13, 21, 34, 55):
        x = torch.randn(M, 40, generator=generator)
        cases.assert_same_bits(compiled(x), model(x))
    assert counter.frame_count <= 2
    x = torch.randn(4, 40, generator=generator)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    more = torch.randn(9, 40, generator=generator)
    cases.assert_same_bits(program.module()(more), model(more))


def test_autocast(generator) -> None:
    _, q = make()
    x = torch.randn(3, 40, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = q(x)
    assert y.dtype == torch.bfloat16
    cases.assert_same_bits(y, q(x.bfloat16()))


def test_bad_construction() -> None:
    with pytest.raises(TypeError, match=r"Int8Linear: expected an nn.Linear, got Conv2d"):
        Int8Linear.from_float(nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match="Int8Linear: expected activation in"):
        Int8Linear(4, 4, activation="swish")
    with pytest.raises(RuntimeError, match="float64"):
        Int8Linear.from_float(nn.Linear(4, 4).double())
    _, q = make()
    with pytest.raises(
        RuntimeError, match="int8_linear: expected a packed weight of 2368 bytes.*the K=41"
    ):
        q(torch.zeros(2, 41))


def test_repr() -> None:
    layer = Int8Linear.from_float(nn.Linear(4, 3), "silu")
    text = "Int8Linear(in_features=4, out_features=3, bias=True, activation=silu)"
    assert repr(layer) == text


def on_a_gpu(q: Int8Linear) -> Int8Linear:
    """A copy whose weight lies as on a GPU, in padded rows; the CPU's kernels read that too."""
    other = copy.deepcopy(q)
    other._buffers["packed"] = padded_rows(q.int8_weight())
    return other


def test_padded_rows() -> None:
    """Rows start on whole 16 bytes, with zeros between; nothing is copied where they do already."""
    for N, K in ((5, 33), (1, 1), (3, 16), (2, 48), (0, 7), (4, 0)):
        weight = torch.randint(-127, 128, (N, K), dtype=torch.int8)
        padded = padded_rows(weight)
        assert torch.equal(padded, weight) and padded.stride(1) == 1
        if N and K:
            assert padded.stride(0) % 16 == 0 and padded.stride(0) < K + 16
        assert padded_rows(padded) is padded
        if K % 16 == 0:
            assert padded.data_ptr() == weight.data_ptr()
        elif N:
            whole = torch.as_strided(padded, (N, padded.stride(0)), (padded.stride(0), 1))
            assert not whole[:, K:].any()
    turned = torch.randint(-127, 128, (32, 5), dtype=torch.int8).t()
    assert padded_rows(turned).is_contiguous() and torch.equal(padded_rows(turned), turned)


def test_padded_weight_is_an_ordinary_one() -> None:
    """Copies, pickles, checkpoints and moves of a layer as it lies on a GPU."""
    _, q = make()
    padded = on_a_gpu(q)
    assert padded.packed.stride() == (48, 1) and padded.packed.shape == (30, 40)
    held = sum(t.numel() * t.element_size() for t in (q.weight_scale, q.bias))
    assert padded.resident_bytes() == 30 * 48 + held
    same(padded, q)
    assert torch.equal(padded.weight, q.weight)
    state = padded.state_dict()
    for name, value in q.state_dict().items():
        assert state[name].is_contiguous() and torch.equal(state[name], value)
    saved = io.BytesIO()
    torch.save(padded, saved)
    saved.seek(0)
    for other in (copy.deepcopy(padded), torch.load(saved, weights_only=False)):
        assert other.packed.stride() == (48, 1)
        same(other, q)
    assert copy.deepcopy(padded).to("meta").packed.stride() == (48, 1)
    other = Int8Linear(40, 30)
    other.load_state_dict(state)
    same(other, q)
    same(padded.to(torch.bfloat16), copy.deepcopy(q).to(torch.bfloat16))
