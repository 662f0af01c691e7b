"""A wrong call of any public function of trimtab.prune: the op is named, the model is as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from test_prune_bad_input import model, same
from torch import Tensor, nn

from trimtab import prune

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1)


def total(net: nn.Module, batch: Tensor) -> Tensor:
    return net(batch).sum()


def iterate(net: nn.Module, **changed) -> object:
    given = {
        "optimizer": sgd(net),
        "train_step": lambda at: None,
        "steps": 3,
        "schedule": prune.OneShot(0.5),
    }
    return prune.iterative_(net, **{**given, **changed})


def with_mask(net: nn.Module, mask: Tensor) -> dict[str, Tensor]:
    return {**net.state_dict(), "0.weight_mask": mask}


NAN = torch.full((16, 12), torch.nan)
Call = Callable[[nn.Module], object]
CALLS: dict[str, tuple[Call, type[Exception], str]] = {
    # magnitude_, targets
    "threshold": (lambda m: prune.magnitude_(m, threshold="a"), TypeError,
        "magnitude_: expected a number as threshold, got 'a'"),
    "block": (lambda m: prune.magnitude_(m, 0.5, pattern="block", block=4), ValueError,
        r"magnitude_: expected block=\(outputs, inputs\), got 4"),
    "layers": (lambda m: prune.magnitude_(m, 0.5, layers=3), TypeError,
        "magnitude_: expected names of layers, got 3"),
    "layers-int": (lambda m: prune.magnitude_(m, 0.5, layers=[3]), TypeError,
        "magnitude_: expected names of layers, got list"),
    "mapping": (lambda m: prune.magnitude_(m, {"0": 2}), ValueError,
        r"magnitude_: expected sparsity in \[0, 1\], got 2"),
    "targets": (lambda m: prune.targets("my_op", 3), TypeError,
        "my_op: expected an nn.Module, got 3"),
    # wanda_, sparsegpt_
    "wanda-inputs": (lambda m: prune.wanda_(m, 0.5, None), TypeError,
        "wanda_: expected calibration data as a tensor, .* got NoneType"),
    "wanda-width": (lambda m: prune.wanda_(m, 0.5, X[:, :7]), ValueError,
        r"wanda_: the model does not take calibration data of shapes \[\[5, 7\]\]"),
    "wanda-dtype": (lambda m: prune.wanda_(m, 0.5, X.long()), ValueError,
        "wanda_: 0: expected floating-point calibration inputs, got torch.int64"),
    "wanda-sparsity": (lambda m: prune.wanda_(m, -1, X), ValueError, "wanda_: expected sparsity"),
    "damping": (lambda m: prune.sparsegpt_(m, 0.5, X, damping="x"), TypeError,
        "sparsegpt_: expected a number as damping, got 'x'"),
    "sparsegpt-sparsity": (lambda m: prune.sparsegpt_(m, 2.0, X), ValueError,
        "sparsegpt_: expected sparsity"),
    # taylor_
    "taylor-batches": (lambda m: prune.taylor_(m, 0.5, 3, total), TypeError,
        "taylor_: expected an iterable of batches, got 3"),
    "taylor-tensor": (lambda m: prune.taylor_(m, 0.5, X, total), TypeError,
        "taylor_: expected an iterable of batches, got Tensor"),
    "taylor-loss": (lambda m: prune.taylor_(m, 0.5, [X], None), TypeError,
        r"taylor_: expected loss\(model, batch\) -> scalar tensor, got NoneType"),
    "taylor-vector": (lambda m: prune.taylor_(m, 0.5, [X], lambda m, b: m(b)), ValueError,
        r"taylor_: expected loss\(model, batch\) to give a scalar tensor, got \[5, 4\]"),
    "taylor-float": (lambda m: prune.taylor_(m, 0.5, [X], lambda m, b: 1.0), TypeError,
        r"taylor_: expected loss\(model, batch\) to give a scalar tensor, got 1.0"),
    "taylor-detached": (lambda m: prune.taylor_(m, 0.5, [X], lambda m, b: b.sum()), ValueError,
        "taylor_: the loss depends on none of the layers"),
    "taylor-nan": (lambda m: prune.taylor_(m, 0.5, [X], lambda m, b: m(b).sum() * torch.nan),
        ValueError, "taylor_: the importance of 0.weight is NaN"),
    "taylor-midway": (lambda m: prune.taylor_(m, 0.5, [X, X[:, :3]], total), RuntimeError, "5x3"),
    # Movement, movement_
    "Movement-optimizer": (lambda m: prune.Movement(m, None), TypeError,
        "Movement: expected a torch optimizer, got NoneType"),
    "Movement-others": (lambda m: prune.Movement(m, sgd(model())), ValueError,
        "Movement: expected an optimizer of the model's parameters, got SGD of 6 others"),
    "movement": (lambda m: prune.movement_(m, 0.5, None), TypeError,
        "movement_: expected a Movement, got NoneType"),
    "movement-no-steps": (lambda m: prune.movement_(m, 0.5, prune.Movement(m, sgd(m))), ValueError,
        "movement_: expected steps of the optimizer, saw none"),
    # structured_
    "structured-model": (lambda m: prune.structured_(3, 0.5, X), TypeError,
        "structured_: expected an nn.Module, got 3"),
    "structured-round": (lambda m: prune.structured_(m, 0.5, X, round_to=0), ValueError,
        "structured_: expected round_to >= 1, got 0"),
    "structured-layers": (lambda m: prune.structured_(m, 0.5, X, layers=3), TypeError,
        "structured_: expected names of layers, got 3"),
    "structured-inputs": (lambda m: prune.structured_(m, 0.5, X[:, :3]), ValueError,
        r"structured_: the model does not take inputs of shapes \[\[5, 3\]\]"),
    "importance": (lambda m: prune.structured_(m, 0.5, X, importance=3), TypeError,
        "structured_: expected importance as a dict of scores"),
    "importance-name": (lambda m: prune.structured_(m, 0.5, X, importance={"9.weight": X}), ValueError,
        r"structured_: expected importance of parameters, got \['9.weight'\]"),
    "importance-shape": (lambda m: prune.structured_(m, 0.5, X, importance={"0.weight": X}), ValueError,
        r"structured_: importance of 0.weight: expected \[16, 12\], got \[5, 12\]"),
    "importance-nan": (lambda m: prune.structured_(m, 0.5, X, importance={"0.weight": NAN}), ValueError,
        "structured_: the importance of 0.weight is NaN"),
    # load_state_dict_
    "load": (lambda m: prune.load_state_dict_(m, 3), TypeError,
        "load_state_dict_: expected a state_dict"),
    "load-model": (lambda m: prune.load_state_dict_(None, {}), TypeError,
        "load_state_dict_: expected an nn.Module, got NoneType"),
    "load-nothing": (lambda m: prune.load_state_dict_(m, {}), RuntimeError, "Missing key"),
    "load-mask": (lambda m: prune.load_state_dict_(m, with_mask(m, NAN == 1)), ValueError,
        "load_state_dict_: 0.weight: its mask prunes a weight that isn't 0"),
    # soft_filter_, iterative_, schedules
    "soft": (lambda m: prune.soft_filter_(m, 1.5), ValueError, "soft_filter_: expected sparsity"),
    "soft-layers": (lambda m: prune.soft_filter_(m, 0.5), ValueError,
        "soft_filter_: the model has no layers to prune"),
    "steps": (lambda m: iterate(m, steps=0), ValueError, "iterative_: expected steps >= 1, got 0"),
    "steps-type": (lambda m: iterate(m, steps="3"), TypeError,
        "iterative_: expected an int as steps, got '3'"),
    "schedule": (lambda m: iterate(m, schedule=0.5), TypeError,
        r"iterative_: expected schedule\(step\) -> sparsity or None, got 0.5"),
    "schedule-late": (lambda m: iterate(m, schedule=prune.OneShot(0.5, at=3)), ValueError,
        "iterative_: expected at of the schedule < steps=3, got 3"),
    "schedule-long": (lambda m: iterate(m, schedule=prune.Cubic(0.5, 0, 9)), ValueError,
        "iterative_: expected end of the schedule < steps=3, got 9"),
    "schedule-wrong": (lambda m: iterate(m, schedule=lambda at: 0.75 * at), ValueError,
        r"iterative_: expected sparsity in \[0, 1\], got 1.5"),
    "schedule-text": (lambda m: iterate(m, schedule=lambda at: "x" if at else 0.5), TypeError,
        "iterative_: expected a number as sparsity, got 'x'"),
    "train-step": (lambda m: iterate(m, train_step=None), TypeError,
        r"iterative_: expected train_step\(step\), got NoneType"),
    "optimizer": (lambda m: iterate(m, optimizer=None), TypeError,
        "iterative_: expected a torch optimizer, got NoneType"),
    "optimizer-others": (lambda m: iterate(m, optimizer=sgd(model())), ValueError,
        "expected an optimizer of the model's parameters"),
    "prune": (lambda m: iterate(m, prune=3), TypeError,
        r"iterative_: expected prune\(model, sparsity\), got 3"),
    "prune-removes": (lambda m: iterate(m, prune=lambda m, s: prune.structured_(m, s, X)), ValueError,
        "iterative_: expected a prune that masks, got one that exchanged parameters, 0.bias first"),
    "iterative-model": (lambda m: prune.iterative_(3, sgd(m), print, 3, prune.OneShot(0.5)), TypeError,
        "iterative_: expected an nn.Module, got 3"),
    "Cubic": (lambda m: prune.Cubic(0.5, "a", 10), TypeError, "Cubic: expected an int as begin"),
    "Cubic-every": (lambda m: prune.Cubic(0.5, 0, 10, 0), ValueError, "Cubic: expected every >= 1"),
    "OneShot": (lambda m: prune.OneShot(0.5, at=-1), ValueError, "OneShot: expected at >= 0, got -1"),
    # scores_, masks
    "scores": (lambda m: prune.scores_(m, [1], 0.5), TypeError,
        "scores_: expected a dict of scores by names of parameters, got list"),
    "scores-none": (lambda m: prune.scores_(m, {}, 0.5), ValueError,
        "scores_: expected scores of at least one weight"),
    "scores-list": (lambda m: prune.scores_(m, {"0.weight": [1.0]}, 0.5), TypeError,
        "scores_: expected a tensor as scores of 0.weight, got list"),
    "scores-nan": (lambda m: prune.scores_(m, {"0.weight": NAN}, 0.5), ValueError,
        "scores_: 0.weight is NaN"),
    "set_mask_": (lambda m: prune.set_mask_(m[0], "weight", [1]), TypeError,
        "set_mask_: expected a tensor as mask, got list"),
    "set_mask_-module": (lambda m: prune.set_mask_(3, "weight", X), TypeError,
        "set_mask_: expected an nn.Module, got 3"),
    "set_mask_-nan": (lambda m: prune.set_mask_(m[0], "weight", NAN), ValueError,
        "set_mask_: weight: expected a bool mask, got one with NaN"),
    "masks": (lambda m: prune.masks(3), TypeError, "masks: expected an nn.Module, got 3"),
    "finalize_": (lambda m: prune.finalize_(3), TypeError, "finalize_: expected an nn.Module, got 3"),
    "report": (lambda m: prune.report(3), TypeError, "report: expected an nn.Module, got 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_wrong_call(name: str) -> None:
    call, error, message = CALLS[name]
    net = model()
    before = copy.deepcopy(net)
    with pytest.raises(error, match=message):
        call(net)
    assert same(net, before)
    assert all(p.requires_grad for p in net.parameters()) and net.training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())


NAN_CALLS: dict[str, Call] = {
    "magnitude_": lambda m: prune.magnitude_(m, 0.5),
    "wanda_": lambda m: prune.wanda_(m, 0.5, X),
    "sparsegpt_": lambda m: prune.sparsegpt_(m, 0.5, X),
    "taylor_": lambda m: prune.taylor_(m, 0.5, [X], total),
    "structured_": lambda m: prune.structured_(m, 0.5, X),
    "soft_filter_": lambda m: prune.soft_filter_(m, 0.5, layers=["2"]),
    "scores_": lambda m: prune.scores_(m, {"2.weight": torch.ones(8, 16)}, 0.5),
}


@pytest.mark.parametrize("name", NAN_CALLS)
def test_a_nan_weight_is_named(name: str) -> None:
    net = model()
    with torch.no_grad():
        net[2].weight[3, 1] = torch.nan
    before = copy.deepcopy(net)
    with pytest.raises(ValueError, match=rf"{name}: 2.weight is NaN at \[3, 1\]"):
        NAN_CALLS[name](net)
    assert same(net, before)


def test_every_public_function_is_called_wrongly() -> None:
    """So that a new one is not forgotten here; classes of reports and layers take no user's input."""
    text = " ".join(message for _, _, message in CALLS.values())
    functions = [name for name in prune.__all__ if callable(getattr(prune, name))]
    results = {"StructuredReport", "PruneReport", "PrunedLayerNorm", "PrunedMultiheadAttention"}
    by_others = {"Schedule", "Hold", "hold_"}  # a protocol; in test_prune_bad_input.py
    known = set(functions) - results - by_others
    missing = [name for name in known if f"{name}:" not in text]
    assert missing == ["targets"]  # says the op of its caller
