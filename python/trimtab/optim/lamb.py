"""LAMB."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from . import library, shards
from .base import FusedStep, StepOptions
from .groups import Run
from .plan import Plan


class LAMB(FusedStep):
    """Adam with a step length for each tensor (You et al., https://arxiv.org/abs/1904.00962).

        u = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * p
        p = p - lr * |p| / |u| * u

    The norms of p and u are sums in a fixed order, the same for any number of threads. Where one of
    them is 0 their ratio counts as 1. Those of DTensors are the whole tensor's, added up by processes
    between two launches, on a GPU by CUDA C++ only; a step waits for no GPU unless it clips or looks
    for NaN and Inf.

    Args:
        params: parameters, named parameters or groups
        lr: learning rate
        betas: of the averages m of the gradient and v of its square, which are Adam's
        eps: added to the denominator
        weight_decay: decoupled, inside the norm of u
        bias_correction: divide the averages by 1 - beta^t
        always_adapt: take the ratio in groups without weight decay too. The default leaves them at 1,
            as the paper's own code, apex and timm do for biases and the weights of norms.
        maximize: maximize the objective
        options: see :class:`StepOptions`
    """

    rule = "LAMB"
    numbers = ("lr", "betas", "eps", "weight_decay")
    flags = ("maximize", "bias_correction", "always_adapt")
    all_state_names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        bias_correction: bool = True,
        always_adapt: bool = False,
        maximize: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not 0.0 <= lr:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not 0.0 <= eps:
            raise ValueError(f"Invalid epsilon value: {eps}")
        for index, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
        if not 0.0 <= weight_decay:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "always_adapt": always_adapt,
            "maximize": maximize,
        }
        super().__init__(params, defaults)
        self._setup(options)

    def launch(self, plan: Plan, run: Run, call: library.Call, rows: np.ndarray) -> None:
        waits = run.runner.waits
        if not plan.rows.sharded or (waits and library.skips(call)):
            return super().launch(plan, run, call, rows)
        if waits:  # a GPU skips by itself, and the others' sums are nothing to it
            call.found_inf = None
        squares = torch.zeros(len(rows), 2, dtype=torch.float64, device=run.device)
        parts = run.runner.parts(call, rows, run.groups)
        parts.squares(call, squares)
        shards.add_up(
            (square, param, None)
            for square, param, away in zip(squares, plan.params, run.away)
            if not away
        )
        parts.step_by(call, squares)
