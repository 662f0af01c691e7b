"""SparseLinear: its answers, training, checkpoints (corrupt ones too), copies, moves, compile, errors."""

from __future__ import annotations

import copy
import io
import re
import shutil

import cases
import cuda_sim
import pytest
import torch
import torch._dynamo.testing
from sparse_cases import BLOCK, PATTERNS, assert_near, mask_of, pruned
from torch import Tensor, nn

import trimtab.optim
from trimtab import ops
from trimtab.nn import Int8Linear, SparseLinear, sparse_weight

FORMATS = [(pattern, int8) for pattern in PATTERNS for int8 in (False, True)]


def format_id(value: tuple) -> str:
    return value[0] + ("-int8" if value[1] else "")


each_format = pytest.mark.parametrize("form", FORMATS, ids=format_id)
each_pattern = pytest.mark.parametrize("pattern", PATTERNS)


def make(
    form: tuple[str, bool] = ("bitmap", False),
    K: int = 80,
    N: int = 52,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    activation: str = "none",
) -> tuple[nn.Linear, SparseLinear]:
    torch.manual_seed(0)
    dense = pruned(nn.Linear(K, N, bias=bias, dtype=dtype), form[0])
    options = {"pattern": form[0], "block": BLOCK, "int8": form[1]}
    return dense, SparseLinear.from_float(dense, activation, **options)


def inputs(K: int = 80, dtype: torch.dtype = torch.float32, rows: int = 5) -> Tensor:
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(1)).to(dtype)


def same(a: SparseLinear, b: SparseLinear, K: int = 80) -> None:
    x = inputs(K, a.dtype)
    with torch.no_grad():
        cases.assert_same_bits(a(x), b(x))


def blank(like: SparseLinear) -> SparseLinear:
    return SparseLinear(
        like.in_features, like.out_features, like.bias is not None, dtype=like.dtype,
        pattern=like.pattern, block=like.block, int8=like.int8,
    )  # fmt: skip


# --- answers


@each_pattern
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ident)
@pytest.mark.parametrize("K,N", [(80, 52), (131, 37), (65, 16)], ids=["even", "odd", "4n+1"])
def test_float(isa: str, pattern: str, dtype: torch.dtype, K: int, N: int) -> None:
    dense, layer = make((pattern, False), K, N, dtype)
    assert torch.equal(layer.weight, dense.weight) and layer.bias is dense.bias
    for shape in ((7, K), (2, 3, K), (K,), (0, K), (40, K)):
        x = inputs(K, dtype, torch.Size(shape[:-1]).numel()).reshape(shape)
        want = x.double() @ dense.weight.double().T + dense.bias.double()
        assert_near(layer(x).detach(), x, dense.weight, want.detach(), K)


@each_pattern
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("K", [80, 133])
def test_int8_has_the_bits_of_the_dense_int8_layer(
    isa: str, pattern: str, activation: str, K: int
) -> None:
    dense, layer = make((pattern, True), K, activation=activation)
    same(layer, Int8Linear.from_float(dense, activation), K)
    assert torch.equal(layer.weight, Int8Linear.from_float(dense).weight)


@each_pattern
def test_activation_and_strides(pattern: str) -> None:
    dense, layer = make((pattern, False), bias=False, activation="relu")
    x = inputs(52 * 2, rows=80).t()[::2]
    want = torch.relu(x.double() @ dense.weight.double().T).detach()
    assert_near(layer(x).detach(), x, dense.weight, want, 80)


def test_a_pruned_weight_is_not_evaluated() -> None:
    dense, layer = make()
    x = inputs()
    x[:, 3] = float("inf")
    out = layer(x).detach()
    reached = dense.weight[:, 3] != 0
    assert torch.isfinite(out[:, ~reached]).all() and out[:, reached].isinf().all()


@each_format
def test_empty_sizes(form: tuple) -> None:
    pattern, int8 = form
    for K, N in ((0, 4), (4, 0), (0, 0), (3, 5)):
        layer = SparseLinear(K, N, pattern=pattern, block=BLOCK, int8=int8)
        with torch.no_grad():
            assert torch.equal(layer(torch.randn(3, K)), torch.zeros(3, N))


