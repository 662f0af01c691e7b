"""Prune and retrain in turns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ..progress import progress
from .apply import choose, units_of
from .checks import expect_function, expect_model, expect_optimizer, whole
from .magnitude import magnitude_
from .masks import Pattern, check_sparsity
from .report import PruneReport, report
from .state import LAYERS, Layers, Target, hold_, targets
from .undo import Undo


class Schedule(Protocol):
    """The sparsity to prune to before training step ``step`` (from 0), or None: no pruning then."""

    def __call__(self, step: int) -> float | None: ...


@dataclass(frozen=True)
class Cubic:
    """s = final + (initial - final) (1 - (step - begin) / (end - begin))^3, every so many steps.

    Fast while much is redundant, slow near the end (Zhu & Gupta 2017,
    https://arxiv.org/abs/1710.01878). ``end`` always prunes, to exactly ``final``.
    """

    final: float
    begin: int
    end: int
    every: int = 1
    initial: float = 0.0

    def __post_init__(self) -> None:
        check_sparsity("Cubic: final", self.final)
        check_sparsity("Cubic: initial", self.initial)
        whole("Cubic", "begin", self.begin, 0)
        whole("Cubic", "every", self.every, 1)
        if whole("Cubic", "end", self.end, 1) <= self.begin:
            raise ValueError(f"Cubic: expected begin < end, got {self.begin} and {self.end}")

    def __call__(self, step: int) -> float | None:
        if step == self.end:
            return self.final
        if not self.begin <= step < self.end or (step - self.begin) % self.every:
            return None
        left = 1 - (step - self.begin) / (self.end - self.begin)
        return self.final + (self.initial - self.final) * left**3


@dataclass(frozen=True)
class OneShot:
    """All at once, before step ``at``."""

    final: float
    at: int = 0

    def __post_init__(self) -> None:
        check_sparsity("OneShot: final", self.final)
        whole("OneShot", "at", self.at, 0)

    def __call__(self, step: int) -> float | None:
        return self.final if step == self.at else None


def iterative_(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train_step: Callable[[int], Any],
    steps: int,
    schedule: Schedule,
    *,
    prune: Callable[[nn.Module, float], Any] | None = None,
    label: str = "prune and retrain",
) -> PruneReport:
    """Trains for ``steps`` steps and prunes on the way, with a progress bar on a terminal.

    Masks are held under ``optimizer`` (:func:`hold_`), and stay so afterwards.

    Args:
        train_step: called with 0, 1, ... ; one step of training, ``optimizer.step()`` included.
        schedule: :class:`Cubic`, :class:`OneShot`, or any function of the step.
        prune: called with the model and a sparsity; :func:`magnitude_` if not given. With
            :func:`soft_filter_` nothing is held, and filters may come back.

    Raises:
        ValueError: steps < 1, a schedule that ends after them, a ``prune`` that exchanges parameters.
        whatever ``train_step`` and ``prune`` raise. Model, gradients and optimizer are then what they
        were.
    """
    prune = prune or magnitude_
    op = "iterative_"
    expect_model(op, model)
    expect_optimizer(op, optimizer)
    expect_function(op, "train_step(step)", train_step)
    expect_function(op, "schedule(step) -> sparsity or None", schedule)
    expect_function(op, "prune(model, sparsity)", prune)
    whole(op, "steps", steps, 1)
    last = {Cubic: "end", OneShot: "at"}.get(type(schedule))
    if last is not None and getattr(schedule, last) >= steps:
        raise ValueError(
            f"{op}: expected {last} of the schedule < steps={steps}, got {getattr(schedule, last)}: it "
            "would not reach its final sparsity"
        )
    with _as_it_was(model, optimizer), progress(steps, label) as bar:
        hold_(model, optimizer)
        parameters = {name: id(p) for name, p in model.named_parameters()}
        for step in range(steps):
            sparsity = schedule(step)
            if sparsity is not None:
                prune(model, check_sparsity(op, sparsity))
                _check_same(op, parameters, model)
                bar.advance(f"{sparsity:.1%} pruned", steps=0)
            train_step(step)
            bar.advance()
    return report(model)


@contextmanager
def _as_it_was(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """After an error: weights, gradients, the optimizer's state and what holds masks under it."""
    saved = copy.deepcopy(optimizer.state_dict())
    held = optimizer.__dict__.get("_hold")
    grads = [(p, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    try:
        with Undo() as undo:
            for module in model.modules():
                undo.save(module)
            yield
    except BaseException:
        optimizer.load_state_dict(saved)
        for parameter, grad in grads:
            parameter.grad = grad
        if (hold := optimizer.__dict__.pop("_hold", None)) is not None and hold is not held:
            hold.remove()
        if held is not None:
            optimizer.__dict__["_hold"] = held
        raise


def _check_same(op: str, before: dict[str, int], model: nn.Module) -> None:
    """The optimizer would go on with parameters that the model has no more."""
    after = {name: id(p) for name, p in model.named_parameters()}
    if gone := sorted(name for name in before if after.get(name) != before[name]):
        raise ValueError(
            f"{op}: expected a prune that masks, got one that exchanged parameters, {gone[0]} first, "
            "which the optimizer still has; structured_(..., remove=False) masks: remove at the end"
        )


def soft_filter_(model: nn.Module, sparsity: float, *, layers: Layers = None) -> PruneReport:
    """Zeroes the filters of smallest 2-norm in each layer, without a mask: they keep training.

    Called once an epoch, a filter that was pruned may come back, and others go (He et al. 2018,
    https://arxiv.org/abs/1808.06866). In the end ``magnitude_(model, sparsity, pattern="rows")`` or
    :func:`structured_` makes it last.

    Args:
        sparsity: share of the filters of each layer, 0 to 1.
        layers: as in :func:`magnitude_`; None takes convolutions only.

    Raises:
        ValueError: as magnitude_. The model is then as it was.
    """
    op = "soft_filter_"
    check_sparsity(op, sparsity)
    if layers is None:

        def layers(name: str, module: nn.Module) -> bool:
            return isinstance(module, LAYERS) and not isinstance(module, nn.Linear)

    kind = Pattern("rows")
    chosen: list[Target] = targets(op, model, layers)
    units = units_of(op, chosen, [target.weight.detach() for target in chosen], kind)
    masks = choose(op, chosen, units, kind, [sparsity] * len(chosen), "layer")
    with Undo() as undo, torch.no_grad():
        for target, mask in zip(chosen, masks):
            undo.save(target.module)
            target.weight.masked_fill_(~mask, 0.0)
    return report(model)
