"""The table of tensors that an optimizer keeps between steps, and a step from it.

Building one checks everything and makes missing states. A step of an unchanged model costs a few
hundred nanoseconds a tensor: parameters and states are still the same objects, and their pointers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain, pairwise
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import device, library, memory, shards
from .device import Runner

if TYPE_CHECKING:
    from .base import FusedStep


def _parameters(optimizer: FusedStep) -> list[Tensor]:
    return list(chain.from_iterable(map(itemgetter("params"), optimizer.param_groups)))


@dataclass
class Run:
    """The parameters of one device: a call a step."""

    device: torch.device
    runner: Runner
    away: np.ndarray  # [n] whether a parameter is on another device
    groups: np.ndarray  # tt_optim_group, as this device reads them
    # lr as this device reads it, by number of the group, where a group's own tensor can't be read there
    rates: dict[int, Tensor]


class Plan:
    def __init__(self, optimizer: FusedStep) -> None:
        self.name = type(optimizer).__name__
        self.main_grads = optimizer.main_grads
        self.params = _parameters(optimizer)
        # What this process holds of each: the parameter itself, or its piece of a DTensor.
        self.pieces = list(map(shards.local, self.params))
        self.sharded = not library.same_objects(self.pieces, self.params)
        if self.sharded and optimizer.rule == "LAMB":
            raise RuntimeError(
                f"{self.name}: a DTensor; its step needs the norm of the whole tensor"
            )
        if self.sharded and optimizer.clip_rounding != "folded":
            raise RuntimeError(f'{self.name}: clip_rounding="torch" is not there for DTensors')
        self.groups = optimizer.param_groups
        n = len(self.params)
        self.runs = self._make_runs()
        self.waits = all(run.runner.waits for run in self.runs)
        self.table = np.zeros(n, library.TENSOR)
        self.handles = np.zeros((n, library.SLOTS), np.uint64)
        self.is_new = np.zeros(n, np.uint8)
        self.status = np.zeros(n, np.uint8)
        self.masks: dict[int, Tensor] = {}
        self.kept: list[Tensor] = []  # what the handles point to
        self.dense: dict[int, Tensor] = {}  # copies of parameters with gaps between their elements
        self.first: list[tuple[Tensor, str]] = []  # states that this plan made without contents
        layouts: list[int] = []
        starts: list[int] = []
        at = 0
        for number, group in enumerate(optimizer.param_groups):
            names = optimizer.state_names(group)
            for param in group["params"]:
                self.handles[at, library.OWNER] = param._cdata
                starts.append(len(layouts))
                if self._grad(param) is None and not optimizer.state.get(param):
                    self.is_new[at] = 1
                    layouts.append(0)
                else:
                    like = self._check(at, param)
                    layouts += [like.dim(), *like.shape, *like.stride()]
                    self.table["group"][at] = number
                    self._fill(optimizer, at, param, like, names)
                at += 1
        self._check_overlap()
        self.layouts = np.array(layouts, np.int64)
        self.starts = np.array(starts, np.int64)
        states = [state for state in optimizer.state.values() if isinstance(state, dict)]
        self.state_values = list(chain.from_iterable(map(dict.values, states)))
        self.devices = np.full(n, -1, np.int32)  # as the library numbers them
        own = library.reads_gradients() and not self.sharded and not self.main_grads
        self.grad_handles = None if own else np.zeros(n, np.uint64)
        self.arguments = library.Gather(
            n,
            *(
                None if array is None else array.ctypes.data
                for array in (
                    self.handles,
                    self.grad_handles,
                    self.layouts,
                    self.starts,
                    self.is_new,
                    self.table,
                    self.status,
                    self.devices,
                )
            ),
        )
        self._numbers(optimizer)
        if self.runs:
            home = self.runs[0].device
            optimizer._skipped = optimizer._skipped.to(home)
            optimizer._norm = optimizer._norm.to(home)

    # --- building

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
            groups = np.zeros(len(self.groups), library.GROUP)
            runs.append(Run(place, device.runner(self.name, place), away, groups, {}))
        return runs

    def _grad(self, param: Tensor) -> Tensor | None:
        main = getattr(param, "main_grad", None) if self.main_grads else None
        return param.grad if main is None else main

    def _where(self, at: int) -> str:
        """Words for parameter `at`, for messages."""
        for number, group in enumerate(self.groups):
            if at < len(group["params"]):
                name = f" ({group['param_names'][at]})" if "param_names" in group else ""
                return f"parameter {at} of group {number}{name}"
            at -= len(group["params"])
        return "a parameter"

    def _check(self, at: int, param: Tensor) -> Tensor:
        """A tensor with the layout that the parameter's states take: itself if it has no gaps."""
        where = f"{self.name}: {self._where(at)}"
        if any(p.is_partial() for p in getattr(param, "placements", ())):
            raise RuntimeError(f"{where}: a DTensor whose pieces are still to be summed")
        param = self.pieces[at]
        if param.dtype not in library.DTYPES:
            raise RuntimeError(
                f"{where}: expected float32, bfloat16 or float16, got {param.dtype}; "
                f"torch.optim.{self.name} takes others"
            )
        if param.layout != torch.strided:
            raise RuntimeError(f"{where}: expected a dense tensor, got {param.layout}")
        if param.is_contiguous():
            return param
        if any(s == 0 and n > 1 for s, n in zip(param.stride(), param.shape)):
            raise RuntimeError(
                f"{where}: several of its elements share memory (strides {param.stride()})"
            )
        like = torch.empty_like(param)  # keeps the strides of a tensor without gaps
        if like.stride() == param.stride():
            return param
        self.dense[at] = like
        return like

    def _fill(
        self,
        optimizer: FusedStep,
        at: int,
        param: Tensor,
        like: Tensor,
        names: tuple[str, ...],
    ) -> None:
        row = self.table[at]
        state = optimizer.state[param]
        fresh = not state
        row["numel"] = like.numel()
        row["param_dtype"] = library.DTYPES[param.dtype]
        buffers = {"momentum_buffer", "momentum_buffer_codes"}
        row["fresh"] = int("momentum_buffer" in names and not buffers & state.keys())
        if row["fresh"] and optimizer.rule == "SGD":
            self.first.append((param, "momentum_buffer"))
        tensors: dict[int, Tensor] = {library.PARAM: like}
        if optimizer.counts_steps or optimizer.rounding == "stochastic":
            tensors[library.STEP] = self._scalar(state, "step", 0.0, like.device)
        if optimizer.product:
            tensors[library.PRODUCT] = self._scalar(state, optimizer.product, 1.0, like.device)
        dtype = optimizer.state_dtype or self._state_dtype(state, names, param)
        if dtype == torch.int8:
            dtype = torch.float32
        if names and memory.is_coded(optimizer, param):
            self._fill_codes(optimizer, at, param, like, names, tensors)
        else:
            row["state_dtype"] = library.DTYPES[dtype]
            for slot, name in enumerate(names):
                value = state.get(name)
                if value is None:
                    value = optimizer.new_state(name, param, like, dtype)
                tensors[library.STATE + slot] = self._keep(state, name, value, param, like, dtype)
        self._fill_master(optimizer, at, param, like, tensors)
        if optimizer.ema_decay is not None:
            value = state.get("ema")
            value = torch.clone(self.pieces[at].detach()) if value is None else value
            tensors[library.EMA] = self._keep(state, "ema", value, param, like, torch.float32)
        elif "ema" in state and fresh:
            del state["ema"]
        if (mask := optimizer._masks.get(param)) is not None:
            mask = shards.piece(mask, param, f"{self.name}.set_mask")
            tensors[library.MASK] = self.masks[at] = self._as(mask, like, torch.bool)
        if (copy := optimizer._copies.get(param)) is not None:
            tensors[library.COPY] = shards.piece(copy, param, f"{self.name}.set_copy")
            row["copy_dtype"] = library.DTYPES[copy.dtype]
        for slot, tensor in tensors.items():
            self.handles[at, slot] = tensor._cdata
            self.kept.append(tensor)

    def _fill_codes(
        self,
        optimizer: FusedStep,
        at: int,
        param: Tensor,
        like: Tensor,
        names: tuple[str, ...],
        tensors: dict[int, Tensor],
    ) -> None:
        """8-bit states; of a DTensor those of this process's piece, in blocks of their own."""
        state = optimizer.state[param]
        for name in names:
            if shards.is_sharded(param) and isinstance(state.get(name), Tensor):  # a checkpoint's
                state[name] = shards.piece(state[name], param, f"{self.name}: {name}")
        self.table["state_dtype"][at] = library.DYNAMIC8
        for slot, name in enumerate(names):

            def make(name: str = name) -> Tensor:
                return optimizer.new_state(name, param, like, torch.float32)

            codes, scales = memory.keep_codes(state, name, like, make)
            tensors[library.STATE + slot], tensors[library.SCALE + slot] = codes, scales

    def _fill_master(
        self,
        optimizer: FusedStep,
        at: int,
        param: Tensor,
        like: Tensor,
        tensors: dict[int, Tensor],
    ) -> None:
        """What a bf16 parameter keeps beside itself; a float32 one needs nothing."""
        if optimizer.master == "none" or param.dtype == torch.float32:
            return
        kind, name, dtype = memory.MASTERS[optimizer.master]
        if param.dtype != torch.bfloat16:
            raise RuntimeError(
                f"{self.name}: {self._where(at)}: expected bfloat16 or float32 with "
                f'master="{optimizer.master}", got {param.dtype}'
            )
        state = optimizer.state[param]
        self.table["master_kind"][at] = kind
        value = state.get(name)
        if value is None:
            value = torch.zeros_like(like, dtype=dtype)
        tensors[library.MASTER] = self._keep(state, name, value, param, like, dtype)

    def _keep(
        self,
        state: dict[str, Any],
        name: str,
        value: Tensor,
        param: Tensor,
        like: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """Puts a state of that dtype and layout in its place; returns what this process has of it."""
        given = value
        known = state.get(name) is not None
        if known:
            value = shards.piece(value, param, f"{self.name}: {name}")
        right = self._as(value, like, dtype)
        if not known or right is not value:
            given = shards.like(right, param)
        state[name] = given
        return right

    @staticmethod
    def _state_dtype(state: dict[str, Any], names: tuple[str, ...], param: Tensor) -> torch.dtype:
        """What the states have, if that is one dtype of ours; else the parameter's, as in torch."""
        found = {state[name].dtype for name in names if isinstance(state.get(name), Tensor)}
        return found.pop() if len(found) == 1 and found <= library.DTYPES.keys() else param.dtype

    @staticmethod
    def _scalar(state: dict[str, Any], name: str, initial: float, place: torch.device) -> Tensor:
        value = state.get(name)
        right = isinstance(value, Tensor) and value.dtype == torch.float32 and value.dim() == 0
        if value is None or not right or value.device != place:
            number = float(initial if value is None else value)
            state[name] = torch.full((), number, device=place)
            if value is None and len(state) > 1:  # torch's order: step first
                others = {key: state.pop(key) for key in list(state) if key != name}
                state.update(others)
        return state[name]

    @staticmethod
    def _as(value: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor itself if it has that dtype and layout, else a copy that has."""
        if value.dtype == dtype and value.stride() == like.stride() and value.device == like.device:
            return value
        return torch.empty_like(like, dtype=dtype).copy_(value)

    def _check_overlap(self) -> None:
        """No two parameters may share memory: one would be stepped twice, by two threads at once."""
        spans = [
            (param.data_ptr(), param.data_ptr() + param.numel() * param.element_size(), at)
            for at, param in enumerate(self.pieces)
            if not self.is_new[at] and at not in self.dense and param.numel()
        ]
        spans.sort()
        for (_, end, left), (begin, _, right) in pairwise(spans):
            if begin < end:
                first, second = sorted((left, right))
                raise ValueError(
                    f"{self.name}: {self._where(first)} and {self._where(second)} share memory; "
                    "it would be stepped twice"
                )

    def _numbers(self, optimizer: FusedStep) -> None:
        extra = ("l1",) if "l1" in optimizer.defaults else ()
        self.keys = (*optimizer.numbers, *extra, *optimizer.flags)
        self.flags = frozenset(optimizer.flags)
        self.entries = itemgetter(*self.keys)
        self.values: list[tuple[Any, ...]] = []
        self.live = False  # a hyper-parameter is a tensor, whose value can change by itself
        self.group_table = np.zeros(len(self.groups), library.GROUP)
        self.rates: dict[int, Tensor] = {}  # lr of a group, where it is a tensor on a GPU

    # --- a step

    def fits(self, optimizer: FusedStep) -> bool:
        """Whether parameters and states are still the objects this plan was made of."""
        if self.groups is not optimizer.param_groups or len(self.group_table) != len(self.groups):
            return False
        if not library.same_objects(_parameters(optimizer), self.params):
            return False
        if self.sharded and not library.same_objects(
            list(map(shards.local, self.params)), self.pieces
        ):
            return False
        states = list(optimizer.state.values())
        if set(map(type, states)) - {dict}:  # a user's own entries
            states = [state for state in states if isinstance(state, dict)]
        return library.same_values(states, self.state_values)

    def gather(self) -> bool:
        """Pointers of this step; False if the plan has to be made anew."""
        if self.grad_handles is not None:
            grads = [shards.local(self._grad(param)) for param in self.params]
            self.grad_handles[:] = [0 if grad is None else grad._cdata for grad in grads]
        library.gather(self.arguments)
        counts = self.arguments.counts
        return not counts[library.NEW] and not counts[library.CHANGED]

    def refresh(self) -> None:
        """Hyper-parameters from the param groups, if any changed."""
        values = list(map(self.entries, self.groups))
        if not self.live and values == self.values:
            return self._refresh_rates()
        self.values = values
        self.live = False
        self.rates = {}
        table = self.group_table
        flags = np.zeros(len(values), np.int64)
        for key, column in zip(self.keys, zip(*values)):
            if key in self.flags:
                flags |= np.where(np.array(column, bool), library.FLAGS[key], 0)
            elif key == "betas":
                self.live |= any(isinstance(v, Tensor) for pair in column for v in pair)
                table["beta1"] = [float(pair[0]) for pair in column]
                table["beta2"] = [float(pair[1]) for pair in column]
            elif key == "lr":
                table[key] = [self._rate(*entry) for entry in enumerate(column)]
            else:
                self.live |= any(isinstance(value, Tensor) for value in column)
                table[key] = [float(value) for value in column]
        table["flags"] = flags
        for run in self.runs:
            run.groups[:] = table
        self._refresh_rates()

    def _rate(self, number: int, lr: Any) -> float:
        """lr of a group; NaN where it is read on a GPU when the step is made."""
        if not isinstance(lr, Tensor):
            return float(lr)
        if lr.device.type == "cpu" or any(run.runner.waits for run in self.runs):
            self.live = True
            return float(lr)
        self.rates[number] = lr
        return math.nan

    def _refresh_rates(self) -> None:
        for run in self.runs:
            for number, lr in self.rates.items():
                if lr.device == run.device and lr.dtype == torch.float32 and lr.numel() == 1:
                    kept = lr
                else:
                    kept = run.rates.setdefault(number, torch.zeros((), device=run.device))
                    kept.copy_(lr.reshape(()), non_blocking=True)
                run.groups["lr_tensor"][number] = kept.data_ptr()

    def _regular(self, at: int) -> Tensor:
        """A copy of a gradient that is not laid out like its parameter."""
        param = self.pieces[at]
        grad = shards.local(self._grad(self.params[at]))
        where = f"{self.name}: {self._where(at)}"
        if grad is None:
            raise RuntimeError(f"{where}: its gradient went away during step()")
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"{self.name} does not support sparse gradients ({self._where(at)} has one); "
                f"call to_dense() on it, or see torch.optim"
            )
        if grad.shape != param.shape or grad.device != param.device:
            raise RuntimeError(
                f"{where}: expected a gradient of shape {list(param.shape)} on {param.device}, got "
                f"{list(grad.shape)} on {grad.device}"
            )
        if grad.dtype not in library.DTYPES:
            raise RuntimeError(
                f"{where}: expected a gradient of float32, bfloat16 or float16, got {grad.dtype}"
            )
        return torch.empty_like(self.dense.get(at, param), dtype=grad.dtype).copy_(grad)

    def step(self, optimizer: FusedStep) -> None:
        counts = self.arguments.counts
        agreed = self._agree(optimizer) if self.sharded else None
        if counts[library.READY] + counts[library.IRREGULAR] == 0:
            return
        self.refresh()
        copies = []
        if counts[library.IRREGULAR]:
            for at in np.flatnonzero(self.status == library.IRREGULAR).tolist():
                grad = self._regular(at)
                self.table["grad"][at] = grad.data_ptr()
                self.table["grad_dtype"][at] = library.DTYPES[grad.dtype]
                copies.append((at, grad))
        for at, dense in self.dense.items():
            dense.copy_(self.pieces[at])
        skipped = self._call(optimizer, agreed)
        params = self.pieces
        if counts[library.NO_GRAD]:
            params = [params[at] for at in np.flatnonzero(self.table["grad"]).tolist()]
        for at, dense in self.dense.items():
            if not skipped and self.table["grad"][at]:
                self.pieces[at].copy_(dense)
        if optimizer.zero_grads:
            for at, _ in copies:
                if (whole := self._grad(self.params[at])) is not None:
                    whole.zero_()
        if skipped:
            self._forget_first(optimizer)
            return
        if self.first:
            self.first.clear()
            self.table["fresh"] = np.where(self.table["grad"] != 0, 0, self.table["fresh"])
        torch.autograd.graph.increment_version(params)

    def _agree(self, optimizer: FusedStep) -> tuple[Tensor | None, Tensor | None]:
        """Scale and found_inf for pieces, which know neither the whole norm nor the others' NaN.

        Clipping goes into the scale: grad / (scale / clip).
        """
        scale = shards.local(getattr(optimizer, "grad_scale", None))
        found = getattr(optimizer, "found_inf", None)
        if found is not None:
            found = shards.anywhere(found, self.params)
        grads = []
        for at, param in enumerate(self.params):
            if (grad := self._grad(param)) is not None:
                shards.piece(grad, param, f"{self.name}: gradient of {self._where(at)}")
                grads.append(grad)
        if optimizer.max_grad_norm is None and not optimizer.skip_nonfinite:
            return scale, found
        divisor = 1.0 if scale is None else float(scale)
        norm = shards.total_norm(grads) / divisor
        optimizer._norm.fill_(norm)
        if optimizer.skip_nonfinite and not math.isfinite(norm):
            found = torch.ones(())
        elif optimizer.norm_estimate is not None:
            norm = float(optimizer.norm_estimate)
            optimizer._norm.fill_(norm)
        if optimizer.max_grad_norm is not None:
            factor = optimizer.max_grad_norm / (norm + 1e-6)
            if not factor >= 1.0:
                scale = torch.tensor(divisor / factor if factor else math.inf)
        return scale, found

    def _call(
        self, optimizer: FusedStep, agreed: tuple[Tensor | None, Tensor | None] | None = None
    ) -> bool:
        """A call of the kernel a device; True if it is known that they skipped the step."""
        clipped = optimizer.max_grad_norm is not None and agreed is None
        skips = optimizer.skip_nonfinite and agreed is None
        scale, found = agreed or (
            getattr(optimizer, "grad_scale", None),
            getattr(optimizer, "found_inf", None),
        )
        norm = optimizer.norm_estimate if clipped else None
        apart = len(self.runs) > 1
        if apart and (skips or (clipped and norm is None)):
            whole = self._norm_everywhere(scale)
            norm = whole if norm is None else norm
            if skips:
                worst = (~torch.isfinite(whole)).float()
                found = worst if found is None else torch.maximum(worst, found.to(worst.device))
                skips = False
        asks = self.waits or (bool(self.first) and (skips or found is not None))
        before = int(optimizer._skipped) if asks else 0
        for run in self.runs:
            rows = self.table
            if apart:
                rows = self.table.copy()
                rows["grad"][run.away] = 0
            speaks = run is self.runs[0]
            numbers = [self._number(value, run.device) for value in (scale, found, norm)]
            pointers = [None if value is None else value.data_ptr() for value in numbers]
            call = library.Call(
                library.RULES.index(optimizer.rule),
                int(optimizer.zero_grads),
                int(skips),
                int(optimizer.torch_tails),
                rows.ctypes.data,
                len(rows),
                run.groups.ctypes.data,
                len(run.groups),
                pointers[0],
                pointers[1],
                optimizer.max_grad_norm if clipped else -1.0,
                optimizer.ema_decay or 0.0,
                optimizer._norm.data_ptr() if clipped and speaks else None,
                optimizer._skipped.data_ptr() if speaks else None,
                pointers[2],
                int(optimizer.clip_rounding == "torch"),
                0,
                int(optimizer.rounding == "stochastic"),
                optimizer.seed,
            )
            run.runner.step(call, rows, run.groups)
        return asks and int(optimizer._skipped) != before

    def _norm_everywhere(self, scale: Any) -> Tensor:
        """Norm of the gradients on all devices, on that of the first parameter."""
        home = self.runs[0].device
        squares = []
        for at in np.flatnonzero(self.table["grad"]).tolist():
            grad = self._grad(self.params[at])
            assert grad is not None
            if self.handles[at, library.MASK]:
                mask = self.masks[at]
                grad = torch.where(
                    mask, grad, torch.zeros((), dtype=grad.dtype, device=mask.device)
                )
            norm = torch.linalg.vector_norm(grad, dtype=torch.float64)
            squares.append(norm.to(home, non_blocking=True))
        norm = torch.linalg.vector_norm(torch.stack(squares))
        if scale is not None:
            norm = norm / torch.as_tensor(scale, device=home).reshape(())
        return norm.float()

    @staticmethod
    def _number(value: Any, place: torch.device) -> Tensor | None:
        """What GradScaler hands over, as a float32 on a device."""
        if value is None:
            return None
        if not isinstance(value, Tensor):
            return torch.full((), float(value), device=place)
        return value.to(place, torch.float32, non_blocking=place.type != "cpu").reshape(())

    def _forget_first(self, optimizer: FusedStep) -> None:
        """After a skipped first step a momentum buffer still holds nothing."""
        for param, name in self.first:
            for key in (name, f"{name}_codes", f"{name}_scales"):
                optimizer.state[param].pop(key, None)
            if not optimizer.state[param]:
                del optimizer.state[param]
        if self.first:
            optimizer._plan = None