# --- memory


@each_format
def test_one_copy_is_resident(form: tuple) -> None:
    _dense, layer = make(form, 1024, 512)
    held = sum(t.numel() * t.element_size() for t in [*layer.buffers(), *layer.parameters()])
    assert held == layer.resident_bytes() < 4 * 1024 * 512 + 4 * 512


@pytest.mark.parametrize("pattern", ["bitmap", "block"])
def test_larger_than_dense_is_refused(pattern: str) -> None:
    dense = nn.Linear(64, 64)
    with pytest.raises(
        ValueError, match=rf"SparseLinear: expected a weight that {pattern}.* smaller"
    ):
        SparseLinear.from_float(dense, pattern=pattern, block=(32, 32))


# --- masks


@each_pattern
def test_mask_keeps_zeros_that_may_train(pattern: str) -> None:
    dense = nn.Linear(80, 52)
    mask = mask_of(dense.weight.shape, pattern)
    with torch.no_grad():
        dense.weight[mask & (torch.rand(mask.shape) < 0.2)] = 0
    layer = SparseLinear.from_float(dense, pattern=pattern, block=BLOCK, mask=mask)
    assert torch.equal(layer.weight, dense.weight * mask)
    if pattern == "bitmap":
        assert layer.values.numel() == int(mask.sum())
    dense.register_buffer("weight_mask", mask)  # as trimtab.prune leaves it
    same(layer, SparseLinear.from_float(dense, pattern=pattern, block=BLOCK))


# --- training


@each_pattern
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_gradients(pattern: str, activation: str) -> None:
    dense, layer = make((pattern, False), activation=activation)
    x, g = inputs().requires_grad_(), torch.randn(5, 52)
    layer(x).backward(g)
    got = x.grad, layer.values.grad, layer.bias.grad
    x.grad = layer.bias.grad = None
    out = dense(x)
    (out if activation == "none" else nn.functional.silu(out)).backward(g)
    kept = layer.float_weight().detach() * 0
    torch.testing.assert_close(got[0], x.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[2], dense.bias.grad, rtol=1e-4, atol=1e-5)
    parts = layer.parts() | {"values": got[1]}
    layer.values.data.copy_(parts["values"])  # the gradient as a weight: where it stands
    grad = layer.weight.detach()
    at = grad != kept
    torch.testing.assert_close(grad[at], dense.weight.grad[at], rtol=1e-4, atol=1e-5)
    assert int(at.sum()) >= int((dense.weight != 0).sum()) - 3


@each_pattern
@pytest.mark.parametrize(
    "optimizer", [torch.optim.AdamW, trimtab.optim.AdamW], ids=["torch", "trimtab"]
)
def test_trains(pattern: str, optimizer: type) -> None:
    dense, layer = make((pattern, False), 32, 24)
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(24, 8))
    steps = optimizer(model.parameters(), lr=0.02)
    pruned_places = dense.weight == 0 if pattern == "bitmap" else None
    generator = torch.Generator().manual_seed(2)
    x, target = torch.randn(64, 32, generator=generator), torch.randn(64, 8, generator=generator)
    losses = []
    for _ in range(30):
        loss = (model(x) - target).square().mean()
        steps.zero_grad()
        loss.backward()
        steps.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert not torch.equal(layer.weight, dense.weight)
    if pruned_places is not None:
        assert not layer.weight[pruned_places].any()


@each_pattern
def test_int8_has_gradients_of_x_and_bias_alone(pattern: str) -> None:
    _dense, layer = make((pattern, True))
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    x = inputs().requires_grad_()
    layer(x).sum().backward()
    want = torch.ones(5, 52) @ layer.weight
    torch.testing.assert_close(x.grad, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.bias.grad, torch.full((52,), 5.0))
    with torch.inference_mode():
        assert not layer(x).requires_grad


# --- checkpoints

SAVED = {"bitmap": {"bitmap"}, "2:4": {"indices"}, "block": {"crow", "col"}}


