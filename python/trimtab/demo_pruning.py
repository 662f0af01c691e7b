"""The demo's pruning part: the CNN of demo_training.py pruned step by step, swapped, timed.

One run of trimtab.prune.iterative_ stops at each level of sparsity, retrains there and leaves a copy;
the dense model goes on learning beside it, on the same batches, so that neither has learned longer.
Then trimtab.swap_ takes each copy, once with exact values only and once with int8 allowed, and what it
made takes turns with the dense model and with trimtab.Int8.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import optim, prune
from .demo_figures import held_bytes, spread
from .demo_training import BATCH, OPTIONS, TEST, Cnn, batches, load
from .progress import progress
from .swap import Int8, Sparse, swap_

LEVELS = (0.5, 0.8, 0.9, 0.95)
WAYS = {"sparse": Sparse("bitmap"), "sparse or int8": Sparse("bitmap", int8=True)}
DENSE, INT8 = "dense fp32", "int8"
LEAST_STEPS = 4  # at each level
SECONDS = 12  # of learning, where a slow machine takes fewer steps
SECONDS_OF_ROUNDS = 4  # of timing; never fewer than three rounds
ROUNDS = 30
ALONE = 4  # calls with one image that are timed together: one is too short


@dataclass
class Pruning:
    """One model and what was measured of it.

    Attributes:
        sparsity: share of all convolution and linear weights that are zero.
        choices: of each layer, first to last: "dense", "sparse", "int8" or "sparse int8".
        batch_ms, batch_p20, batch_p80: milliseconds of a batch of 64; median and percentiles.
        one_ms, one_p20, one_p80: the same of one image.
        weight_bytes: that parameters and buffers keep in memory.
        accuracy: on the digits kept aside, 0 to 1.
        steps: of training, those without pruning included.
    """

    name: str
    sparsity: float
    steps: int
    accuracy: float = 0.0
    weight_bytes: int = 0
    choices: list[str] = field(default_factory=list)
    rounds: int = 0
    batch_ms: float = 0.0
    batch_p20: float = 0.0
    batch_p80: float = 0.0
    one_ms: float = 0.0
    one_p20: float = 0.0
    one_p80: float = 0.0


@dataclass
class Level:
    """The model as it was when so much of it was pruned, after so many steps; without masks."""

    model: nn.Module
    sparsity: float
    steps: int


class Learner:
    """A CNN under trimtab's AdamW; the learning rate falls along a line in each stretch of steps."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.model, self.images, self.labels = model, images, labels
        self.optimizer = optim.AdamW(model.parameters(), **OPTIONS)
        self.steps = 0

    def step(self, batch: Tensor, left: float) -> None:
        """``left``: the share of the stretch that is still to come, 1 to 0."""
        for group in self.optimizer.param_groups:
            group["lr"] = OPTIONS["lr"] * max(left, 0.02)
        loss = nn.functional.cross_entropy(self.model(self.images[batch]), self.labels[batch])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.steps += 1


def run(steps: int) -> list[Pruning]:
    """Learns for ``steps`` steps, prunes in some more, measures; fewer where time runs out."""
    images, labels = load()
    before = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        levels = learn(images[TEST:], labels[TEST:], steps)
    finally:
        torch.set_rng_state(before)
    rows, models = swapped(levels, images[:BATCH])
    with torch.inference_mode():
        for row, model in zip(rows, models):
            look(row, model, images[:TEST], labels[:TEST])
        time_all(rows, models, images)
    return rows


# --- learning


