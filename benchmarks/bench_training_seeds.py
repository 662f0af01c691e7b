"""The loss after training with small optimizer states, over seeds, against fp32's.

The demo's models learn the digits from several seeds: other first weights, another order of batches.
Within a seed all optimizers see the same. A rule that costs nothing ends, on average, no further from
fp32 than the seeds' own standard deviation. Reported is the mean loss of the last epoch.
"""

from __future__ import annotations

import sys
from itertools import islice
from statistics import fmean, stdev

import harness
import torch
from harness import Table

from trimtab import optim
from trimtab.demo_training import (
    BATCH,
    MODELS,
    OPTIONS,
    TEST,
    VARIANTS,
    Learner,
    Variant,
    batches,
    load,
)

SEEDS, EPOCHS = 5, 3
COMPARED = (
    Variant("trimtab AdamW", lambda p: optim.AdamW(p, **OPTIONS)),
    *VARIANTS[2:],
    Variant(
        "trimtab, 8-bit state, stochastic",
        lambda p: optim.AdamW(p, **OPTIONS, state_dtype="int8", rounding="stochastic"),
    ),
)


def train(
    model: str, seed: int, steps: int, data: tuple[torch.Tensor, torch.Tensor]
) -> list[Learner]:
    images, labels = data
    torch.manual_seed(seed)
    start = MODELS[model]()
    learners = [Learner(model, variant, start) for variant in COMPARED]
    for batch in islice(batches(len(images), seed), steps):
        for learner in learners:
            learner.step(images[batch], labels[batch])
    return learners


def report(model: str, losses: dict[str, list[float]]) -> None:
    base = losses[COMPARED[0].name]
    noise = stdev(base)
    for name, values in losses.items():
        gap = fmean(values) - fmean(base)
        line = f"{model:<12} {name:<34} loss {fmean(values):.4f} +- {stdev(values):.4f}"
        print(
            f"{line}   gap {gap:+.4f}, {abs(gap) / noise:.2f} of the seeds' deviation", flush=True
        )


def main() -> int:
    options = harness.parser(__doc__.partition("\n")[0]).parse_args()
    harness.start(options)
    torch.set_grad_enabled(True)
    table = Table("training_seeds", options.out)
    images, labels = load()
    data = images[TEST:], labels[TEST:]
    epoch = 1 if options.quick else len(data[0]) // BATCH
    for model in MODELS:
        losses: dict[str, list[float]] = {variant.name: [] for variant in COMPARED}
        for seed in range(2 if options.quick else SEEDS):
            for learner in train(model, seed, epoch * EPOCHS, data):
                name, loss = learner.variant.name, fmean(learner.result.losses[-epoch:])
                losses[name].append(loss)
                x = ("seed", str(seed))
                table.add(name, model, x, loss, metric="loss", unit="1", steps=epoch * EPOCHS)
        report(model, losses)
    table.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
