"""The rows of an optimizer's table: a parameter each, checked, its missing states made."""

from __future__ import annotations

from itertools import chain, pairwise
from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from . import library, memory, shards

if TYPE_CHECKING:
    from .base import FusedStep


def parameters(optimizer: FusedStep) -> list[Tensor]:
    return list(chain.from_iterable(map(itemgetter("params"), optimizer.param_groups)))


class Rows:
    def __init__(self, optimizer: FusedStep) -> None:
        self.name = type(optimizer).__name__
        self.main_grads = optimizer.main_grads
        self.groups = optimizer.param_groups
        self.params = parameters(optimizer)
        # What this process holds of each: the parameter itself, or its piece of a DTensor.
        self.pieces = list(map(shards.local, self.params))
        self.sharded = not library.same_objects(self.pieces, self.params)
        if self.sharded and optimizer.clip_rounding != "folded":
            raise RuntimeError(f'{self.name}: clip_rounding="torch" is not there for DTensors')
        n = len(self.params)
        self.table = np.zeros(n, library.TENSOR)
        self.handles = np.zeros((n, library.SLOTS), np.uint64)
        self.lengths = np.zeros((n, library.STATES), np.int64)  # of the states
        self.sees_rows = optimizer.sees_rows
        self.shapes: np.ndarray | None = None  # tt_adafactor_shape, where the rule reads it
        self.is_new = np.zeros(n, np.uint8)
        self.masks: dict[int, Tensor] = {}
        self.kept: list[Tensor] = []  # what the handles point to
        self.dense: dict[int, Tensor] = {}  # copies of parameters with gaps between their elements
        self.copied: list[tuple[int, Tensor, Tensor]] = []  # a set_copy's tensor, one like `dense`
        self.first: list[tuple[Tensor, str]] = []  # states that were made without contents here

    def fill(self, optimizer: FusedStep) -> None:
        """Every row, and the layout that the library checks a parameter and its states for."""
        layouts: list[int] = []
        starts: list[int] = []
        at = 0
        for number, group in enumerate(self.groups):
            for param in group["params"]:
                self.handles[at, library.OWNER] = param._cdata
                starts.append(len(layouts))
                if self.grad(param) is None and not optimizer.state.get(param):
                    self.is_new[at] = 1
                    layouts.append(0)
                else:
                    like = self._check(at, param)
                    layouts += [like.dim(), *like.shape, *like.stride()]
                    self.table["group"][at] = number
                    names = optimizer.names_of(group, param)
                    _Row(self, optimizer, at, param, like).fill(names)
                at += 1
        self._check_overlap()
        self.layouts = np.array(layouts, np.int64)
        self.starts = np.array(starts, np.int64)

    def grad(self, param: Tensor) -> Tensor | None:
        main = getattr(param, "main_grad", None) if self.main_grads else None
        return param.grad if main is None else main

    def where(self, at: int) -> str:
        """Words for parameter `at`, for messages."""
        for number, group in enumerate(self.groups):
            if at < len(group["params"]):
                name = f" ({group['param_names'][at]})" if "param_names" in group else ""
                return f"parameter {at} of group {number}{name}"
            at -= len(group["params"])
        return "a parameter"

    def _check(self, at: int, param: Tensor) -> Tensor:
        """A tensor with the layout that the parameter's states take: itself if it has no gaps."""
        where = f"{self.name}: {self.where(at)}"
        if any(p.is_partial() for p in getattr(param, "placements", ())):
            raise RuntimeError(f"{where}: a DTensor whose pieces are still to be summed")
        param = self.pieces[at]
        if param.dtype not in library.DTYPES:
            kind = (
                f"{self.name} does not support complex parameters: " if param.is_complex() else ""
            )
            raise RuntimeError(
                f"{kind}{where}: expected float32, bfloat16 or float16, got {param.dtype}; "
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
        # keeps the strides of a tensor without gaps
        kept = torch.contiguous_format if self.sees_rows else torch.preserve_format
        like = torch.empty_like(param, memory_format=kept)
        if like.stride() == param.stride():
            return param
        self.dense[at] = like
        return like

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
                    f"{self.name}: {self.where(first)} and {self.where(second)} share memory; "
                    "it would be stepped twice"
                )

    def regular(self, at: int) -> Tensor:
        """A copy of a gradient that is not laid out like its parameter."""
        param = self.pieces[at]
        grad = shards.local(self.grad(self.params[at]))
        where = f"{self.name}: {self.where(at)}"
        if grad is None:
            raise RuntimeError(f"{where}: its gradient went away during step()")
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"{self.name} does not support sparse gradients ({self.where(at)} has one); "
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


