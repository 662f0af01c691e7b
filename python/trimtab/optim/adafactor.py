"""Adafactor."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim._adafactor import adafactor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..ops import backend
from . import library, shards
from .base import FusedStep, StepOptions
from .device import why_not_cuda
from .groups import Run
from .matrix import MatrixStep, batches
from .plan import Plan


class Adafactor(MatrixStep, torch.optim.Adafactor):
    """``torch.optim.Adafactor`` with the options of :class:`StepOptions`.

    Its second moment is a row and a column (Shazeer and Stern, https://arxiv.org/abs/1804.04235). On
    a CPU and by CUDA C++ all tensors are stepped in one call (csrc/math/adafactor.h): sums in a fixed
    order, the same for any number of threads and on both; all in float32, rounded once to the dtypes of
    parameter and states. With float32 parameters a step ends within a few roundings of torch's, which
    adds in another order; with bfloat16 it is nearer to float64's, as torch rounds after each
    operation. A GPU without CUDA C++ is stepped by Triton, to the same bits, unless it is asked for
    masks, copies, averages, masters, stochastic rounding or ``clip_rounding="torch"``: that, and other
    devices, take torch's operations. Of DTensors the sums are added up by processes
    between the launches; a step waits for no GPU unless it clips or looks for NaN and Inf.

    ``foreach`` changes nothing.
    """

    rule = "Adafactor"
    numbers = ("lr", "weight_decay")
    all_state_names = ("row_var", "col_var", "variance")
    sees_rows = True

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
        self._setup(options)
        if self.state_dtype == torch.int8:
            raise ValueError(
                "Adafactor: its states are a row and a column, which 8 bits would hardly shrink; "
                "expected state_dtype float32, bfloat16 or float16"
            )

    def names_of(self, group: dict[str, Any], param: Tensor) -> tuple[str, ...]:
        return ("row_var", "col_var") if param.dim() > 1 else ("variance",)

    def summed_dim(self, name: str) -> int | None:
        return {"row_var": -1, "col_var": -2}.get(name)

    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step over all parameters that have a gradient.

        Args:
            closure (Callable, optional): reevaluates the model and returns the loss.
        """
        places = {p.device for group in self.param_groups for p in group["params"]}
        if not any(map(self._takes_torchs, places)):
            return FusedStep.step(self, closure)
        if shards.any_sharded(self.param_groups):
            raise RuntimeError(
                "Adafactor: a DTensor on a GPU without CUDA C++; its sums over whole rows and columns "
                "are added up on others only"
            )
        return super().step(closure)

    def _takes_torchs(self, place: torch.device) -> bool:
        """Whether parameters on a device are stepped by torch's operations."""
        if place.type == "cpu" or backend.FORCED in ("cpu", "cuda", "reference"):
            return False  # or :func:`device.runner` says why not
        if backend.FORCED != "triton" and not why_not_cuda(place):
            return False
        return place.type != "cuda" or bool(_why_not_triton(self))

    def launch(self, plan: Plan, run: Run, call: library.Call, rows: np.ndarray) -> None:
        if plan.rows.shapes is None:
            plan.rows.shapes = _shapes(plan)
        shapes = plan.rows.shapes
        groups = np.zeros(len(plan.rows.groups), library.ADAFACTOR_GROUP)
        for row, group in zip(groups, plan.rows.groups):
            row["beta2_decay"], row["d"] = group["beta2_decay"], group["d"]
            row["eps1"], row["eps2"] = _eps1(group), group["eps"][1]
        own = library.AdafactorCall(
            ctypes.addressof(call), groups.ctypes.data, shapes.ctypes.data, None, library.WHOLE
        )
        arrays = (rows, run.groups, groups, shapes)
        waits = run.runner.waits
        if not plan.rows.sharded or (waits and library.skips(call)):
            return run.runner.step(own, *arrays)
        if waits:  # a GPU skips by itself, and the others' sums are nothing to it
            call.found_inf = None
        last = shapes[-1]
        total = 2 + last["batch"] * (1 + last["rows"] + last["columns"]) + last["sums_at"]
        sums = torch.zeros(int(total), dtype=torch.float64, device=run.device)
        own.sums = sums.data_ptr()
        pieces = [
            _sums(sums, shape, p)
            for shape, p, away in zip(shapes.tolist(), plan.params, run.away)
            if not away
        ]
        own.part = library.SQUARES
        parts = run.runner.parts(own, *arrays)
        for part in (library.SQUARES, library.AVERAGE, library.DIRECTION, library.UPDATE):
            own.part = part
            parts.step(own)
            shards.add_up(chain.from_iterable(piece.get(part, ()) for piece in pieces))

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
        states = {param: self._state(param, grad) for param, grad in grads.items()}
        eps = _eps1(group)
        for params in batches(grads, lambda param: float(states[param]["step"])):
            own = [grads[param] for param in params]
            if len(params) > 1:
                _step_together(group, eps, params, own, [states[param] for param in params])
                continue
            state = states[params[0]]
            adafactor(
                params,
                own,
                [state.get("row_var")],
                [state.get("col_var")],
                [state.get("variance")],
                [state["step"]],
                d=group["d"],
                lr=group["lr"],
                beta2_decay=group["beta2_decay"],
                weight_decay=group["weight_decay"],
                eps1=eps,
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


def _why_not_triton(optimizer: Adafactor) -> str:
    """What the kernels of kernels/adafactor.py lack of what an optimizer asks for; empty if nothing."""
    asks = {
        "Triton": not backend.has_triton(),
        "masks": optimizer._masks,
        "copies": optimizer._copies,
        "averages": optimizer.ema_decay is not None,
        "masters": optimizer.master != "none",
        "stochastic rounding": optimizer.rounding == "stochastic",
        "clipped gradients rounded as torch does": optimizer.clip_rounding == "torch",
        "DTensors": shards.any_sharded(optimizer.param_groups),
    }
    return ", ".join(what for what, asked in asks.items() if asked)


def _sums(
    sums: Tensor, shape: tuple[int, ...], param: Tensor
) -> dict[int, list[tuple[Tensor, Tensor, int | None]]]:
    """What pieces of a parameter add up after a part of the step, for shards.add_up."""
    batch, rows, columns, *_, at = shape
    squares, means, row, column = sums[at:].split(
        [2, batch, batch * rows, batch * columns, len(sums) - at - 2 - batch * (1 + rows + columns)]
    )[:4]
    found: dict[int, list[tuple[Tensor, Tensor, int | None]]]
    found = {library.DIRECTION: [(squares, param, None)]}
    if batch:
        found[library.SQUARES] = [(row, param, -1), (column, param, -2)]
        found[library.AVERAGE] = [(means, param, -2)]
    return found


def _shapes(plan: Plan) -> np.ndarray:
    shapes, at = [], 0
    for param, piece in zip(plan.params, plan.pieces):
        matrices, sides, whole = 0, torch.Size((0, 0)), torch.Size((0, 0))
        if param.dim() > 1:
            matrices, sides, whole = math.prod(piece.shape[:-2]), piece.shape[-2:], param.shape[-2:]
        shapes.append((matrices, *sides, *whole, param.numel(), at))
        at += 2 + matrices * (1 + sum(sides))
    return np.array(shapes, library.ADAFACTOR_SHAPE)


def _eps1(group: dict[str, Any]) -> float:
    eps = group["eps"][0]
    return (
        torch.finfo(group["params"][0].dtype).eps if eps is None else eps
    )  # of the first, as torch


def _step_together(
    group: dict[str, Any],
    eps: float,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
) -> None:
    """torch's adafactor for several tensors of one shape and step: elementwise the same operations."""
    lr, numel = float(group["lr"]), params[0].numel()
    torch._foreach_add_([state["step"] for state in states], 1.0)
    step = float(states[0]["step"])
    weight = step ** group["beta2_decay"]
    rate = min(lr, 1 / step**0.5)
    norms = torch.stack(torch._foreach_norm(params, 2)).tolist()
    alphas = [max(group["eps"][1], norm / numel**0.5) * rate for norm in norms]
    if group["weight_decay"] != 0:
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
    grad = torch.stack(grads)
    if group["maximize"]:
        grad = grad.neg_()
    if params[0].dim() > 1:
        means = []
        for name, dim in (("row_var", -1), ("col_var", -2)):
            mean = torch.linalg.vector_norm(grad, dim=dim, keepdim=True).square_()
            means.append(_average(states, name, mean.div_(grad.shape[dim]), weight))
        row, column = means
        update = row @ column
        update.div_(row.mean(dim=-2, keepdim=True).clamp_(min=eps))
    else:
        update = _average(states, "variance", grad * grad, weight)
    updates = list(update.clamp_(min=eps * eps))
    if update.dtype == torch.float32:
        update.rsqrt_()
    else:  # whose last elements, which fill no vector, torch rounds otherwise
        torch._foreach_rsqrt_(updates)
    update.mul_(grad)
    norms = torch.stack(torch._foreach_norm(updates, 2)).tolist()
    for param, own, alpha, norm in zip(params, updates, alphas, norms):
        param.add_(own, alpha=-alpha / max(1.0, norm / (numel**0.5 * group["d"])))


def _average(states: list[dict[str, Any]], name: str, value: Tensor, weight: float) -> Tensor:
    """The state ``name`` of all, one on top of the other, moved towards ``value``."""
    kept = [state[name] for state in states]
    average = torch.stack(kept).lerp_(value, weight)
    torch._foreach_copy_(kept, list(average))
    return average
