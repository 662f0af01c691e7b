"""Masks in training: saved with the model, held at zero under our optimizers and torch's."""

import copy
import io

import pytest
import torch
from torch import nn

from trimtab import optim, prune
from trimtab.nn import SparseLinear

OURS = ["SGD", "Adam", "AdamW", "RMSprop", "Lion", "Adagrad", "LAMB", "Adafactor", "Muon"]
TORCH = ["SGD", "Adam", "AdamW", "RMSprop", "NAdam", "Adagrad", "Adadelta"]
MOMENTUM = {"SGD": {"momentum": 0.9}, "RMSprop": {"momentum": 0.9}}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5))


def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    net(torch.randn(8, 12)).square().sum().backward()
    optimizer.step()


def assert_held(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    found = 0
    for target in prune.targets("test", net):
        if target.mask is None:
            continue
        values = [target.weight, *optimizer.state[target.weight].values()]
        for value in values:
            if isinstance(value, torch.Tensor) and value.shape == target.mask.shape:
                found += 1
                assert not value.detach()[~target.mask].any()
        assert target.weight.detach()[target.mask].count_nonzero() > 0
    assert found


@pytest.mark.parametrize(
    "library,name",
    [(optim, name) for name in OURS] + [(torch.optim, name) for name in TORCH],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_pruned_weights_and_momentum_stay_zero(library, name: str) -> None:
    net = model()
    weights = [p for p in net.parameters() if p.dim() == 2] if name == "Muon" else net.parameters()
    optimizer = getattr(library, name)(weights, lr=0.01, **MOMENTUM.get(name, {}))
    step(net, optimizer)  # momentum of weights that are pruned only now
    prune.magnitude_(net, 0.5)
    prune.hold_(net, optimizer)
    assert_held(net, optimizer)
    for _ in range(3):
        step(net, optimizer)
        assert_held(net, optimizer)


@pytest.mark.parametrize("library", [optim, torch.optim], ids=["trimtab", "torch"])
def test_the_hold_follows_masks(library) -> None:
    """Set later, set anew, changed in place, moved, taken away; then let go."""
    net = model()
    optimizer = library.AdamW(net.parameters(), lr=0.01)
    hold = prune.hold_(net, optimizer)
    step(net, optimizer)
    for sparsity in (0.3, 0.6):
        prune.magnitude_(net, sparsity)
        step(net, optimizer)
        assert_held(net, optimizer)
    net[0].weight_mask[:2] = False
    step(net, optimizer)
    assert not net[0].weight[:2].any()
    net.load_state_dict(copy.deepcopy(net.state_dict()))
    net.to(torch.float64).to(torch.float32)
    step(net, optimizer)
    assert_held(net, optimizer)
    prune.finalize_(net)
    assert not prune.masks(net)
    step(net, optimizer)
    assert net[0].weight[:2].any()
    prune.magnitude_(net, 0.5)
    hold.remove()
    step(net, optimizer)
    assert net[0].weight[~net[0].weight_mask].any()


def test_held_under_both_alike() -> None:
    """Masked inside the step or by hooks: the same weights."""
    ours, theirs = model(), model()
    optimizers = (
        optim.AdamW(ours.parameters(), lr=0.01),
        torch.optim.AdamW(theirs.parameters(), lr=0.01, fused=True),
    )
    for net, optimizer in zip((ours, theirs), optimizers):
        prune.magnitude_(net, 0.7)
        prune.hold_(net, optimizer)
        torch.manual_seed(1)
        for _ in range(5):
            step(net, optimizer)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert torch.equal(p, q)


def test_nan_gradients_of_pruned_weights_do_not_matter() -> None:
    net = model()
    prune.magnitude_(net, 0.5)
    optimizer = torch.optim.Adam(net.parameters())
    prune.hold_(net, optimizer)
    for target in prune.targets("test", net):
        target.weight.grad = torch.where(target.mask, 1.0, torch.nan)
    optimizer.step()
    assert_held(net, optimizer)
    assert all(p.isfinite().all() for p in net.parameters())


def test_masks_are_in_the_state_dict() -> None:
    net = model()
    prune.magnitude_(net, 0.5)
    assert net.state_dict()["0.weight_mask"].dtype == torch.bool
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other = model()
    prune.magnitude_(other, 0.1)
    other.load_state_dict(torch.load(file, weights_only=True))
    for name, mask in prune.masks(net).items():
        assert torch.equal(mask, prune.masks(other)[name])
    twin = copy.deepcopy(net)
    twin[0].weight_mask.fill_(True)
    assert not net[0].weight_mask.all()
    assert net.half()[0].weight_mask.dtype == torch.bool


def test_finalize_leaves_a_plain_model() -> None:
    net = model()
    prune.magnitude_(net, 0.5)
    before = net[0].weight.detach().clone()
    prune.finalize_(net)
    assert list(net.state_dict()) == list(model().state_dict())
    assert torch.equal(net[0].weight, before)
    report = prune.report(net)
    assert report.sparsity == 0.5 and not report.rows[0].masked


def test_a_closure_called_many_times_in_a_step() -> None:
    """LBFGS builds its direction from gradients; held, it learns as on the kept weights alone."""
    x, y = torch.randn(32, 12), torch.randn(32, 5)
    losses = []
    for sparse in (False, True):
        net = model()
        prune.magnitude_(net, 0.6)
        if sparse:
            net[0], net[2] = (SparseLinear.from_float(net[i]) for i in (0, 2))
        optimizer = torch.optim.LBFGS(net.parameters(), lr=0.5, max_iter=6)
        if not sparse:
            prune.hold_(net, optimizer)

        def closure(net: nn.Module = net, optimizer: torch.optim.Optimizer = optimizer):
            optimizer.zero_grad()
            loss = (net(x) - y).square().mean()
            loss.backward()
            return loss

        losses.append([optimizer.step(closure).item() for _ in range(6)])
    assert prune.report(net).sparsity == pytest.approx(0.6, abs=0.01)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0][-1] < losses[0][0]
    net = model()
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.5, max_iter=6)
    prune.hold_(net, optimizer)
    for at in range(9):  # pruned in the middle, where it has a history of all weights
        if at in (3, 5):
            prune.magnitude_(net, 0.1 * at)
        losses.append(optimizer.step(lambda: closure(net, optimizer)).item())
    assert losses[-1] < losses[2] and prune.report(net).sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("library", [optim, torch.optim], ids=["trimtab", "torch"])
