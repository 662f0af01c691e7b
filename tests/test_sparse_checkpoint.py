"""SparseLinear's checkpoints, corrupt ones too, copies, moves between dtypes and out of meta."""

from __future__ import annotations

import copy
import io
import re

import cases
import pytest
import torch
from sparse_cases import BLOCK, PATTERNS
from sparse_linear_cases import blank, each_format, inputs, make, same
from torch import Tensor, nn

from trimtab import ops
from trimtab.nn import SparseLinear, sparse_format

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
        values, indices = ops.sparse24_compress(dense.weight.detach())
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
    "bias-shape": (
        ("block", False),
        lambda s: {"values": s["values"] + 1, "bias": torch.zeros(51)},
        "size mismatch for 0.bias",
    ),
    "values-list": (
        ("bitmap", True),
        lambda s: {"values": s["values"].tolist()},
        "expected values as a dense tensor, got list",
    ),
    "values-sparse": (
        ("bitmap", True),
        lambda s: {"values": s["values"].to_sparse()},
        "expected values as a dense tensor, got torch.sparse_coo",
    ),
    "version-list": (
        ("bitmap", False),
        lambda s: {"sparse_format": [1, 0, 52, 80]},
        "expected sparse_format as a dense tensor",
    ),
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
    state = {**state, "bias": torch.full((52,), 7.0), **change(state)}  # type: ignore[operator]
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
        ready.bias.data.zero_()
        assert not ready(inputs()).any() and not ready.weight.any()  # nothing loaded yet
        ready.load_state_dict(state)
        same(layer, ready.eval())
    emptied = copy.deepcopy(layer).to_empty(
        device="cpu"
    )  # its values may be any, where they stand not
    for name in sparse_format.RESIDENT[form[0]]:
        assert torch.equal(getattr(emptied, name), getattr(layer, name))
    assigned = SparseLinear(80, 52, device="meta", pattern=form[0], block=BLOCK, int8=form[1])
    assigned.load_state_dict(state, assign=True)
    same(layer, assigned)
