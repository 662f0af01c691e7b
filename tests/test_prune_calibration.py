"""Wanda and SparseGPT against their definitions, on every kind of layer; bad calibration data."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trimtab import prune
from trimtab.prune import calibration
from trimtab.prune.state import Target
from trimtab.reference import prune_masks as reference


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in b)


def wanda_mask(w: np.ndarray, x: np.ndarray, sparsity: float) -> np.ndarray:
    norms = np.sqrt((x.astype(np.float64) ** 2).sum(0)).astype(np.float32)
    return reference.largest_of_rows(np.abs(w) * norms, reference.kept(w.shape[1], sparsity))


def patches(conv: nn.Conv2d, x: torch.Tensor, group: int) -> np.ndarray:
    """Inputs [samples, K] of a group's filters, one output position at a time."""
    size = conv.in_channels // conv.groups
    x = F.pad(x, (conv.padding[1],) * 2 + (conv.padding[0],) * 2)
    x = x[:, group * size : (group + 1) * size]
    high, wide = ((k - 1) * d + 1 for k, d in zip(conv.kernel_size, conv.dilation))
    found = []
    for i in range(0, x.shape[2] - high + 1, conv.stride[0]):
        for j in range(0, x.shape[3] - wide + 1, conv.stride[1]):
            tile = x[:, :, i : i + high : conv.dilation[0], j : j + wide : conv.dilation[1]]
            found.append(tile.reshape(len(x), -1).numpy())
    return np.concatenate(found)


def test_wanda_of_a_linear_layer() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 11, 20) * torch.logspace(-1, 1, 20)
    for pattern, n, m in (("unstructured", 0, 0), ("2:4", 2, 4), ("1:3", 1, 3)):
        layer = nn.Linear(20, 9)
        w, flat = layer.weight.detach().numpy().copy(), x.reshape(-1, 20).numpy()
        if n:
            norms = np.sqrt((flat.astype(np.float64) ** 2).sum(0)).astype(np.float32)
            expected = reference.n_of_m(np.abs(w) * norms, n, m)
            prune.wanda_(layer, None, x, pattern=pattern)
        else:
            expected = wanda_mask(w, flat, 0.6)
            prune.wanda_(layer, 0.6, x)
        assert np.array_equal(layer.weight_mask.numpy(), expected)
        assert np.array_equal(layer.weight.detach().numpy(), np.where(expected, w, 0))


@pytest.mark.parametrize("arguments", [
    {"padding": 1}, {"stride": 2, "dilation": 2}, {"groups": 2, "padding": 2}, {"groups": 4},
], ids=str)  # fmt: skip
def test_wanda_of_a_convolution(arguments: dict) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(4, 8, 3, **arguments), torch.randn(2, 4, 9, 8)
    w = conv.weight.detach().reshape(8, -1).numpy()
    rows = 8 // conv.groups
    expected = [
        wanda_mask(w[g * rows : (g + 1) * rows], patches(conv, x, g), 0.5)
        for g in range(conv.groups)
    ]
    prune.wanda_(conv, 0.5, x)
    assert np.array_equal(conv.weight_mask.reshape(8, -1).numpy(), np.concatenate(expected))


def test_wanda_of_one_dimension_and_strings() -> None:
    x = torch.randn(2, 4, 9)
    flat, wide = nn.Conv1d(4, 8, 3, padding="same"), nn.Conv2d(4, 8, (1, 3), padding=(0, 1))
    wide.weight.data.copy_(flat.weight.data[:, :, None])
    prune.wanda_(flat, 0.5, x)
    prune.wanda_(wide, 0.5, x[:, :, None])
    assert torch.equal(flat.weight_mask[:, :, None], wide.weight_mask)


def eliminate(w: np.ndarray, x: np.ndarray, mask_of, group: int) -> tuple[np.ndarray, np.ndarray]:
    """SparseGPT from its definition: a new inverse of what is left of H for each column."""
    w, count = w.astype(np.float64), w.shape[1]
    hessian = x.astype(np.float64).T @ x
    hessian += np.eye(count) * 0.01 * hessian.diagonal().mean()
    mask = np.ones(w.shape, bool)
    gains = [np.linalg.inv(hessian[k:, k:])[0, 0] for k in range(count)]
    for k in range(count):
        if k % group == 0:
            part = slice(k, k + group)
            mask[:, part] = mask_of(w[:, part] ** 2 / np.array(gains[part]))
        inverse = np.linalg.inv(hessian[k:, k:])
        error = np.where(mask[:, k], 0, w[:, k]) / inverse[0, 0]
        w[:, k:] -= error[:, None] * inverse[0]
    return np.where(mask, w, 0), mask


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_sparsegpt_is_gaussian_elimination(pattern: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 24) @ torch.randn(24, 24)
    layer = nn.Linear(24, 10)
    w = layer.weight.detach().numpy().copy()
    if pattern == "2:4":
        expected, mask = eliminate(w, x.numpy(), lambda s: reference.n_of_m(s, 2, 4), 4)
    else:
        expected, mask = eliminate(w, x.numpy(), lambda s: reference.largest(s, 120), 24)
    prune.sparsegpt_(layer, None if pattern == "2:4" else 0.5, x, pattern=pattern)
    assert np.array_equal(layer.weight_mask.numpy(), mask)
    assert np.abs(layer.weight.detach().numpy() - expected).max() < 1e-4


