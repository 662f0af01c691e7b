"""Int8Linear(weight_only=True): symmetric and affine weights, checkpoints, copies, moves, errors."""

from __future__ import annotations

import copy
import io
import re

import cases
import pytest
import torch
from torch import nn

import trimtab
from trimtab import ops
from trimtab.nn import Int8Linear, Int8WeightOnlyLinear

K, N = 40, 30
SCHEMES = {
    "symmetric": {},
    "4-bit": {"bits": 4},
    "8-bit-groups": {"group_size": 16},  # 16, 16 and 8
    "3-bit-groups": {"bits": 3, "group_size": 8},
    "one-group": {"group_size": K},
}
scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
affine = pytest.mark.parametrize(
    "scheme", [s for s in SCHEMES.values() if s], ids=[k for k, s in SCHEMES.items() if s]
)


def make(scheme: dict, dtype: torch.dtype = torch.float32, bias: bool = True):
    torch.manual_seed(0)
    layer = nn.Linear(K, N, bias=bias, dtype=dtype).eval()
    return layer, Int8Linear.from_float(layer, weight_only=True, **scheme)


def same(a: nn.Module, b: nn.Module) -> None:
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(1)).to(a.dtype)
    cases.assert_same_bits(a(x), b(x))


@scheme
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ident)
def test_forward(isa: str, scheme: dict, dtype: torch.dtype, bias: bool, generator) -> None:
    """The product with the weight it says it stands for; x is not quantized."""
    layer, q = make(scheme, dtype, bias)
    x = torch.randn(2, 7, K, generator=generator).to(dtype)
    assert isinstance(q, Int8Linear) and isinstance(q, nn.Linear) and not q.training
    assert q.bias is layer.bias and q(x).dtype == dtype
    plain = copy.deepcopy(q)
    plain.dtype = torch.float32
    want = x.double() @ plain.weight.double().t()
    if bias:
        want = want + layer.bias.double()
    error = (q(x).double() - want).norm() / want.norm()
    assert error <= 2 * K**0.5 * 2**-24 + torch.finfo(dtype).eps


@scheme
def test_weight_is_within_half_a_step(scheme: dict) -> None:
    layer, q = make(scheme)
    groups = q.weight_scale.reshape(-1, N).t()
    step = groups.repeat_interleave(q.group_size or K, dim=1)[:, :K]
    error = (q.weight - layer.weight).abs() / step
    # At the very end of an affine range both ends may round outwards: another half step.
    assert error.max() <= (1.001 if q._affine else 0.5001)
    assert error.mean() < 0.3


def test_symmetric_weight_is_int8linears() -> None:
    layer, q = make({})
    cases.assert_same_bits(q.weight, Int8Linear.from_float(layer).weight)


