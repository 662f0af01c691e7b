"""Int8Embedding and Int8EmbeddingBag: what a user does with them. Checkpoints, moves, compile, errors."""

from __future__ import annotations

import copy
import io
import re

import cases
import pytest
import torch
from torch import nn

from trimtab import ops
from trimtab.nn import Int8Embedding, Int8EmbeddingBag

KINDS = {"embedding": (nn.Embedding, Int8Embedding), "bag": (nn.EmbeddingBag, Int8EmbeddingBag)}
INDICES = torch.randint(0, 30, (6, 5), generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def make(kind: str, dtype: torch.dtype = torch.float32, **options):
    torch.manual_seed(0)
    plain, int8 = KINDS[kind]
    layer = plain(30, 20, dtype=dtype, **options).eval()
    return layer, int8.from_float(layer)


def same(a: nn.Module, b: nn.Module) -> None:
    cases.assert_same_bits(a(INDICES), b(INDICES))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.ident)
def test_forward(isa: str, kind: str, dtype: torch.dtype) -> None:
    layer, q = make(kind, dtype, padding_idx=3)
    table, scale = ops.quantize_int8(layer.weight.detach())
    if kind == "embedding":
        want = ops.int8_embedding(INDICES, table, scale, dtype)
        assert torch.equal(q(torch.tensor(3)), torch.zeros(20, dtype=dtype))
    else:
        want = ops.int8_embedding_bag(INDICES, table, scale, None, "mean", None, 3, False, dtype)
    for indices in (INDICES, INDICES.int()):
        cases.assert_same_bits(q(indices), want)
    expected = layer(INDICES).double()
    assert (want - expected).norm() / expected.norm() < 0.02
    assert isinstance(q, type(layer)) and not q.training and not q(INDICES).requires_grad
    assert q.weight.shape == layer.weight.shape and q.weight.dtype == dtype
    if dtype == torch.float32:  # half a step of the row's scale, and a little for its own rounding
        assert ((q.weight - layer.weight).abs() <= 0.5001 * q.weight_scale[:, None]).all()
    assert repr(q).removeprefix("Int8") == repr(layer)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("last", [False, True], ids=["offsets", "last-offset"])
def test_bag_offsets_and_samples(mode: str, last: bool) -> None:
    layer, q = make("bag", mode=mode, include_last_offset=last)
    flat = INDICES.reshape(-1)
    offsets = torch.tensor([0, 4, 4, 17, 30][: None if last else -1])
    samples = torch.rand(30) if mode == "sum" else None
    got, want = q(flat, offsets, samples), layer(flat, offsets, samples)
    assert got.shape == want.shape and (got - want).norm() / want.norm() < 0.02
    assert torch.equal(got[1], torch.zeros(20))


def test_one_copy_is_resident(kind: str) -> None:
    _, q = make(kind)
    held = sum(t.numel() * t.element_size() for t in [*q.buffers(), *q.parameters()])
    assert held == q.resident_bytes() == 30 * 20 + 30 * 4


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_checkpoint(kind: str, assign: bool) -> None:
    layer, q = make(kind)
    state = q.state_dict()
    table, scale = ops.quantize_int8(layer.weight.detach())
    assert set(state) == {"weight", "weight_scale", "int8_format"}
    assert torch.equal(state["weight"], table) and torch.equal(state["weight_scale"], scale)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    fresh = KINDS[kind][1](30, 20)
    fresh.load_state_dict(torch.load(buffer, weights_only=True), assign=assign)
    same(q, fresh)


def test_loading_copies_the_checkpoint(kind: str) -> None:
    _, q = make(kind)
    state = {k: v.clone() for k, v in q.state_dict().items()}
    fresh = KINDS[kind][1](30, 20)
    fresh.load_state_dict(state)
    state["weight"].zero_()
    same(q, fresh)


def test_safetensors_deepcopy_pickle(kind: str, tmp_path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    _, q = make(kind)
    safetensors.save_file(q.state_dict(), tmp_path / "q.safetensors")
    fresh = KINDS[kind][1](30, 20)
    fresh.load_state_dict(safetensors.load_file(tmp_path / "q.safetensors"))
    same(q, fresh)
    same(q, copy.deepcopy(q))
    buffer = io.BytesIO()
    torch.save(q, buffer)
    buffer.seek(0)
    same(q, torch.load(buffer, weights_only=False))


def test_to_dtype_and_meta(kind: str) -> None:
    _, q = make(kind)
    table, scale = q.packed.clone(), q.weight_scale.clone()
    state = {k: v.clone() for k, v in q.state_dict().items()}
    assert q.to(torch.bfloat16)(INDICES).dtype == torch.bfloat16
    assert torch.equal(q.packed, table) and torch.equal(q.weight_scale, scale)
    q.to(torch.float32)
    meta = copy.deepcopy(q).to("meta")
    assert all(t.device.type == "meta" for t in meta.buffers())
    assert meta(INDICES.to("meta")).shape == q(INDICES).shape
    with torch.device("meta"):
        born = KINDS[kind][1](30, 20)
    for module in (meta, born):
        empty = module.to_empty(device="cpu")
        empty.load_state_dict(state)
        same(q, empty)


def test_bad_checkpoint_changes_nothing(kind: str) -> None:
    _, q = make(kind)
    before = q(INDICES)
    for changes, message in (
        ({"weight": torch.zeros(30, 20)}, "expected an int8 weight, got float32"),
        ({"weight": torch.zeros(30, 21, dtype=torch.int8)}, "expected weight [30, 20] int8"),
        ({"int8_format": torch.tensor([7], dtype=torch.int32)}, "version 1, got 7"),
    ):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            q.load_state_dict({k: v.clone() for k, v in q.state_dict().items()} | changes)
        cases.assert_same_bits(q(INDICES), before)


def test_compile_and_export(kind: str) -> None:
    _, q = make(kind)
    torch._dynamo.reset()
    run = torch.compile(q, fullgraph=True)
    for rows in (2, 3, 6):
        cases.assert_same_bits(run(INDICES[:rows]), q(INDICES[:rows]))
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(q, (INDICES,), dynamic_shapes=({0: batch},))
    cases.assert_same_bits(program.module()(INDICES[:4]), q(INDICES[:4]))


def test_refusals(kind: str) -> None:
    plain, int8 = KINDS[kind]
    with pytest.raises(
        TypeError, match=f"{int8.__name__}: expected an nn.{plain.__name__}, got Lin"
    ):
        int8.from_float(nn.Linear(2, 3))
    with pytest.raises(ValueError, match="expected max_norm=None, got 1.0"):
        int8.from_float(plain(4, 5, max_norm=1.0))
    _, q = make(kind)
    with pytest.raises(RuntimeError, match=re.escape("expected indices in [0, 30)")):
        q(torch.full((2, 2), 30))
    if kind == "bag":
        with pytest.raises(ValueError, match="expected mode in .'sum', 'mean'., got 'max'"):
            int8.from_float(nn.EmbeddingBag(4, 5, mode="max"))
        samples = torch.ones(2, 2, requires_grad=True)
        bag = Int8EmbeddingBag(4, 5, mode="sum")
        with pytest.raises(RuntimeError, match="per_sample_weights requires grad"):
            bag(torch.zeros(2, 2).long(), None, samples)
