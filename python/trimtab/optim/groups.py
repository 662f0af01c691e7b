"""The param groups as the kernels read them, for each device that has parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import library
from .device import Runner

if TYPE_CHECKING:
    from .base import FusedStep


@dataclass
class Run:
    """The parameters of one device: a call a step."""

    device: torch.device
    runner: Runner
    away: np.ndarray  # [n] whether a parameter is on another device
    groups: np.ndarray  # tt_optim_group, as this device reads them
    # lr as this device reads it, by number of the group, where a group's own tensor can't be read there
    rates: dict[int, Tensor]


class Groups:
    def __init__(self, optimizer: FusedStep) -> None:
        extra = ("l1",) if "l1" in optimizer.defaults else ()
        self.groups = optimizer.param_groups
        self.keys = (*optimizer.numbers, *extra, *optimizer.flags)
        self.flags = frozenset(optimizer.flags)
        self.entries = itemgetter(*self.keys)
        self.values: list[tuple[Any, ...]] = []
        self.live = False  # a hyper-parameter is a tensor, whose value can change by itself
        self.table = np.zeros(len(self.groups), library.GROUP)
        self.rates: dict[int, Tensor] = {}  # lr of a group, where it is a tensor on a GPU

    def fits(self, optimizer: FusedStep) -> bool:
        return self.groups is optimizer.param_groups and len(self.table) == len(self.groups)

    def refresh(self, runs: list[Run]) -> None:
        """Hyper-parameters from the param groups, if any changed."""
        values = list(map(self.entries, self.groups))
        if not self.live and values == self.values:
            return self._refresh_rates(runs)
        self.values = values
        self.live = False
        self.rates = {}
        table = self.table
        flags = np.zeros(len(values), np.int64)
        for key, column in zip(self.keys, zip(*values)):
            if key in self.flags:
                flags |= np.where(np.array(column, bool), library.FLAGS[key], 0)
            elif key == "betas":
                self.live |= any(isinstance(v, Tensor) for pair in column for v in pair)
                table["beta1"] = [float(pair[0]) for pair in column]
                table["beta2"] = [float(pair[1]) for pair in column]
            elif key == "lr":
                waits = any(run.runner.waits for run in runs)
                table[key] = [self._rate(number, lr, waits) for number, lr in enumerate(column)]
            else:
                self.live |= any(isinstance(value, Tensor) for value in column)
                table[key] = [float(value) for value in column]
        table["flags"] = flags
        for run in runs:
            run.groups[:] = table
        self._refresh_rates(runs)

    def _rate(self, number: int, lr: Any, waits: bool) -> float:
        """lr of a group; NaN where it is read on a GPU when the step is made."""
        if not isinstance(lr, Tensor):
            return float(lr)
        if lr.device.type == "cpu" or waits:
            self.live = True
            return float(lr)
        self.rates[number] = lr
        return math.nan

    def _refresh_rates(self, runs: list[Run]) -> None:
        for run in runs:
            for number, lr in self.rates.items():
                if lr.device == run.device and lr.dtype == torch.float32 and lr.numel() == 1:
                    kept = lr
                else:
                    kept = run.rates.setdefault(number, torch.zeros((), device=run.device))
                    kept.copy_(lr.reshape(()), non_blocking=True)
                run.groups["lr_tensor"][number] = kept.data_ptr()
