"""SparseLinear: its answers, memory, masks, training, compile, GPUs, errors."""

from __future__ import annotations

import copy
import shutil

import cases
import cuda_sim
import pytest
import simt_build
import torch
import torch._dynamo.testing
from sparse_cases import BLOCK, assert_near, mask_of, pruned
from sparse_linear_cases import each_format, each_pattern, format_id, inputs, make, same
from torch import nn

import trimtab.optim
from trimtab import prune
from trimtab.nn import Int8Linear, SparseLinear, sparse_weight

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
    prune.set_mask_(dense, "weight", mask)
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
    if shutil.which(simt_build.compiler()) is None:
        pytest.skip(f"no {simt_build.compiler()} to compile csrc/cuda with")
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
    for block, got in (((0, 4), r"\(0, 4\)"), (32, "32"), (None, "None"), ((True, 4), "")):
        with pytest.raises(ValueError, match=f"SparseLinear: expected block as .* got {got}"):
            SparseLinear(4, 4, pattern="block", block=block)
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
    with pytest.raises(RuntimeError, match=r"expected mask \[4, 4\] bool, got list"):
        SparseLinear.from_float(nn.Linear(4, 4), mask=[True])  # type: ignore[arg-type]


@each_pattern
def test_x_of_another_width(pattern: str) -> None:
    """Of 81 inputs too, for which rows of 80 bits and their padding have room."""
    _, layer = make((pattern, False))
    for shape in ((2, 200), (2, 81), (79,), ()):
        with pytest.raises(RuntimeError, match=r"SparseLinear: expected x \[..., 80\], got \["):
            layer(torch.zeros(shape))


@each_format
def test_reset_parameters(form: tuple) -> None:
    _, layer = make(form)
    before = copy.deepcopy(layer.state_dict())
    if form[1]:
        with pytest.raises(RuntimeError, match="SparseLinear.reset_parameters: .* got int8"):
            layer.reset_parameters()
    else:
        layer.reset_parameters()
        assert 0 < layer.values.abs().max() <= 80**-0.5 and layer.bias.abs().max() <= 80**-0.5
    after = layer.state_dict()
    for name, part in before.items():
        assert torch.equal(part, after[name]) == (form[1] or name not in ("values", "bias"))


@each_pattern
def test_nan_is_named(pattern: str) -> None:
    dense = pruned(nn.Linear(80, 52), pattern)
    with torch.no_grad():
        dense.weight[3, 7] = float("nan")
        dense.weight[9, 1] = float("nan")
    with pytest.raises(ValueError, match=r"expected weights without NaN, got weight\[3, 7\]"):
        SparseLinear.from_float(dense, pattern=pattern, block=BLOCK)
    with torch.no_grad():
        dense.weight[3, 7] = float("inf")
    with pytest.raises(ValueError, match=r"NaN or Inf, which int8 cannot hold, got weight\[3, 7\]"):
        SparseLinear.from_float(dense, pattern=pattern, block=BLOCK, int8=True)


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


def test_a_mask_that_training_left_behind() -> None:
    """Its weights came back, as nothing held them: what stands there is not dropped in silence."""
    dense = nn.Linear(80, 52)
    prune.magnitude_(dense, 0.8)
    row, column = (~dense.weight_mask).nonzero()[7].tolist()
    with torch.no_grad():
        dense.weight[row, column] = 1e-3
    message = rf"zeros where weight_mask prunes, got weight\[{row}, {column}\]: hold_ the mask"
    with pytest.raises(ValueError, match=message):
        SparseLinear.from_float(dense)
    report = trimtab.swap_(nn.Sequential(dense), trimtab.Sparse())
    assert "zeros where weight_mask prunes" in report["0"].reason
    assert SparseLinear.from_float(dense, mask=dense.weight_mask).weight[row, column] == 0
    prune.finalize_(dense)
    assert SparseLinear.from_float(dense).weight[row, column] == 0


def test_repr() -> None:
    text = (
        "SparseLinear(in_features=80, out_features=52, bias=True, pattern=block, block=(4, 16), "
        "int8=True, sparsity="
    )
    assert repr(make(("block", True))[1]).startswith(text)