def learn(images: Tensor, labels: Tensor, steps: int) -> list[Level]:
    """The dense model, then the pruned ones."""
    begin = time.monotonic()
    order = batches(len(images))
    first = Learner(Cnn(), images, labels)
    for done in progress(range(steps), "dense CNN"):
        if done >= LEAST_STEPS and time.monotonic() - begin > SECONDS / 3:
            break
        first.step(next(order), 1 - done / steps)
    each = (time.monotonic() - begin) / first.steps
    affordable = int(SECONDS * 2 / 3 / (2 * each * len(LEVELS)))
    stretch = max(LEAST_STEPS, min(steps // 3, affordable))
    pruned = prune_on(first, order, stretch)
    return [Level(first.model.eval(), 0.0, first.steps), *pruned]


def prune_on(first: Learner, order: Iterator[Tensor], stretch: int) -> list[Level]:
    """A copy of ``first``, pruned level by level, ``stretch`` steps each; ``first`` learns on too."""
    twin = Learner(copy.deepcopy(first.model), first.images, first.labels)
    twin.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    twin.steps = first.steps
    found: list[Level] = []

    def both(step: int) -> None:
        batch, inside = next(order), step % stretch
        for learner in (first, twin):
            learner.step(batch, 1 - inside / stretch)
        if inside == stretch - 1:
            model = copy.deepcopy(twin.model).eval()
            found.append(Level(model, prune.report(model).sparsity, twin.steps))
            prune.finalize_(model)

    prune.iterative_(
        twin.model,
        twin.optimizer,
        both,
        stretch * len(LEVELS),
        schedule(stretch),
        prune=all_layers,
        label="prune and retrain",
    )
    return found


def schedule(stretch: int) -> prune.Schedule:
    """Cubic to each level in the first half of its stretch; the other half only retrains."""
    parts = [
        prune.Cubic(
            level,
            begin=i * stretch,
            end=i * stretch + stretch // 2,
            every=max(stretch // 12, 1),
            initial=LEVELS[i - 1] if i else 0.0,
        )
        for i, level in enumerate(LEVELS)
    ]

    def sparsity(step: int) -> float | None:
        return next((s for part in parts if (s := part(step)) is not None), None)

    return sparsity


def all_layers(model: nn.Module, sparsity: float) -> None:
    prune.magnitude_(model, sparsity, scope="global")  # one ranking: small layers keep more


# --- measuring


def swapped(levels: list[Level], images: Tensor) -> tuple[list[Pruning], list[nn.Module]]:
    """The dense model, its int8, and of each pruned one what swap_ makes of it for these images."""
    dense, *pruned = levels
    rows, models = [Pruning(DENSE, dense.sparsity, dense.steps)], [dense.model]
    jobs: list[tuple[str, Level, Int8 | Sparse]] = [(INT8, dense, Int8())]
    jobs += [(name, level, way) for level in pruned for name, way in WAYS.items()]
    with progress(len(jobs), "swap_") as bar:
        for name, level, config in jobs:
            bar.advance(name, steps=0)
            twin = copy.deepcopy(level.model)
            with torch.no_grad():
                swap_(twin, config, example_inputs=images).release()
            rows.append(Pruning(name, level.sparsity, level.steps))
            models.append(twin)
            bar.advance()
    return rows, models


def look(row: Pruning, model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Fills in what needs no clock."""
    row.accuracy = float((model(images).argmax(1) == labels).double().mean())
    row.weight_bytes = held_bytes(model)
    row.choices = [choice(m) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def choice(layer: nn.Module) -> str:
    """What swap_ left or put there."""
    kind = type(layer).__name__
    if kind.startswith("Sparse"):
        return "sparse int8" if layer.int8 else "sparse"
    return "int8" if kind.startswith("Int8") else "dense"


def time_all(rows: list[Pruning], models: list[nn.Module], images: Tensor) -> None:
    """Fills in the times. Models take turns, so that a slow moment hits all of them."""
    batch, one = images[:BATCH], images[:1]
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in models]
    for model in models:
        model(batch), model(one)
    begin = time.monotonic()
    for done in progress(range(ROUNDS), "timing pruned models"):
        if done >= 3 and time.monotonic() - begin > SECONDS_OF_ROUNDS:
            break
        for model, (of_batch, of_one) in zip(models, times):
            of_batch.append(milliseconds(model, batch, 1))
            of_one.append(milliseconds(model, one, ALONE))
    for row, (of_batch, of_one) in zip(rows, times):
        row.rounds = len(of_batch)
        row.batch_p20, row.batch_ms, row.batch_p80 = spread(of_batch)
        row.one_p20, row.one_ms, row.one_p80 = spread(of_one)


def milliseconds(model: nn.Module, images: Tensor, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        model(images)
    return (time.perf_counter() - start) * 1e3 / calls