def test_parameters_that_come_and_go(library) -> None:
    """A group added later is held; parameters that a load exchanges are no longer the optimizer's."""
    net = model()
    prune.magnitude_(net, 0.5)
    optimizer = library.SGD(net[0].parameters(), lr=0.1, momentum=0.9)
    prune.hold_(net, optimizer)
    step(net, optimizer)
    optimizer.add_param_group({"params": net[2].parameters()})
    for _ in range(2):
        step(net, optimizer)
        assert_held(net, optimizer)
    net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)
    before = net[0].weight.detach().clone()
    step(net, optimizer)
    assert torch.equal(net[0].weight, before)


@pytest.mark.parametrize("method", ["magnitude_", "wanda_", "sparsegpt_", "taylor_", "structured_"])
def test_pruned_in_inference_mode(method: str) -> None:
    """As calibration often is; the model trains afterwards."""
    net, x = model(), torch.randn(6, 12)
    arguments = {
        "magnitude_": (),
        "taylor_": ([x], lambda net, batch: net(batch).sum()),
    }.get(method, (x,))
    with torch.inference_mode():
        getattr(prune, method)(net, 0.5, *arguments)
    optimizer = optim.AdamW(net.parameters(), lr=0.01)
    prune.hold_(net, optimizer)
    step(net, optimizer)
    if method != "structured_":
        assert_held(net, optimizer)
