"""The table of tensors that an optimizer keeps between steps, and a step from it.

Building one checks everything and makes missing states. A step of an unchanged model costs a few
hundred nanoseconds a tensor: parameters and states are still the same objects, and their pointers.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import agree, device, library, shards
from .groups import Groups, Run
from .rows import Rows, parameters

if TYPE_CHECKING:
    from .base import FusedStep


class Plan:
    def __init__(self, optimizer: FusedStep) -> None:
        rows = self.rows = Rows(optimizer)
        self.name, self.params, self.pieces = rows.name, rows.params, rows.pieces
        self.table, self.dense, self.first = rows.table, rows.dense, rows.first
        self.runs = self._make_runs()
        self.waits = all(run.runner.waits for run in self.runs)
        rows.fill(optimizer)
        states = [state for state in optimizer.state.values() if isinstance(state, dict)]
        self.state_values = list(chain.from_iterable(map(dict.values, states)))
        self.piece_pointers = np.array([piece._cdata for piece in self.pieces], np.uint64)
        n = len(self.params)
        self.status = np.zeros(n, np.uint8)
        self.devices = np.full(n, -1, np.int32)  # as the library numbers them
        own = library.reads_gradients() and not rows.sharded and not rows.main_grads
        self.grad_handles = None if own else np.zeros(n, np.uint64)
        self.arguments = library.Gather(
            n,
            *(
                None if array is None else array.ctypes.data
                for array in (
                    rows.handles,
                    self.grad_handles,
                    rows.layouts,
                    rows.starts,
                    rows.is_new,
                    self.table,
                    self.status,
                    self.devices,
                )
            ),
        )
        self.arguments.lengths = rows.lengths.ctypes.data
        self.groups = Groups(optimizer)
        if self.runs:
            home = self.runs[0].device
            optimizer._skipped = optimizer._skipped.to(home)
            optimizer._norm = optimizer._norm.to(home)

    def _make_runs(self) -> list[Run]:
        """One a device, in the order of their first parameters."""
        places = [piece.device for piece in self.pieces]
        runs = []
        for place in dict.fromkeys(places):
            if place.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"{self.name}: a CUDA graph is being captured; expected a step of these parameters "
                    "and states before, outside of it"
                )
            away = np.array([other != place for other in places])
            groups = np.zeros(len(self.rows.groups), library.GROUP)
            runs.append(Run(place, device.runner(self.name, place), away, groups, {}))
        return runs

    def fits(self, optimizer: FusedStep) -> bool:
        """Whether parameters and states are still the objects this plan was made of."""
        if not self.groups.fits(optimizer):
            return False
        if not library.same_objects(parameters(optimizer), self.params):
            return False
        if self.rows.sharded and not library.same_objects(
            list(map(shards.local, self.params)), self.pieces
        ):
            return False
        return library.same_values(optimizer.state, self.state_values)

    def gather(self) -> bool:
        """Pointers of this step; False if the plan has to be made anew."""
        if self.grad_handles is not None:
            grads = [shards.local(self.rows.grad(param)) for param in self.params]
            self.grad_handles[:] = [0 if grad is None else grad._cdata for grad in grads]
        library.gather(self.arguments)
        counts = self.arguments.counts
        return not counts[library.NEW] and not counts[library.CHANGED]

    def step(self, optimizer: FusedStep) -> None:
        counts = self.arguments.counts
        agreed = agree.over_shards(optimizer, self.rows) if self.rows.sharded else None
        if counts[library.READY] + counts[library.IRREGULAR] == 0:
            return
        self.groups.refresh(self.runs)
        copies = []
        if counts[library.IRREGULAR]:
            for at in np.flatnonzero(self.status == library.IRREGULAR).tolist():
                grad = self.rows.regular(at)
                self.table["grad"][at] = grad.data_ptr()
                self.table["grad_dtype"][at] = library.DTYPES[grad.dtype]
                copies.append((at, grad))
        for at, dense in self.dense.items():
            dense.copy_(self.pieces[at])
        skipped = self._call(optimizer, agreed)
        params, pointers = self.pieces, self.piece_pointers
        if counts[library.NO_GRAD]:
            stepped = np.flatnonzero(self.table["grad"])
            params, pointers = [params[at] for at in stepped.tolist()], pointers[stepped]
        for at, dense in self.dense.items():
            if not skipped and self.table["grad"][at]:
                self.pieces[at].copy_(dense)
        for at, copy, dense in self.rows.copied:
            if not skipped and self.table["grad"][at]:
                copy.copy_(dense)
        if optimizer.zero_grads:
            for at, _ in copies:
                if (whole := self.rows.grad(self.params[at])) is not None:
                    whole.zero_()
        if skipped:
            self._forget_first(optimizer)
            return
        if self.first:
            self.first.clear()
            self.table["fresh"] = np.where(self.table["grad"] != 0, 0, self.table["fresh"])
        library.bump_versions(params, pointers)

    def _call(self, optimizer: FusedStep, agreed: agree.Terms | None = None) -> bool:
        """A call of the kernel a device; True if it is known that they skipped the step."""
        terms = agreed or agree.terms(optimizer)
        apart = len(self.runs) > 1
        if apart:
            terms = agree.over_devices(terms, self.rows, self.runs[0].device)
        could_skip = terms.skips or terms.found is not None
        asks = self.waits or (bool(self.first) and could_skip)
        before = int(optimizer._skipped) if asks else 0
        for run in self.runs:
            rows = self.table
            if apart:
                rows = self.table.copy()
                rows["grad"][run.away] = 0
            speaks = run is self.runs[0]
            numbers = [_number(value, run.device) for value in terms[:3]]
            scale, found, norm = (None if value is None else value.data_ptr() for value in numbers)
            call = library.Call(
                library.rule_number(optimizer.rule),
                int(optimizer.zero_grads),
                int(terms.skips),
                int(optimizer.torch_tails),
                rows.ctypes.data,
                len(rows),
                run.groups.ctypes.data,
                len(run.groups),
                scale,
                found,
                optimizer.max_grad_norm if terms.clips else -1.0,
                optimizer.ema_decay or 0.0,
                optimizer._norm.data_ptr() if terms.clips and speaks else None,
                optimizer._skipped.data_ptr() if speaks else None,
                norm,
                int(optimizer.clip_rounding == "torch"),
                0,
                int(optimizer.rounding == "stochastic"),
                optimizer.seed,
            )
            optimizer.launch(self, run, call, rows)
        return asks and int(optimizer._skipped) != before

    def _forget_first(self, optimizer: FusedStep) -> None:
        """After a skipped first step a momentum buffer still holds nothing."""
        for param, name in self.first:
            for key in (name, f"{name}_codes", f"{name}_scales"):
                optimizer.state[param].pop(key, None)
            if not optimizer.state[param]:
                del optimizer.state[param]
        if self.first:
            optimizer._plan = None


def _number(value: Any, place: torch.device) -> Tensor | None:
    """What GradScaler hands over, as a float32 on a device."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        return torch.full((), float(value), device=place)
    return value.to(place, torch.float32, non_blocking=place.type != "cpu").reshape(())
