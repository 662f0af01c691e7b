"""What the optimizer tests share: twins of ours and torch's, fed the same gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

SIZES = (1, 3, 7, 17, 64, 1000, 4099)  # tails of every kind, and a tensor of more than one block

# (class name, options of torch's own) with each flag of a class in at least one row.
COMMON: tuple[dict[str, Any], ...] = ({}, {"weight_decay": 0.1}, {"maximize": True, "lr": 0.05})
ADAM: tuple[dict[str, Any], ...] = (
    *COMMON,
    {"amsgrad": True, "weight_decay": 0.1},
    {"betas": (0.4, 0.3)},
    {"capturable": True, "eps": 1e-4, "betas": (0.8, 0.95), "maximize": True, "amsgrad": True},
)
OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "SGD": (
        *COMMON,
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
    ),
    "Adam": (*ADAM, {"decoupled_weight_decay": True, "weight_decay": 0.2}),
    "AdamW": ADAM,
    "Adagrad": (*COMMON, {"lr_decay": 0.01, "initial_accumulator_value": 0.1, "eps": 1e-3}),
    "RMSprop": (
        *COMMON,
        {"momentum": 0.9},
        {"centered": True, "alpha": 0.9, "weight_decay": 0.1},
        {"centered": True, "momentum": 0.5, "maximize": True},
    ),
    "NAdam": (
        *COMMON,
        {"momentum_decay": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ),
    "RAdam": (
        *COMMON,
        {"betas": (0.9, 0.9)},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
    ),
    "Adamax": (*COMMON, {"betas": (0.5, 0.9)}),
    "Lion": COMMON,
}


def ident(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{k}={v}".replace(" ", "") for k, v in value.items()) or "defaults"
    return str(value).removeprefix("torch.")


def parameters(
    sizes: Sequence[Any] = SIZES, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in sizes]


def clones(params: Sequence[torch.Tensor]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def set_gradients(step: int, *twins: Sequence[torch.Tensor], scale: float = 1.0) -> None:
    """The same random gradient for the i-th parameter of each list."""
    generator = torch.Generator().manual_seed(1000 + step)
    for same in zip(*twins):
        grad = torch.randn(same[0].shape, generator=generator) * scale
        for p in same:
            p.grad = grad.to(p.dtype, copy=True)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.detach().view(bits), b.detach().view(bits))


def assert_same(ours: Any, theirs: Any) -> None:
    """Parameters and states of two optimizers have the same bits."""
    pairs = [
        (p, q)
        for a, b in zip(ours.param_groups, theirs.param_groups)
        for p, q in zip(a["params"], b["params"])
    ]
    for i, (p, q) in enumerate(pairs):
        assert same_bits(p, q), f"parameter {i} [{p.numel()}]: {int((p != q).sum())} differ"
        assert ours.state[p].keys() == theirs.state[q].keys()
        for key, value in theirs.state[q].items():
            assert same_bits(ours.state[p][key], value), f"{key} of parameter {i} [{p.numel()}]"


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """Largest distance of two fp32 tensors, in steps of the ordered floats."""

    def order(x: torch.Tensor) -> torch.Tensor:
        bits = x.detach().view(torch.int32).to(torch.int64)
        return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    return int((order(a) - order(b)).abs().max()) if a.numel() else 0