@pytest.mark.parametrize("arguments", [
    {"sparsity": 0.6}, {"sparsity": None, "pattern": "2:4"},
    {"sparsity": 0.5, "pattern": "block", "block": (1, 16)},
    {"sparsity": 0.5, "pattern": "block", "block": (8, 5)}, {"sparsity": 0.3, "pattern": "channels"},
], ids=str)  # fmt: skip
def test_sparsegpt_loses_less(arguments: dict) -> None:
    """Wider than one run of columns, correlated inputs: error well below that of magnitude."""
    torch.manual_seed(0)
    x = torch.randn(1000, 40) @ torch.randn(40, 300) + 0.3 * torch.randn(1000, 300)
    layer = nn.Linear(300, 32, bias=False)
    dense = layer.weight.detach().clone()
    plain = copy.deepcopy(layer)
    report = prune.sparsegpt_(layer, arguments.pop("sparsity"), x, **arguments)
    pattern = arguments.get("pattern", "unstructured")
    prune.magnitude_(plain, 0.6 if pattern == "unstructured" else None if pattern == "2:4" else 0.5
                     if pattern == "block" else 0.3, **arguments)  # fmt: skip
    ours, theirs = ((x @ (m.weight.detach() - dense).T).norm() for m in (layer, plain))
    assert ours < (0.8 if pattern == "block" else 0.5) * theirs
    padded = arguments.get("block") == (1, 16)  # 300 inputs are 18 blocks and 3 quarters
    assert padded or layer.weight_mask.sum() == plain.weight_mask.sum()
    assert not layer.weight.detach()[~layer.weight_mask].any()
    assert bool(report.rows[0].note) == padded


def test_layers_are_pruned_in_the_order_of_the_pass() -> None:
    """The second layer sees what the pruned first one gives; modes and hooks are as before."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.9), nn.ReLU(), nn.Linear(32, 8))
    x = torch.randn(50, 16)
    twin = copy.deepcopy(net)
    prune.wanda_(net, 0.5, [x[:20], x[20:]])
    assert net.training and not net[0]._forward_pre_hooks
    prune.wanda_(twin[0], 0.5, x)
    with torch.no_grad():
        prune.wanda_(twin[3], 0.5, twin[0](x).relu())
    assert same(net, twin)


def test_attention_sees_its_inputs() -> None:
    """in_proj by the layer's input, out_proj by the mixed heads; cross attention by three inputs."""
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    x = torch.randn(3, 10, 16)
    w = net.self_attn.in_proj_weight.detach().numpy().copy()
    report = prune.wanda_(net, 0.5, x)
    assert not report.notes and len(prune.masks(net)) == 4
    mask = net.self_attn.in_proj_weight_mask.numpy()
    assert np.array_equal(mask, wanda_mask(w, x.reshape(-1, 16).numpy(), 0.5))
    cross = nn.MultiheadAttention(16, 2, kdim=16, vdim=16, batch_first=True)
    w = cross.in_proj_weight.detach().numpy().copy()
    q, k = torch.randn(2, 4, 16), torch.randn(2, 7, 16)
    prune.sparsegpt_(copy.deepcopy(cross), 0.5, (q, k, k))
    prune.wanda_(cross, 0.5, (q, k, k))
    inputs = [t.reshape(-1, 16).numpy() for t in (q, k, k)]
    expected = [wanda_mask(w[i * 16 : i * 16 + 16], x, 0.5) for i, x in enumerate(inputs)]
    assert np.array_equal(cross.in_proj_weight_mask.numpy(), np.concatenate(expected))
    assert "forward" not in cross.__dict__


@pytest.mark.parametrize("first", [True, False])
def test_our_attention_is_torchs(first: bool) -> None:
    from trimtab.prune.attention import attend

    torch.manual_seed(0)
    layer = nn.MultiheadAttention(12, 3, batch_first=first, kdim=5, vdim=7).eval()
    q, k, v = torch.randn(4, 4, 12), torch.randn(4, 4, 5), torch.randn(4, 4, 7)
    padding = torch.zeros(4, 4, dtype=torch.bool)
    padding[1, 2:] = True
    causal = torch.ones(4, 4, dtype=torch.bool).triu(1)
    for options in (
        {},
        {"key_padding_mask": padding, "need_weights": False},
        {"attn_mask": causal, "key_padding_mask": padding, "average_attn_weights": False},
        {"attn_mask": torch.randn(12, 4, 4), "need_weights": False},
        {"attn_mask": causal, "is_causal": True, "need_weights": False},
    ):
        for ours, theirs in zip(attend(layer, q, k, v, **options), layer(q, k, v, **options)):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    single = attend(layer, q[0], k[0], v[0])[0]
    torch.testing.assert_close(single, layer(q[0], k[0], v[0])[0])


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))


