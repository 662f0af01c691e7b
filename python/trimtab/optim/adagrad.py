"""Adagrad."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .base import FusedStep, StepOptions


class Adagrad(FusedStep, torch.optim.Adagrad):
    """``torch.optim.Adagrad`` in one pass; its arguments, and those of :class:`StepOptions`.

    The same bits as torch's ``fused=True`` on the CPU (Duchi et al.,
    http://jmlr.org/papers/v12/duchi11a.html).
    """

    rule = "Adagrad"
    numbers = ("lr", "lr_decay", "weight_decay", "eps")
    all_state_names = ("sum",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        torch.optim.Adagrad.__init__(
            self,
            params,
            lr,
            lr_decay,
            weight_decay,
            initial_accumulator_value,
            eps,
            foreach,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
        )
        self._setup(options)

    def new_state(self, name: str, param: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.full_like(like, self.defaults["initial_accumulator_value"], dtype=dtype)