class _Row:
    """One parameter's: `like` has the layout of its states, `param` may be a DTensor."""

    def __init__(
        self, rows: Rows, optimizer: FusedStep, at: int, param: Tensor, like: Tensor
    ) -> None:
        self.rows, self.optimizer, self.at, self.param, self.like = rows, optimizer, at, param, like
        self.row = rows.table[at]
        self.state = optimizer.state[param]
        self.tensors: dict[int, Tensor] = {library.PARAM: like}

    def fill(self, names: tuple[str, ...]) -> None:
        optimizer, param, like, state = self.optimizer, self.param, self.like, self.state
        fresh = not state
        self.row["numel"] = like.numel()
        self.row["param_dtype"] = library.DTYPES[param.dtype]
        buffers = {"momentum_buffer", "momentum_buffer_codes"}
        self.row["fresh"] = int("momentum_buffer" in names and not buffers & state.keys())
        if self.row["fresh"] and optimizer.rule == "SGD":
            self.rows.first.append((param, "momentum_buffer"))
        if optimizer.counts_steps or optimizer.rounding == "stochastic":
            self.tensors[library.STEP] = self._scalar("step", 0.0)
        if optimizer.product:
            self.tensors[library.PRODUCT] = self._scalar(optimizer.product, 1.0)
        if names and memory.is_coded(optimizer, param):
            self._fill_codes(names)
        else:
            self._fill_states(names)
        self._fill_master()
        if optimizer.ema_decay is not None:
            value = state.get("ema")
            value = torch.clone(self.rows.pieces[self.at].detach()) if value is None else value
            self.tensors[library.EMA] = self._keep("ema", value, torch.float32)
        elif "ema" in state and fresh:
            del state["ema"]
        if (mask := optimizer._masks.get(param)) is not None:
            mask = shards.piece(mask, param, f"{self.rows.name}.set_mask")
            mask = self.rows.masks[self.at] = _as(mask, like, torch.bool)
            self.tensors[library.MASK] = mask
        if (copy := optimizer._copies.get(param)) is not None:
            copy = shards.piece(copy, param, f"{self.rows.name}.set_copy")
            self.tensors[library.COPY] = self._regular_copy(copy)
            self.row["copy_dtype"] = library.DTYPES[copy.dtype]
        for slot, tensor in self.tensors.items():
            self.rows.handles[self.at, slot] = tensor._cdata
            self.rows.kept.append(tensor)

    def _regular_copy(self, copy: Tensor) -> Tensor:
        """It, or where it is laid out as its parameter and the rule sees rows, what is copied to it."""
        if copy.stride() == self.like.stride():
            return copy
        dense = torch.empty_like(self.like, dtype=copy.dtype)
        self.rows.copied.append((self.at, copy, dense))
        return dense

    def _fill_states(self, names: tuple[str, ...]) -> None:
        dtype = self.optimizer.state_dtype or self._state_dtype(names)
        if dtype == torch.int8:
            dtype = torch.float32
        self.row["state_dtype"] = library.DTYPES[dtype]
        for slot, name in enumerate(names):
            value = self.state.get(name)
            summed = self.optimizer.summed_dim(name)
            like = self.like if summed is None else shards.without(self.like, summed)
            if value is None:
                value = self.optimizer.new_state(name, self.param, like, dtype)
            right = self._keep(name, value, dtype, like, summed)
            self.rows.lengths[self.at, slot] = right.numel()
            self.tensors[library.STATE + slot] = right

    def _fill_codes(self, names: tuple[str, ...]) -> None:
        """8-bit states; of a DTensor those of this process's piece, in blocks of their own."""
        optimizer, param, like, state = self.optimizer, self.param, self.like, self.state
        for name in names:
            if shards.is_sharded(param) and isinstance(state.get(name), Tensor):  # a checkpoint's
                state[name] = shards.piece(state[name], param, f"{self.rows.name}: {name}")
        self.row["state_dtype"] = library.DYNAMIC8
        for slot, name in enumerate(names):

            def make(name: str = name) -> Tensor:
                return optimizer.new_state(name, param, like, torch.float32)

            codes, scales = memory.keep_codes(state, name, like, make)
            self.rows.lengths[self.at, slot] = codes.numel()
            self.tensors[library.STATE + slot] = codes
            self.tensors[library.SCALE + slot] = scales

    def _fill_master(self) -> None:
        """What a bf16 parameter keeps beside itself; a float32 one needs nothing."""
        master = self.optimizer.master
        if master == "none" or self.param.dtype == torch.float32:
            return
        kind, name, dtype = memory.MASTERS[master]
        if self.param.dtype != torch.bfloat16:
            raise RuntimeError(
                f"{self.rows.name}: {self.rows.where(self.at)}: expected bfloat16 or float32 with "
                f'master="{master}", got {self.param.dtype}'
            )
        self.row["master_kind"] = kind
        value = self.state.get(name)
        if value is None:
            value = torch.zeros_like(self.like, dtype=dtype)
        self.tensors[library.MASTER] = self._keep(name, value, dtype)

    def _keep(
        self,
        name: str,
        value: Tensor,
        dtype: torch.dtype,
        like: Tensor | None = None,
        summed: int | None = None,
    ) -> Tensor:
        """Puts a state of that dtype and layout in its place; returns what this process has of it."""
        given = value
        known = self.state.get(name) is not None
        if known:
            value = shards.piece(value, self.param, f"{self.rows.name}: {name}", summed)
        right = _as(value, self.like if like is None else like, dtype)
        if not known or right is not value:
            given = shards.like(right, self.param, summed)
        self.state[name] = given
        return right

    def _state_dtype(self, names: tuple[str, ...]) -> torch.dtype:
        """What the states have, if that is one dtype of ours; else the parameter's, as in torch."""
        states = [self.state.get(name) for name in names]
        found = {state.dtype for state in states if isinstance(state, Tensor)}
        return (
            found.pop() if len(found) == 1 and found <= library.DTYPES.keys() else self.param.dtype
        )

    def _scalar(self, name: str, initial: float) -> Tensor:
        state, place = self.state, self.like.device
        value = state.get(name)
        right = isinstance(value, Tensor) and value.dtype == torch.float32 and value.dim() == 0
        if value is None or not right or value.device != place:
            number = float(initial if value is None else value)
            state[name] = torch.full((), number, device=place)
            if value is None and len(state) > 1:  # torch's order: step first
                others = {key: state.pop(key) for key in list(state) if key != name}
                state.update(others)
        made: Tensor = state[name]
        return made


def _as(value: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor itself if it has that dtype and layout, else a copy that has."""
    if value.dtype == dtype and value.stride() == like.stride() and value.device == like.device:
        return value
    return torch.empty_like(like, dtype=dtype).copy_(value)