@each_format
def test_state_dict_is_canonical(form: tuple) -> None:
    dense, layer = make(form)
    pattern, int8 = form
    state = layer.state_dict()
    scale = {"weight_scale"} if int8 else set()
    assert set(state) == {"values", "bias", "sparse_format", *SAVED[pattern], *scale}
    assert state["sparse_format"].tolist() == [1, PATTERNS.index(pattern), 52, 80]
    weight = ops.quantize_int8(dense.weight.detach())[0] if int8 else dense.weight.detach()
    if pattern == "2:4":
        values, indices = ops.sparse24_compress(dense.weight)
        assert torch.equal(state["indices"], indices)
        assert int8 or torch.equal(state["values"], values)
        assert torch.equal(ops.sparse24_unpack(state["values"], indices, 80), weight)
    elif pattern == "block":
        want = ops.block_pack(weight, BLOCK)
        assert all(torch.equal(state[n], t) for n, t in zip(("values", "crow", "col"), want))
    else:
        assert torch.equal(state["values"], weight[weight != 0])
    assert not any(part.requires_grad for part in state.values())


@each_format
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_torch_save_weights_only(form: tuple, assign: bool) -> None:
    _, layer = make(form)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh = blank(layer)
    values = fresh._parameters.get("values")
    fresh.load_state_dict(torch.load(buffer, weights_only=True), assign=assign)
    same(layer, fresh)
    if values is not None and not assign:
        assert fresh.values is values  # an optimizer that holds it still does
    again = {name: part.clone() for name, part in layer.state_dict().items()}
    fresh.load_state_dict(again)
    again["values"].zero_()
    same(layer, fresh)


