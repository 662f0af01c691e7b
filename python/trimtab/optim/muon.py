"""Muon, and the split of a model between it and AdamW."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, DEFAULT_NS_STEPS, EPS, muon
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .adam import AdamW
from .base import StepOptions
from .matrix import MatrixStep


class Muon(MatrixStep, torch.optim.Muon):
    """``torch.optim.Muon`` with the options of :class:`StepOptions`; torch's bits.

    Momentum whose singular values Newton-Schulz iterations bring near 1 (Jordan,
    https://kellerjordan.github.io/posts/muon/). For matrices only; see :func:`split_muon`.
    """

    rule = "Muon"
    numbers = ("lr", "weight_decay", "momentum")
    flags = ("nesterov",)
    counts_steps = False
    all_state_names = ("momentum_buffer",)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (DEFAULT_A, DEFAULT_B, DEFAULT_C),
        eps: float = EPS,
        ns_steps: int = DEFAULT_NS_STEPS,
        adjust_lr_fn: str | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        torch.optim.Muon.__init__(
            self,
            params,
            lr,
            weight_decay,
            momentum,
            nesterov,
            ns_coefficients,
            eps,
            ns_steps,
            adjust_lr_fn,
        )
        if options.get("state_dtype") is not None:
            raise ValueError("Muon: its momentum has the gradient's dtype, no state_dtype")
        self._setup(options)

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.all_state_names

    def _update(self, group: dict[str, Any], grads: dict[Tensor, Tensor]) -> None:
        for param, grad in grads.items():
            if "momentum_buffer" not in self.state[param]:
                self.state[param]["momentum_buffer"] = torch.zeros_like(grad)
        muon(
            list(grads),
            list(grads.values()),
            [self.state[param]["momentum_buffer"] for param in grads],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            ns_coefficients=group["ns_coefficients"],
            eps=group["eps"],
            ns_steps=group["ns_steps"],
            adjust_lr_fn=group["adjust_lr_fn"],
            has_complex=False,
        )


def split_muon(
    model: nn.Module,
    muon: dict[str, Any] | None = None,
    adamw: dict[str, Any] | None = None,
    exclude: Iterable[nn.Parameter] = (),
) -> tuple[Muon, AdamW]:
    """Muon for the matrices of a model, AdamW for everything else.

    Embeddings are looked up, not multiplied, and go to AdamW with vectors, scalars and convolutions;
    so does what ``exclude`` names, which should be the output layer (Jordan; Liu et al.,
    https://arxiv.org/abs/2502.16982).

    Args:
        model: its parameters that require a gradient are split
        muon, adamw: keywords of the two optimizers
        exclude: matrices that go to AdamW all the same

    Raises:
        ValueError: one of the two would have no parameter.
    """
    out = {id(param) for param in exclude}
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            out.add(id(module.weight))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [(name, p) for name, p in named if p.dim() == 2 and id(p) not in out]
    taken = {id(p) for _, p in matrices}
    others = [(name, p) for name, p in named if id(p) not in taken]
    if not matrices or not others:
        raise ValueError(
            f"split_muon: expected matrices and other parameters, got {len(matrices)} and "
            f"{len(others)}; take Muon or AdamW alone"
        )
    return Muon(matrices, **(muon or {})), AdamW(others, **(adamw or {}))
