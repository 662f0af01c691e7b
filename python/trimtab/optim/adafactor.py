"""Adafactor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim._adafactor import adafactor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .base import StepOptions
from .matrix import MatrixStep


class Adafactor(MatrixStep, torch.optim.Adafactor):
    """``torch.optim.Adafactor`` with the options of :class:`StepOptions`; torch's bits.

    Its second moment is a row and a column (Shazeer and Stern, https://arxiv.org/abs/1804.04235).
    """

    rule = "Adafactor"
    numbers = ("lr", "beta2_decay", "eps", "d", "weight_decay")
    all_state_names = ("row_var", "col_var", "variance")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        torch.optim.Adafactor.__init__(
            self,
            params,
            lr,
            beta2_decay,
            eps,
            d,
            weight_decay,
            foreach=foreach,
            maximize=maximize,
        )
        if options.get("state_dtype") is not None:
            raise ValueError("Adafactor: its states have the gradient's dtype, no state_dtype")
        self._setup(options)

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.all_state_names

    def _check_states(self, state_dict: dict[str, Any]) -> None:
        for param, saved in self._saved_states(state_dict):
            shape = list(param.shape)
            want = {"variance": shape}
            if param.dim() > 1:
                row, column = [*shape[:-1], 1], [*shape[:-2], 1, shape[-1]]
                want = {"row_var": row, "col_var": column}
            got = {name: list(saved[name].shape) for name in want if name in saved}
            if got != want or "step" not in saved:
                raise ValueError(
                    f"Adafactor.load_state_dict: expected step and states of shapes {want}, got "
                    f"{sorted(map(str, saved))} with {got}: a state dict of another optimizer or model?"
                )

    def _update(self, group: dict[str, Any], grads: dict[Tensor, Tensor]) -> None:
        states = [self._state(param, grad) for param, grad in grads.items()]
        adafactor(
            list(grads),
            list(grads.values()),
            [state.get("row_var") for state in states],
            [state.get("col_var") for state in states],
            [state.get("variance") for state in states],
            [state["step"] for state in states],
            d=group["d"],
            lr=group["lr"],
            beta2_decay=group["beta2_decay"],
            weight_decay=group["weight_decay"],
            eps1=group["eps"][0],
            eps2=group["eps"][1],
            foreach=group["foreach"],
            maximize=group["maximize"],
        )

    def _state(self, param: Tensor, grad: Tensor) -> dict[str, Any]:
        state = self.state[param]
        if not state:
            state["step"] = torch.tensor(0.0)
            if grad.dim() > 1:
                state["row_var"] = grad.new_zeros([*grad.shape[:-1], 1])
                state["col_var"] = grad.new_zeros([*grad.shape[:-2], 1, grad.shape[-1]])
            else:
                state["variance"] = torch.zeros_like(grad)
        return state