@each_format
def test_safetensors(form: tuple, tmp_path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    _, layer = make(form)
    safetensors.save_file(layer.state_dict(), tmp_path / "s.safetensors")
    fresh = blank(layer)
    fresh.load_state_dict(safetensors.load_file(tmp_path / "s.safetensors"))
    same(layer, fresh)


@each_format
def test_deepcopy_and_pickle(form: tuple) -> None:
    _, layer = make(form)
    same(layer, copy.deepcopy(layer))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    same(layer, torch.load(buffer, weights_only=False))


def test_a_float_checkpoint_of_another_dtype_is_cast() -> None:
    _, layer = make()
    half = copy.deepcopy(layer).to(torch.bfloat16)
    fresh = blank(layer)
    fresh.load_state_dict(half.state_dict())
    assert fresh.values.dtype == torch.float32
    assert torch.equal(fresh.values, half.values.float())


def set_at(tensor: Tensor, index: object, value: float) -> Tensor:
    changed = tensor.clone()
    changed[index] = value
    return changed


def two_bits_in_one_group(state: dict) -> dict:
    return {"indices": set_at(state["indices"], (2, 3), 0x45)}


BAD: dict[str, tuple[tuple[str, bool], object, str]] = {
    "popcount": (
        ("bitmap", False),
        lambda s: {"bitmap": set_at(s["bitmap"], (5, 0), int(s["bitmap"][5, 0]) ^ 1)},
        "as many values as bits",
    ),
    "values-cut": (("bitmap", False), lambda s: {"values": s["values"][:-1]}, "as many values"),
    "bit-past-K": (
        ("bitmap", False),
        lambda s: {"bitmap": set_at(s["bitmap"], (7, 15), 128)},
        "no bit past K=80, found one in row 7",
    ),
    "bitmap-rows": (("bitmap", False), lambda s: {"bitmap": s["bitmap"][:-1]}, "bitmap of 52 rows"),
    "bitmap-dtype": (("bitmap", False), lambda s: {"bitmap": s["bitmap"].int()}, "bitmap uint8"),
    "nan": (
        ("bitmap", False),
        lambda s: {"values": set_at(s["values"], 17, float("nan"))},
        "expected no NaN, got one at values[17]",
    ),
    "nan-scale": (
        ("bitmap", True),
        lambda s: {"weight_scale": set_at(s["weight_scale"], 4, float("nan"))},
        "expected no NaN, got one at weight_scale[4]",
    ),
    "scale-shape": (
        ("block", True),
        lambda s: {"weight_scale": s["weight_scale"][:-1]},
        "expected weight_scale [52] float32, got [51] float32",
    ),
    "no-scale": (("2:4", True), lambda s: {"weight_scale": None}, "expected 0.weight_scale beside"),
    "float-for-int8": (
        ("bitmap", True),
        lambda s: {"values": s["values"].float()},
        "expected values of int8, got",
    ),
    "int8-for-float": (
        ("bitmap", False),
        lambda s: {"values": s["values"].to(torch.int8)},
        "expected values of float32, bfloat16 or float16, got",
    ),
    "indices": (("2:4", False), two_bits_in_one_group, "got byte 0x45 of indices at [2, 3]"),
    "indices-width": (("2:4", False), lambda s: {"indices": s["indices"][:, :-1]}, "indices [52, 10]"),
    "values-width": (("2:4", False), lambda s: {"values": s["values"][:, :-2]}, "values [N, 40]"),
    "crow-falls": (
        ("block", False),
        lambda s: {"crow": set_at(s["crow"], 3, 99)},
        "expected crow to rise",
    ),
    "crow-end": (
        ("block", False),
        lambda s: {"crow": set_at(s["crow"], -1, int(s["crow"][-1]) + 1)},
        "expected crow to rise",
    ),
    "col-wild": (("block", False), lambda s: {"col": set_at(s["col"], 2, 5)}, "expected col in [0, 5)"),
    "col-negative": (("block", False), lambda s: {"col": set_at(s["col"], 2, -1)}, "col in [0, 5)"),
    "block-shape": (
        ("block", False),
        lambda s: {"values": s["values"].flatten(1)[:, :, None]},
        "expected values [blocks, 4, 16]",
    ),
    "version": (
        ("bitmap", False),
        lambda s: {"sparse_format": set_at(s["sparse_format"], 0, 2)},
        "expected format version 1, got 2",
    ),
    "version-dtype": (
        ("bitmap", False),
        lambda s: {"sparse_format": s["sparse_format"].float()},
        "expected sparse_format int32 [4]",
    ),
    "pattern": (
        ("bitmap", False),
        lambda s: {"sparse_format": set_at(s["sparse_format"], 1, 2)},
        "expected pattern bitmap, got block",
    ),
    "shape": (
        ("bitmap", False),
        lambda s: {"sparse_format": set_at(s["sparse_format"], 3, 81)},
        "expected a weight of shape [52, 80], got [52, 81]",
    ),
    "no-version": (("bitmap", False), lambda s: {"sparse_format": None}, "expected 0.sparse_format"),
    "no-bitmap": (("bitmap", False), lambda s: {"bitmap": None}, "expected 0.bitmap beside"),
    "dense": (
        ("bitmap", False),
        lambda s: {"weight": torch.zeros(52, 80), "values": None, "bitmap": None},
        "got a dense one, [52, 80] float32: load a dense checkpoint into the dense model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoint_changes_nothing(case: str) -> None:
    form, change, message = BAD[case]
    _, layer = make(form)
    model, before = nn.Sequential(layer), copy.deepcopy(layer)
    state = layer.state_dict()
    state = {**state, **change(state), "bias": torch.full((52,), 7.0)}  # type: ignore[operator]
    state = {f"0.{name}": part for name, part in state.items() if part is not None}
    with pytest.raises(RuntimeError, match=re.escape(message)):
        model.load_state_dict(state)
    same(layer, before)


@each_format
def test_random_damage_is_refused_or_harmless(form: tuple) -> None:
    """Bytes of the structure changed at random: an error and no change, or a sound weight."""
    _, layer = make(form)
    generator = torch.Generator().manual_seed(3)
    good, x = layer.state_dict(), inputs()
    refused = 0
    for _ in range(60):
        state = {name: part.clone() for name, part in good.items()}
        names = sorted(SAVED[form[0]] | {"sparse_format"})
        name = names[int(torch.randint(len(names), (), generator=generator))]
        raw = state[name].view(torch.uint8).view(-1)
        at = int(torch.randint(raw.numel(), (), generator=generator))
        raw[at] ^= int(torch.randint(1, 256, (), generator=generator))
        other, before = blank(layer), torch.zeros(5, 52)
        try:
            other.load_state_dict(state)
        except RuntimeError:
            refused += 1
            assert torch.equal(other(x).detach(), before)  # as it was: empty
        else:
            assert torch.isfinite(other(x)).all() and other.weight.shape == (52, 80)
    assert refused > 20


def test_missing_checkpoint_is_named() -> None:
    _, layer = make()
    with pytest.raises(RuntimeError, match="Missing key.*values.*bitmap.*sparse_format"):
        layer.load_state_dict({"bias": torch.zeros(52)})
    result = layer.load_state_dict({}, strict=False)
    assert set(result.missing_keys) == {"values", "bitmap", "sparse_format", "bias"}
    state = layer.state_dict() | {"extra": torch.zeros(1)}
    with pytest.raises(RuntimeError, match="Unexpected key.*extra"):
        layer.load_state_dict(state)


# --- moves


@each_format
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ident)
def test_to_dtype(form: tuple, dtype: torch.dtype) -> None:
    dense, layer = make(form)
    scale = layer.weight_scale.clone() if form[1] else None
    layer.to(dtype)
    assert layer.bias.dtype == layer.weight.dtype == layer.dtype == dtype
    if scale is not None:
        assert layer.weight_scale.dtype == torch.float32 and torch.equal(layer.weight_scale, scale)
        assert layer.values.dtype == torch.int8
    else:
        assert torch.equal(layer.weight, dense.weight.to(dtype))
    assert layer(inputs(dtype=dtype)).dtype == dtype


@each_format
def test_meta_and_back(form: tuple) -> None:
    _, layer = make(form)
    state = layer.state_dict()
    meta = copy.deepcopy(layer).to("meta")
    assert all(t.device.type == "meta" for t in [*meta.buffers(), *meta.parameters()])
    assert meta(torch.randn(3, 80, device="meta")).shape == (3, 52)
    with torch.device("meta"):
        born = SparseLinear(80, 52, pattern=form[0], block=BLOCK, int8=form[1])
    for module in (meta, born):
        ready = module.to_empty(device="cpu")
        if ready.values.numel() and form[0] != "block":
            with pytest.raises(
                RuntimeError, match="values"
            ):  # nothing loaded yet: refused, not read
                ready(inputs())
        ready.load_state_dict(state)
        same(layer, ready.eval())
    assigned = SparseLinear(80, 52, device="meta", pattern=form[0], block=BLOCK, int8=form[1])
    assigned.load_state_dict(state, assign=True)
    same(layer, assigned)


# --- compile, export, autocast


@pytest.mark.parametrize(
    "form", [("bitmap", False), ("2:4", True), ("block", False)], ids=format_id
)
def test_compile_and_export(form: tuple, generator) -> None:
    model = nn.Sequential(make(form)[1], nn.ReLU(), make(form, 52, 20, activation="gelu")[1])
    model.requires_grad_(False)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for M in (2, 3, 5, 8, 13):
        x = torch.randn(M, 80, generator=generator)
        cases.assert_same_bits(compiled(x), model(x))
    assert counter.frame_count <= 2
    x = torch.randn(4, 80, generator=generator)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    more = torch.randn(9, 80, generator=generator)
    cases.assert_same_bits(program.module()(more), model(more))


@each_pattern
def test_compiled_training(pattern: str) -> None:
    _, layer = make((pattern, False))
    x = inputs()
    layer(x).square().sum().backward()
    want, layer.values.grad = layer.values.grad, None
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    torch.testing.assert_close(layer.values.grad, want)


@each_format
def test_autocast(form: tuple) -> None:
    _, layer = make(form)
    x = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    half = copy.deepcopy(layer).to(torch.bfloat16)
    half.register_parameter("bias", layer.bias)
    cases.assert_same_bits(y, half(x.bfloat16()))


# --- GPUs


@pytest.mark.parametrize("form", [torch.bfloat16, torch.int8], ids=cases.ident)
def test_two_of_four_on_tensor_cores(monkeypatch, form: torch.dtype) -> None:
    """As on a GPU, by the simulator: values and metadata, the CPU's checkpoint, the same answers."""
    if shutil.which(cuda_sim.compiler()) is None:
        pytest.skip(f"no {cuda_sim.compiler()} to compile csrc/cuda with")
    int8 = form == torch.int8
    dense, layer = make(("2:4", int8), 84, 20, torch.bfloat16)
    assert "metadata" not in layer._buffers
    x, state = inputs(84, torch.bfloat16).requires_grad_(), layer.state_dict()
    monkeypatch.setattr(sparse_weight, "TENSOR_CORES", ("cuda", "cpu"))
    other = SparseLinear(84, 20, dtype=torch.bfloat16, pattern="2:4", int8=int8)
    other.load_state_dict(state)
    other = copy.deepcopy(other).to(torch.bfloat16)
    assert other.metadata.dtype == torch.int32
    assert all(torch.equal(part, state[name]) for name, part in other.state_dict().items())
    with cuda_sim.as_cpu(cuda_sim.Simulator()):
        out = other(x)
        out.sum().backward()
    if int8:
        cases.assert_same_bits(out, layer(x))
    else:
        want = x.double() @ dense.weight.double().T + dense.bias.double()
        assert_near(out.detach(), x, dense.weight, want.detach(), 84)
        assert other.values.grad.shape == other.values.shape
    monkeypatch.undo()
    assert "metadata" not in other.to(torch.bfloat16)._buffers
    meta = copy.deepcopy(other).to("meta")
    monkeypatch.setattr(sparse_weight, "TENSOR_CORES", ("cuda", "cpu"))
    assert meta.to_empty(device="cpu").metadata.shape == (2, 2, 32)


# --- errors


def test_bad_construction() -> None:
    with pytest.raises(TypeError, match=r"SparseLinear: expected an nn.Linear, got Conv2d"):
        SparseLinear.from_float(nn.Conv2d(1, 1, 1))
    with pytest.raises(
        ValueError, match=r"SparseLinear: expected pattern in .*'bitmap'.*, got '3:4'"
    ):
        SparseLinear(4, 4, pattern="3:4")
    with pytest.raises(ValueError, match=r"SparseLinear: expected block as .* got \(0, 4\)"):
        SparseLinear(4, 4, pattern="block", block=(0, 4))
    with pytest.raises(ValueError, match="SparseLinear: expected activation in"):
        SparseLinear(4, 4, activation="swish")
    with pytest.raises(
        RuntimeError, match="SparseLinear: expected weight of float32.*got.*float64"
    ):
        SparseLinear.from_float(nn.Linear(4, 4).double())
    mask = torch.ones(4, 5, dtype=torch.bool)
    with pytest.raises(
        RuntimeError, match=r"SparseLinear: expected mask \[4, 4\] bool, got \[4, 5\]"
    ):
        SparseLinear.from_float(nn.Linear(4, 4), mask=mask)
    _, layer = make()
    with pytest.raises(RuntimeError, match="bitmap_linear: expected"):
        layer(torch.zeros(2, 200))


@each_pattern
def test_nan_is_named(pattern: str) -> None:
    dense = pruned(nn.Linear(80, 52), pattern)
    with torch.no_grad():
        dense.weight[3, 7] = float("nan")
        dense.weight[9, 1] = float("nan")
    with pytest.raises(ValueError, match=r"expected weights without NaN, got weight\[3, 7\]"):
        SparseLinear.from_float(dense, pattern=pattern, block=BLOCK)


def test_a_misfit_is_named_by_its_first_position() -> None:
    dense = pruned(nn.Linear(80, 52), "2:4")
    with torch.no_grad():
        dense.weight[5, 8:12] = torch.tensor([1.0, -0.0, 2.0, 3.0])
        dense.weight[30] = 1
    message = r"at most 2 of each 4 .* third at weight\[5, 11\]: row 5, columns 8 to 11; prune"
    before = dense.weight.clone()
    with pytest.raises(ValueError, match=message):
        SparseLinear.from_float(dense, pattern="2:4")
    assert torch.equal(dense.weight, before)


def test_repr() -> None:
    text = (
        "SparseLinear(in_features=80, out_features=52, bias=True, pattern=block, block=(4, 16), "
        "int8=True, sparsity="
    )
    assert repr(make(("block", True))[1]).startswith(text)