def test_smaller_groups_and_more_bits_are_nearer() -> None:
    def error(**scheme: int) -> float:
        layer, q = make(scheme)
        return float((q.weight - layer.weight.detach()).norm())

    by_bits = [error(bits=bits) for bits in range(2, 9)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert error(bits=4, group_size=8) < error(bits=4, group_size=20) < error(bits=4)


@affine
def test_codes_stay_in_their_bits(scheme: dict) -> None:
    _, q = make(scheme)
    half = 2 ** (scheme.get("bits", 8) - 1)
    codes = q.int8_weight()
    assert int(codes.min()) == -half and int(codes.max()) == half - 1
    assert q.zero_point.dtype == torch.int8 and q.zero_point.shape == q.weight_scale.shape


@scheme
def test_resident_bytes_are_all_there_is(scheme: dict) -> None:
    _, q = make(scheme)
    held = sum(t.numel() * t.element_size() for t in [*q.buffers(), *q.parameters()])
    assert held == q.resident_bytes()


@scheme
def test_state_dict_is_canonical(scheme: dict) -> None:
    layer, q = make(scheme)
    state = q.state_dict()
    names = {"weight", "weight_scale", "bias", "int8_format"}
    if not scheme:
        assert set(state) == names and state["weight_scale"].shape == (N,)
        return
    assert set(state) == names | {"weight_zero_point"}
    groups = -(-K // scheme.get("group_size", K))
    assert state["weight_scale"].shape == state["weight_zero_point"].shape == (N, groups)
    half = 2 ** (scheme.get("bits", 8) - 1)
    codes, scale, zero = ops.quantize_affine(
        layer.weight.detach(), scheme.get("bits", 8), scheme.get("group_size")
    )
    assert torch.equal(state["weight"].int() + half, codes.int())
    assert torch.equal(state["weight_scale"], scale)
    assert torch.equal(state["weight_zero_point"].int() + half, zero.int())


@scheme
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_checkpoint_round_trip(scheme: dict, assign: bool) -> None:
    _, q = make(scheme)
    buffer = io.BytesIO()
    torch.save(q.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    fresh = Int8WeightOnlyLinear(K, N, **scheme)
    fresh.load_state_dict(state, assign=assign)
    same(q, fresh)
    for tensor in state.values():
        tensor.zero_()
    if not assign:
        same(q, fresh)


@scheme
def test_safetensors(scheme: dict, tmp_path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    _, q = make(scheme)
    safetensors.save_file(q.state_dict(), tmp_path / "q.safetensors")
    fresh = Int8WeightOnlyLinear(K, N, **scheme)
    fresh.load_state_dict(safetensors.load_file(tmp_path / "q.safetensors"))
    same(q, fresh)


@scheme
def test_deepcopy_and_pickle(scheme: dict) -> None:
    _, q = make(scheme)
    same(q, copy.deepcopy(q))
    buffer = io.BytesIO()
    torch.save(q, buffer)
    buffer.seek(0)
    same(q, torch.load(buffer, weights_only=False))


@scheme
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ident)
def test_to_dtype_keeps_codes_and_scales(scheme: dict, dtype: torch.dtype) -> None:
    _, q = make(scheme)
    before = {k: v.clone() for k, v in q.state_dict().items()}
    q.to(dtype)
    after = q.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before if k != "bias")
    assert q.bias.dtype == q.weight.dtype == dtype and q.weight_scale.dtype == torch.float32
    assert q(torch.randn(3, K).to(dtype)).dtype == dtype


@scheme
def test_meta_and_back(scheme: dict) -> None:
    _, q = make(scheme)
    state = q.state_dict()
    meta = copy.deepcopy(q).to("meta")
    assert all(t.device.type == "meta" for t in [*meta.buffers(), *meta.parameters()])
    assert meta(torch.randn(3, K, device="meta")).shape == (3, N)
    with torch.device("meta"):
        born = Int8WeightOnlyLinear(K, N, **scheme)
    for module in (meta, born):
        empty = module.to_empty(device="cpu")
        empty.load_state_dict(state)
        same(q, empty.eval())
    assigned = Int8WeightOnlyLinear(K, N, device="meta", **scheme)
    assigned.load_state_dict(state, assign=True)
    same(q, assigned)


BAD_STATES = {
    "no-zero-point": ({"weight_zero_point": None}, "expected weight_zero_point beside the others"),
    "zero-point-shape": (
        {"weight_zero_point": torch.zeros(N, 2, dtype=torch.int8)},
        f"expected weight_zero_point [{N}, 3] int8 for bits=8 and group_size=16, got [{N}, 2] int8",
    ),
    "zero-point-dtype": ({"weight_zero_point": torch.zeros(N, 3)}, f"[{N}, 3] float32"),
    "per-channel-scale": (
        {"weight_scale": torch.ones(N)},
        f"expected weight_scale [{N}, 3] float32",
    ),
    "float-weight": ({"weight": torch.zeros(N, K)}, "expected an int8 weight, got float32"),
    "version": ({"int8_format": torch.tensor([9], dtype=torch.int32)}, "version 1, got 9"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_bad_checkpoint_changes_nothing(case: str) -> None:
    changes, message = BAD_STATES[case]
    _, q = make(SCHEMES["8-bit-groups"])
    before = copy.deepcopy(q)
    state = {k: v.clone() for k, v in q.state_dict().items()} | changes
    state["bias"] = torch.full((N,), 7.0)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        q.load_state_dict({k: v for k, v in state.items() if v is not None})
    same(q, before)


def test_checkpoints_of_another_scheme_are_refused() -> None:
    _, symmetric = make({})
    _, grouped = make(SCHEMES["8-bit-groups"])
    with pytest.raises(
        RuntimeError, match="expected weight_zero_point beside|expected weight_scale"
    ):
        grouped.load_state_dict(symmetric.state_dict())
    for layer in (symmetric, Int8Linear(K, N)):
        with pytest.raises(RuntimeError, match=re.escape(f"expected weight_scale [{N}] float32")):
            layer.load_state_dict(grouped.state_dict())
    # A symmetric weight is Int8Linear's own.
    fresh = Int8Linear(K, N)
    fresh.load_state_dict(symmetric.state_dict())
    cases.assert_same_bits(fresh.weight, symmetric.weight)


def test_missing_checkpoint_is_named() -> None:
    _, q = make(SCHEMES["4-bit"])
    result = q.load_state_dict({}, strict=False)
    names = {"weight", "weight_scale", "weight_zero_point", "int8_format", "bias"}
    assert set(result.missing_keys) == names


@scheme
def test_lora_on_top_trains(scheme: dict, generator) -> None:
    _, q = make(scheme)
    low = nn.Linear(K, K, bias=False)
    x = torch.randn(4, K, generator=generator)
    q(low(x)).square().sum().backward()
    plain = nn.Linear(K, N)
    plain.load_state_dict({"weight": q.weight.detach(), "bias": q.bias.detach()})
    other = copy.deepcopy(low)
    other.zero_grad()
    plain(other(x)).square().sum().backward()
    torch.testing.assert_close(low.weight.grad, other.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(q.bias.grad, plain.bias.grad, rtol=1e-4, atol=1e-4)


@scheme
def test_compiles_and_exports(scheme: dict, generator) -> None:
    _, q = make(scheme)
    x = torch.randn(6, K, generator=generator)
    compiled = torch.compile(q, fullgraph=True, backend="aot_eager")
    cases.assert_same_bits(compiled(x), q(x))
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(q, (x,), dynamic_shapes=({0: batch},))
    cases.assert_same_bits(program.module()(x[:3]), q(x[:3]))


def test_activation_is_fused() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(K, N)
    x = torch.randn(4, K)
    q = Int8Linear.from_float(layer, "gelu", weight_only=True, bits=6)
    plain = Int8Linear.from_float(layer, weight_only=True, bits=6)
    torch.testing.assert_close(q(x), nn.functional.gelu(plain(x)), rtol=1e-5, atol=1e-6)


def test_bad_construction() -> None:
    layer = nn.Linear(K, N)
    for options, message in (
        ({"weight_only": True, "bits": 1}, "Int8Linear: expected bits in 2..8, got 1"),
        ({"weight_only": True, "bits": 16}, "Int8Linear: expected bits in 2..8, got 16"),
        ({"weight_only": True, "group_size": 6}, "expected group_size to be a multiple of 4"),
        ({"weight_only": True, "group_size": 0}, "expected group_size to be a multiple of 4"),
        ({"bits": 4}, "Int8Linear: expected weight_only=True with bits or group_size"),
        ({"group_size": 8}, "Int8Linear: expected weight_only=True with bits or group_size"),
        ({"weight_only": True, "activation": "tanh"}, "expected activation in"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            Int8Linear.from_float(layer, **options)
    with pytest.raises(ValueError, match="expected bits in 2..8, got 9"):
        Int8WeightOnlyLinear(K, N, bits=9)
    with pytest.raises(ValueError, match="expected weight_only=True, got False"):
        Int8WeightOnlyLinear.from_float(layer, weight_only=False)
    with pytest.raises(TypeError, match="expected an nn.Linear, got Conv1d"):
        Int8WeightOnlyLinear.from_float(nn.Conv1d(1, 1, 1))


def test_swap_passes_the_scheme_on() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, 256), nn.ReLU(), nn.Linear(256, 128)).eval()
    x = torch.randn(4, K)
    want, weights = model(x), [m.weight for m in (model[0], model[2])]
    config = trimtab.Int8(weight_only=True, bits=6, group_size=16)
    report = trimtab.swap_(model, config, lambda module, name: True)
    for layer in (model[0], model[2]):
        assert isinstance(layer, Int8WeightOnlyLinear)
        assert (layer.bits, layer.group_size) == (6, 16)
    assert (model(x) - want).norm() / want.norm() < 0.05
    report.undo()
    assert all(m.weight is w for m, w in zip((model[0], model[2]), weights))
    assert torch.equal(model(x), want)


def test_swap_refuses_a_scheme_without_weight_only() -> None:
    with pytest.raises(ValueError, match="Int8: expected weight_only=True with bits or group_size"):
        trimtab.Int8(bits=4)
    with pytest.raises(ValueError, match=r"Int8: expected bits in 2\.\.8, got 1"):
        trimtab.Int8(weight_only=True, bits=1)


def test_repr() -> None:
    text = repr(make({"bits": 4, "group_size": 8})[1])
    assert "weight_only=True" in text and "bits=4" in text and "group_size=8" in text
    assert "bits" not in repr(make({})[1])
