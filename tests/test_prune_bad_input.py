"""A clear error before any weight changes; what fails midway leaves the model as it was."""

import copy

import pytest
import torch
from torch import nn

from trimtab import prune
from trimtab.prune import state


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 4))


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    bits = [torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in b if k in a]
    return list(a) == list(b) and all(bits) and str(one) == str(other)


WRONG = [
    ({"sparsity": 1.5}, ValueError, r"expected sparsity in \[0, 1\], got 1.5"),
    ({"sparsity": -0.1}, ValueError, r"expected sparsity in \[0, 1\], got -0.1"),
    ({"sparsity": float("nan")}, ValueError, r"expected sparsity in \[0, 1\], got nan"),
    ({"sparsity": "half"}, TypeError, "expected a number as sparsity, got 'half'"),
    ({}, ValueError, r"expected a sparsity in \[0, 1\], got None"),
    ({"sparsity": 0.6, "pattern": "2:4"}, ValueError, "2:4 is a sparsity of 0.5, got 0.6"),
    ({"pattern": "5:4"}, ValueError, "expected pattern \"unstructured\", .* got '5:4'"),
    ({"sparsity": 0.5, "pattern": "tiles"}, ValueError, "got 'tiles'"),
    ({"sparsity": 0.5, "block": (4, 4)}, ValueError, 'goes with pattern="block"'),
    ({"sparsity": 0.5, "pattern": "block", "block": (0, 4)}, ValueError, r"\(outputs, inputs\)"),
    ({"sparsity": 0.5, "scope": "model"}, ValueError, 'expected scope "layer" or "global"'),
    ({"sparsity": 0.5, "threshold": 0.1}, ValueError, "threshold goes with neither"),
    ({"threshold": -1.0}, ValueError, "expected threshold >= 0, got -1.0"),
    ({"sparsity": 0.5, "layers": ["4"]}, ValueError, r"got \['4'\], not in the model"),
    ({"sparsity": 0.5, "layers": ["1"]}, TypeError, "1: expected nn.Linear, .* got ReLU"),
    ({"sparsity": 0.5, "layers": lambda n, m: False}, ValueError, "no layers to prune"),
    ({"sparsity": {"5": 0.5}}, ValueError, r"\['5'\]"),
    ({"sparsity": {"0": 0.5, "2": 0.1}, "scope": "global"}, ValueError, "one sparsity"),
]


@pytest.mark.parametrize("arguments,error,message", WRONG)
def test_magnitude(arguments: dict, error: type[Exception], message: str) -> None:
    net = model()
    before = copy.deepcopy(net)
    with pytest.raises(error, match=f"magnitude_: .*{message}|{message}"):
        prune.magnitude_(net, **arguments)
    assert same(net, before)


def test_nan_is_named() -> None:
    net = model()
    net[2].weight.data[3, 1] = torch.nan
    before = copy.deepcopy(net)
    with pytest.raises(ValueError, match=r"magnitude_: 2.weight is NaN at \[3, 1\]"):
        prune.magnitude_(net, 0.5)
    with pytest.raises(ValueError, match=r"scores_: 2.weight is NaN"):
        prune.scores_(net, {"2.weight": torch.ones(8, 16)}, 0.5)
    assert same(net, before)


def test_scores() -> None:
    net = model()
    with pytest.raises(ValueError, match=r"0.weight: expected scores of shape \[16, 12\]"):
        prune.scores_(net, {"0.weight": torch.ones(3)}, 0.5)
    with pytest.raises(ValueError, match=r"got \['1.weight'\]"):
        prune.scores_(net, {"0.weight": torch.ones(16, 12), "1.weight": torch.ones(3)}, 0.5)
    with pytest.raises(TypeError, match="expected real floating point, got torch.int64"):
        prune.scores_(net, {"0.weight": torch.ones(16, 12, dtype=torch.int64)}, 0.5)


def test_masks_and_holds() -> None:
    net = model()
    with pytest.raises(ValueError, match=r"expected a mask of shape \[16, 12\], got \[3\]"):
        prune.set_mask_(net[0], "weight", torch.ones(3))
    with pytest.raises(ValueError, match="ReLU has no parameter 'weight'"):
        prune.set_mask_(net[1], "weight", torch.ones(3))
    with pytest.raises(TypeError, match="expected an nn.Module and a torch optimizer"):
        prune.hold_(net, net)
    with pytest.raises(
        ValueError, match=r"optimizer of the model's parameters, got SGD of [0-9]+ others"
    ):
        prune.hold_(net, torch.optim.SGD(model().parameters(), lr=0.1))
    with pytest.raises(TypeError, match="expected an nn.Module, got list"):
        prune.magnitude_([net], 0.5)


@pytest.mark.parametrize("pruned_before", [False, True])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_failing_at_the_kth_layer(monkeypatch, at: int, pruned_before: bool) -> None:
    net = model()
    if pruned_before:
        prune.magnitude_(net, 0.2)
    before = copy.deepcopy(net)
    parameters = list(net.parameters())
    calls = []

    def failing(module: nn.Module, key: str, mask: torch.Tensor) -> None:
        calls.append(module)
        state.set_mask_(module, key, mask)
        if len(calls) == at + 1:
            raise MemoryError("no room")

    monkeypatch.setattr("trimtab.prune.apply.set_mask_", failing)
    with pytest.raises(MemoryError):
        prune.magnitude_(net, 0.5)
    assert len(calls) == at + 1
    assert same(net, before)
    assert all(p is q for p, q in zip(net.parameters(), parameters))
