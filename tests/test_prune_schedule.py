"""Taylor and movement importance, schedules, soft filters, and what is left after a failure."""

import copy
import io

import pytest
import torch
from torch import nn

from trimtab import optim, prune
from trimtab.progress import Progress
from trimtab.prune import schedule


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4))


def loss(net: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return net(batch).square().mean()


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in b)


def changes(net: nn.Module, batches) -> list[list[torch.Tensor]]:
    found = []
    for batch in batches:
        net.zero_grad()
        loss(net, batch).backward()
        found.append([m.weight.detach() * m.weight.grad for m in (net[0], net[3])])
    return found


@pytest.mark.parametrize("pattern", ["unstructured", "rows"])
def test_taylor(pattern: str) -> None:
    net, batches = model(), [torch.randn(8, 12) for _ in range(3)]
    twin = copy.deepcopy(net).eval()
    net[0].weight.requires_grad_(False)
    prune.taylor_(net, 0.5, batches, loss, pattern=pattern)
    assert net.training and not net[0].weight.requires_grad and net[3].weight.grad is None
    parts = changes(twin, batches)
    if pattern == "rows":
        units = [sum(p[i].double().sum(1) ** 2 for p in parts) for i in range(2)]
    else:
        units = [sum(p[i] ** 2 for p in parts).reshape(-1) for i in range(2)]
    pool = torch.cat(units)
    kept = torch.zeros(len(pool), dtype=torch.bool)
    kept[pool.argsort(descending=True, stable=True)[: len(pool) - round(0.5 * len(pool))]] = True
    masks = [net[0].weight_mask, net[3].weight_mask]
    for mask, keep in zip(masks, kept.split([len(u) for u in units])):
        mask = mask.all(1) if pattern == "rows" else mask.reshape(-1)
        assert torch.equal(mask, keep)


def test_movement() -> None:
    net = model().eval()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    expected = torch.zeros_like(net[0].weight)
    with prune.Movement(net, optimizer) as movement:
        for _ in range(3):
            optimizer.zero_grad()
            loss(net, torch.randn(8, 12)).backward()
            expected -= net[0].weight.detach() * net[0].weight.grad
            optimizer.step()
    optimizer.step()
    assert movement.steps == 3
    torch.testing.assert_close(movement.scores["0.weight"], expected)
    prune.movement_(net, 0.25, movement, scope="layer")
    assert net[0].weight_mask.sum() == 144
    assert expected[net[0].weight_mask].min() >= expected[~net[0].weight_mask].max()


def test_cubic() -> None:
    cubic = prune.Cubic(0.9, begin=10, end=50, every=20, initial=0.1)
    given = {step: cubic(step) for step in range(100) if cubic(step) is not None}
    assert list(given) == [10, 30, 50]
    assert given[10] == pytest.approx(0.1) and given[50] == 0.9
    assert given[30] == pytest.approx(0.9 - 0.8 * 0.5**3)
    assert [s for s in range(9) if prune.OneShot(0.5, at=3)(s)] == [3]
    with pytest.raises(ValueError, match="expected begin < end, got 5 and 5"):
        prune.Cubic(0.9, begin=5, end=5)
    with pytest.raises(ValueError, match=r"Cubic: final: expected sparsity in \[0, 1\], got 90"):
        prune.Cubic(90, begin=0, end=5)


def trainer(net: nn.Module, optimizer: torch.optim.Optimizer, fail_at: int = -1):
    def step(at: int) -> None:
        if at == fail_at:
            raise RuntimeError("the disk is full")
        optimizer.zero_grad()
        loss(net, torch.randn(8, 12)).backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("library", [optim, torch.optim], ids=["trimtab", "torch"])
def test_iterative(library, monkeypatch) -> None:
    net = model()
    optimizer = library.AdamW(net.parameters(), lr=0.01)
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(schedule, "progress", lambda n, label: Progress(n, label, screen))
    seen = []

    def watched(which: nn.Module, sparsity: float) -> None:
        prune.magnitude_(which, sparsity)
        seen.append(prune.report(which).sparsity)

    cubic = prune.Cubic(0.75, begin=0, end=9, every=3)
    report = prune.iterative_(net, optimizer, trainer(net, optimizer), 12, cubic, prune=watched)
    assert report.sparsity == 0.75 and seen == sorted(seen) and len(seen) == 4
    assert "prune and retrain" in screen.getvalue() and "0.0% pruned" in screen.getvalue()
    trainer(net, optimizer)(0)  # still held
    assert prune.report(net).sparsity == 0.75
    assert prune.hold_(net, optimizer) is prune.hold_(net, optimizer)


