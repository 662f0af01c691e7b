"""Stochastic gradient descent: plain, with momentum, with Nesterov's look-ahead."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .base import FusedStep, StepOptions


class SGD(FusedStep, torch.optim.SGD):
    """``torch.optim.SGD`` in one pass; its arguments, and those of :class:`StepOptions`.

    The same bits as torch's for-loop and foreach in float32, at any length.
    """

    rule = "SGD"
    numbers = ("lr", "momentum", "dampening", "weight_decay")
    flags = ("maximize", "nesterov")
    counts_steps = False
    all_state_names = ("momentum_buffer",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        torch.optim.SGD.__init__(
            self,
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        self._setup(options)

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()
