"""Accuracy after pruning: a CNN and a transformer on 5,000 MNIST digits, MiniLM's sentence embeddings.

Digits: per seed the dense model learns for DENSE steps; then it goes on as it is, pruned to 90 % on the
way (cubic schedule, magnitude, one ranking), and pruned to 2:4 at a quarter of the way, each for the
same number of steps with the same batches and learning rate. (A quarter: on folds of the training
digits that lost less than 2:4 at the start, or 3:4 there and 2:4 later.) Accuracy in per cent on 1,000
digits kept aside; the dense one that counts is the better of before and after.

Embeddings: all linear layers of all-MiniLM-L6-v2 pruned to 60 % in one shot; mean cosine to the dense
embedding, on passages that were not among the calibration data.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import fmean

import harness
import torch
from harness import Table
from torch import Tensor, nn

from trimtab import demo, demo_training, optim, prune
from trimtab.progress import progress

SEEDS = (0, 1, 2)
LR, DECAY = 2e-3, 0.05
BARS = {"90 %": 0.5, "2:4": 0.3}  # points that may be lost


@dataclass(frozen=True)
class Budget:
    """Steps of training, and texts."""

    dense: int = 300
    retrain: int = 400
    seeds: tuple[int, ...] = SEEDS
    texts: int = 64
    calibration: int = 96
    tokens: int = 128


QUICK = Budget(dense=40, retrain=30, seeds=(0,), texts=4, calibration=4, tokens=32)


def batches(count: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count // demo_training.BATCH * demo_training.BATCH].split(
            demo_training.BATCH
        )


class Trainer:
    """A model, its optimizer and its batches; the learning rate falls to zero along a cosine."""

    def __init__(
        self, model: nn.Module, images: Tensor, labels: Tensor, steps: int, seed: int
    ) -> None:
        self.model, self.images, self.labels = model, images, labels
        self.optimizer = optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY)
        self.cosine = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.batches = batches(len(images), seed)

    def step(self, _: int) -> None:
        at = next(self.batches)
        loss = nn.functional.cross_entropy(self.model(self.images[at]), self.labels[at])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.cosine.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Per cent."""
    return 100 * float((model.eval()(images).argmax(1) == labels).double().mean())


def all_layers(model: nn.Module, sparsity: float) -> None:
    prune.magnitude_(model, sparsity, scope="global")  # small layers keep more


def two_of_four(model: nn.Module, _: float) -> None:
    prune.magnitude_(model, pattern="2:4")


def digits(name: str, seed: int, budget: Budget) -> dict[str, tuple[float, float]]:
    """Accuracy and sparsity of each variant."""
    images, labels = demo_training.load()
    test = images[: demo_training.TEST], labels[: demo_training.TEST]
    train = images[demo_training.TEST :], labels[demo_training.TEST :]
    torch.manual_seed(seed)
    model = demo_training.MODELS[name]()
    first = Trainer(model, *train, budget.dense, 2 * seed)
    for step in progress(range(budget.dense), f"{name} {seed}: dense"):
        first.step(step)
    found = {"dense": (accuracy(model, *test), 0.0)}
    end = budget.retrain // 2
    cubic = prune.Cubic(0.9, begin=0, end=end, every=max(end // 45, 1))
    ways = {
        "dense, trained on": None,
        "90 %": (cubic, all_layers),
        "2:4": (prune.OneShot(0.5, at=budget.retrain // 4), two_of_four),
    }
    for way, plan in ways.items():
        twin = copy.deepcopy(model).train()
        again = Trainer(twin, *train, budget.retrain, 2 * seed + 1)
        if plan is None:
            for step in progress(range(budget.retrain), f"{name} {seed}: {way}"):
                again.step(step)
        else:
            schedule, method = plan
            prune.iterative_(
                twin,
                again.optimizer,
                again.step,
                budget.retrain,
                schedule,
                prune=method,
                label=f"{name} {seed}: {way}",
            )
        found[way] = accuracy(twin, *test), prune.report(twin).sparsity
    return found


def embeddings(budget: Budget) -> dict[str, tuple[float, float]]:
    """Mean cosine and sparsity of each criterion at 60 %."""
    model, tokenizer = demo.load("cpu")
    texts = demo.passages(budget.calibration + budget.texts, budget.tokens)
    known, new = texts[: budget.calibration], texts[budget.calibration :]
    inputs = demo.encode(tokenizer, known, budget.tokens, "cpu")
    asked = demo.encode(tokenizer, new, budget.tokens, "cpu")
    with torch.no_grad():
        truth = demo.embed(model, asked)
    found = {}
    for name in ("magnitude", "wanda", "sparsegpt"):
        twin = copy.deepcopy(model)
        given = () if name == "magnitude" else (inputs,)
        report = getattr(prune, f"{name}_")(twin, 0.6, *given)
        with torch.no_grad():
            found[name] = float((demo.embed(twin, asked) * truth).sum(1).mean()), report.sparsity
    return found


PARTS = (*demo_training.MODELS, "embeddings")


def measure_digits(name: str, budget: Budget, table: Table) -> None:
    runs = []
    for seed in budget.seeds:
        runs.append(digits(name, seed, budget))
        for way, (value, sparsity) in runs[-1].items():
            x = ("model,seed", f"{name},{seed}")
            kept = {"sparsity": round(sparsity, 6)}
            table.add("trimtab", way, x, value, metric="accuracy", unit="%", **kept)
            print(f"{name:<12} seed {seed}  {way:<18} {value:6.2f} %", flush=True)
    means = {way: fmean(run[way][0] for run in runs) for way in runs[0]}
    best = max(means["dense"], means["dense, trained on"])
    for way, value in means.items():
        bar = f" (bar {BARS[way]})" if way in BARS else ""
        print(
            f"{name:<12} mean    {way:<18} {value:6.2f} %, {best - value:+.2f} lost{bar}",
            flush=True,
        )


def measure_embeddings(budget: Budget, table: Table) -> None:
    for name, (cosine, sparsity) in embeddings(budget).items():
        print(f"MiniLM       {name:<18} {cosine:.4f} at {sparsity:.2%}", flush=True)
        x = ("model,sparsity", "all-MiniLM-L6-v2,0.6")
        kept = {"sparsity": round(sparsity, 6)}
        table.add("trimtab", name, x, cosine, metric="cosine", unit="1", **kept)


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="a part; all by default")
    parser.add_argument("--seed", type=int, action="append", help="of the digits; three by default")
    options = parser.parse_args()
    harness.start(options)
    torch.set_grad_enabled(True)
    budget = QUICK if options.quick else Budget()
    if options.seed:
        budget = replace(budget, seeds=tuple(options.seed))
    table = Table("prune", options.out)
    for part in options.only or PARTS:
        if part == "embeddings":
            measure_embeddings(budget, table)
        else:
            measure_digits(part, budget, table)
    table.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