BAD_DATA = [
    (torch.randn(5, 11), r"does not take calibration data of shapes \[\[5, 11\]\]"),
    ([torch.randn(5, 12), torch.randn(5, 13)], r"batch 1: expected shape \[\*, 12\]"),
    ([], "empty list"),
    (torch.randn(0, 12), "the calibration data is empty"),
    (torch.full((5, 12), torch.nan), "0: its calibration inputs hold NaN or Inf"),
    ((torch.randn(5, 12), 3), "does not take calibration data"),
    (torch.randn(5, 12, device="meta"), "0: expected calibration inputs on cpu, got meta"),
    ([{"input": torch.randn(5, 12)}, {"x": torch.randn(5, 12)}], "batches of the same structure"),
]


@pytest.mark.parametrize("method", [prune.wanda_, prune.sparsegpt_])
@pytest.mark.parametrize("inputs,message", BAD_DATA, ids=[m for _, m in BAD_DATA])
def test_bad_calibration_data(method, inputs, message: str) -> None:
    net = small()
    before = copy.deepcopy(net)
    with pytest.raises(ValueError, match=f"{method.__name__}: .*{message}"):
        method(net, 0.5, inputs)
    with pytest.raises(TypeError, match="expected calibration data as a tensor, .* got str"):
        method(net, 0.5, "data")
    assert same(net, before) and not net[0]._forward_pre_hooks


def test_other_bad_input() -> None:
    net, x = small(), torch.randn(5, 12)
    before = copy.deepcopy(net)
    with pytest.raises(ValueError, match="leaves weights in each row"):
        prune.sparsegpt_(net, 0.5, x, pattern="rows")
    with pytest.raises(ValueError, match="expected damping > 0, got 0"):
        prune.sparsegpt_(net, 0.5, x, damping=0)
    with pytest.raises(ValueError, match=r"expected sparsity in \[0, 1\]"):
        prune.wanda_(net, 2.0, x)
    assert same(net, before)
    with pytest.raises(TypeError, match="Conv3d has no calibrated pruning"):
        prune.wanda_(nn.Conv3d(1, 2, 3), 0.5, torch.randn(1, 1, 4, 4, 4))
    grouped = nn.Conv2d(4, 6, 3, groups=2)
    with pytest.raises(ValueError, match="blocks that don't cross them, got 4 rows"):
        prune.sparsegpt_(grouped, 0.5, torch.randn(9, 4, 5, 5), pattern="block", block=(4, 4))
    net[2].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="2.weight is NaN"):
        prune.wanda_(net, 0.5, x)
    assert not prune.masks(net)


def test_a_layer_that_is_not_reached_is_said() -> None:
    net = small()
    net.spare = nn.Identity()
    net.spare.linear = nn.Linear(3, 3)
    report = prune.wanda_(net, 0.5, torch.randn(5, 12))
    assert report.notes == ["spare.linear.weight: left alone, the forward pass does not reach it"]


@pytest.mark.parametrize("at", [0, 1])
def test_failing_at_the_kth_layer(monkeypatch, at: int) -> None:
    net = small()
    before, calls = copy.deepcopy(net), []
    check = calibration.check_inputs

    def failing(op: str, target: Target, *rest) -> None:
        calls.append(target)
        if len(calls) == at + 1:
            raise MemoryError("no room")
        check(op, target, *rest)

    monkeypatch.setattr(calibration, "check_inputs", failing)
    for method in (prune.wanda_, prune.sparsegpt_):
        calls.clear()
        with pytest.raises(MemoryError, match="no room"):
            method(net, 0.5, torch.randn(50, 12))
        assert len(calls) == at + 1
        assert same(net, before) and not net[0]._forward_pre_hooks
        assert all(module.training for module in net.modules())


def test_batches_by_keyword_are_joined_by_name() -> None:
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    batches = [{"a": x[:2], "b": y[:2]}, {"b": y[2:], "a": x[2:]}]
    _, joined = calibration.as_call("test", batches)
    assert torch.equal(joined["a"], x) and torch.equal(joined["b"], y)


def test_an_infinite_weight_of_an_input_that_is_always_zero() -> None:
    net, x = small(), torch.randn(5, 12)
    x[:, 3] = 0
    net[0].weight.data[1, 3] = torch.inf
    before = copy.deepcopy(net)
    with pytest.raises(ValueError, match=r"wanda_: the score of 0.weight is NaN at \[1, 3\]"):
        prune.wanda_(net, 0.5, x)
    with pytest.raises(ValueError, match="magnitude_: 0.weight: expected a finite norm .* got inf"):
        prune.magnitude_(net, 0.5, norm_scaled=True)
    assert same(net, before)