@pytest.mark.parametrize("library", [optim, torch.optim], ids=["trimtab", "torch"])
def test_iterative_fails_midway(library) -> None:
    net = model()
    optimizer = library.AdamW(net.parameters(), lr=0.01)
    trainer(net, optimizer)(0)
    before, state = copy.deepcopy(net), copy.deepcopy(optimizer.state_dict())
    gradient = net[0].weight.grad.clone()
    with pytest.raises(RuntimeError, match="the disk is full"):
        prune.iterative_(
            net, optimizer, trainer(net, optimizer, 5), 9, prune.Cubic(0.5, begin=0, end=8)
        )
    assert same(net, before)
    assert torch.equal(net[0].weight.grad, gradient) and not optimizer._optimizer_step_pre_hooks
    for key, value in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value[name], state["state"][key][name]) for name in value)
    trainer(net, optimizer)(0)
    assert prune.report(net).sparsity < 0.1


def test_soft_filters_come_back() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(72, 4))
    dense = net[2].weight.detach().clone()
    optimizer = optim.SGD(net.parameters(), lr=0.1)
    norms = net[0].weight.detach().flatten(1).norm(dim=1)
    report = prune.soft_filter_(net, 0.5)
    pruned = (net[0].weight == 0).flatten(1).all(1)
    assert pruned.sum() == 4 and norms[pruned].max() < norms[~pruned].min()
    assert torch.equal(net[2].weight, dense) and not prune.masks(net)
    assert report.rows[0].sparsity == 0.5
    net(torch.randn(8, 1, 5, 5)).square().sum().backward()
    optimizer.step()
    assert (net[0].weight != 0).flatten(1).any(1).all()
    prune.magnitude_(net, 0.5, pattern="rows", layers=["0"])
    assert net[0].weight_mask.flatten(1).any(1).sum() == 4
    nan = nn.Conv2d(1, 2, 3)
    nan.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="soft_filter_: weight is NaN"):
        prune.soft_filter_(nan, 0.5)
    with pytest.raises(ValueError, match="no layers to prune"):
        prune.soft_filter_(nn.Linear(2, 2), 0.5)


def test_bad_input() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters())
    before = copy.deepcopy(net)
    with pytest.raises(ValueError, match="taylor_: expected batches, got none"):
        prune.taylor_(net, 0.5, [], loss)
    with pytest.raises(ValueError, match="taylor_: the loss depends on none of the layers"):
        prune.taylor_(net, 0.5, [0], lambda *_: torch.ones((), requires_grad=True))
    with pytest.raises(ValueError, match="the importance of 0.weight is NaN"):
        prune.taylor_(net, 0.5, [torch.full((2, 12), torch.nan)], loss)
    with pytest.raises(ValueError, match="movement_: expected steps"):
        prune.movement_(net, 0.5, prune.Movement(net, optimizer))
    with pytest.raises(ValueError, match="expected steps >= 1, got 0"):
        prune.iterative_(net, optimizer, lambda at: None, 0, prune.OneShot(0.5))
    assert same(net, before) and net.training


def test_structured_masks_on_the_way_and_removes_at_the_end() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.randn(16, 12)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)

    def masked(model: nn.Module, sparsity: float) -> None:
        prune.structured_(model, {"0": sparsity}, x, remove=False)

    def step(_: int) -> None:
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()

    prune.iterative_(net, optimizer, step, 9, prune.Cubic(0.5, 0, 6, every=3), prune=masked)
    want = net(x)
    assert int((net[0].weight.abs().sum(1) == 0).sum()) == 16
    prune.structured_(net, {"0": 0.5}, x)
    assert net[0].out_features == 16 and net[2].in_features == 16
    torch.testing.assert_close(net(x), want, rtol=1e-5, atol=1e-6)


def test_batches_are_fetched_one_by_one() -> None:
    fetched = []

    class Batches:
        def __len__(self) -> int:
            return 3

        def __iter__(self):
            for at in range(3):
                fetched.append(at)
                yield torch.randn(8, 12)

    def watched(net: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        seen.append(len(fetched))
        return loss(net, batch)

    seen: list[int] = []
    prune.taylor_(model(), 0.5, Batches(), watched)
    assert seen == [1, 2, 3]
