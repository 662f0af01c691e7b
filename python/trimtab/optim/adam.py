"""Adam and its kin: Adam, AdamW, NAdam, RAdam, Adamax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .base import FusedStep, StepOptions

NUMBERS = ("lr", "betas", "eps", "weight_decay")


class Adam(FusedStep, torch.optim.Adam):
    """``torch.optim.Adam`` in one pass; its arguments, and those of :class:`StepOptions`.

    The same bits as torch's ``fused=True`` on the CPU (Kingma, https://arxiv.org/abs/1412.6980;
    amsgrad: https://openreview.net/forum?id=ryQu7f-RZ).
    """

    rule = "Adam"
    numbers = NUMBERS
    flags = ("maximize", "amsgrad", "decoupled_weight_decay")
    all_state_names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        torch.optim.Adam.__init__(
            self,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        self._setup(options)

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.all_state_names if group["amsgrad"] else self.all_state_names[:2]


class AdamW(Adam, torch.optim.AdamW):
    """``torch.optim.AdamW`` in one pass; its arguments, and those of :class:`StepOptions`.

    The same bits as torch's ``fused=True`` on the CPU (Loshchilov and Hutter,
    https://arxiv.org/abs/1711.05101).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        Adam.__init__(
            self,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            **options,
        )


class NAdam(FusedStep, torch.optim.NAdam):
    """``torch.optim.NAdam`` in one pass; its arguments, and those of :class:`StepOptions`.

    Dozat, "Incorporating Nesterov Momentum into Adam" (2016).
    """

    rule = "NAdam"
    numbers = (*NUMBERS, "momentum_decay")
    flags = ("maximize", "decoupled_weight_decay")
    product = "mu_product"
    all_state_names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        torch.optim.NAdam.__init__(
            self,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            momentum_decay,
            decoupled_weight_decay,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
        )
        self._setup(options)


class RAdam(FusedStep, torch.optim.RAdam):
    """``torch.optim.RAdam`` in one pass; its arguments, and those of :class:`StepOptions`.

    Liu et al., https://arxiv.org/abs/1908.03265
    """

    rule = "RAdam"
    numbers = NUMBERS
    flags = ("maximize", "decoupled_weight_decay")
    all_state_names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        torch.optim.RAdam.__init__(
            self,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            decoupled_weight_decay,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
        )
        self._setup(options)


class Adamax(FusedStep, torch.optim.Adamax):
    """``torch.optim.Adamax`` in one pass; its arguments, and those of :class:`StepOptions`.

    Kingma, https://arxiv.org/abs/1412.6980, section 7
    """

    rule = "Adamax"
    numbers = NUMBERS
    all_state_names = ("exp_avg", "exp_inf")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        torch.optim.Adamax.__init__(
            self,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            foreach,
            maximize=maximize,
            differentiable=differentiable,
            capturable=capturable,
        )
        self._setup(options)
