"""The step of optimizers that see a parameter as a matrix: torch's kernels inside our own passes.

Row means, column means and Newton-Schulz products do not fit the one pass of the elementwise rules.
These classes keep torch's formulas, apply them to many tensors of one shape at once, and add what
:class:`FusedStep` folds in around them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import library, shards
from .base import FusedStep

BATCH = 1 << 20  # elements that are stepped at once: few, so that they stay in the cache


def batches(
    params: Iterable[Tensor], key: Callable[[Tensor], Hashable] = lambda param: None
) -> Iterator[list[Tensor]]:
    """Parameters of equal shape, dtype, device and key, at most BATCH elements together or one."""
    alike: dict[Hashable, list[Tensor]] = {}
    for param in params:
        alike.setdefault((param.shape, param.dtype, param.device, key(param)), []).append(param)
    for found in alike.values():
        most = max(1, BATCH // max(found[0].numel(), 1))
        for start in range(0, len(found), most):
            yield found[start : start + most]


class MatrixStep(FusedStep):
    """Checks, unscales, clips; the class's update; shrinks, masks, averages, copies, zeroes."""

    @abstractmethod
    def _update(self, group: dict[str, Any], grads: dict[Tensor, Tensor]) -> None:
        """torch's update of the parameters of a group that have a gradient; each class has its own.

        ``grads`` are finite where that was asked for, unscaled, clipped, and of the parameter's dtype.
        """

    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step over all parameters that have a gradient.

        Args:
            closure (Callable, optional): reevaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            grads = self._gradients()
            if not grads:
                return loss
            factor = self._factor(grads)
            if factor is None:
                self._skipped += 1
            else:
                if factor != 1.0:  # torch's functions take gradients of the parameter's dtype
                    scaled = {p: (g.float() * factor).to(p.dtype) for p, g in grads.items()}
                else:
                    scaled = {p: g.to(p.dtype) for p, g in grads.items()}
                averages = self._averages(grads)
                for group in self.param_groups:
                    own = {p: scaled[p] for p in group["params"] if p in scaled}
                    if own:
                        self._update(group, own)
                        self._finish(group, own, averages)
            if self.zero_grads:
                torch._foreach_zero_(list(grads.values()))
        return loss

    def _gradients(self) -> dict[Tensor, Tensor]:
        """The gradients of this step, each fit for it; of DTensors this process's pieces."""
        name = type(self).__name__
        sharded = shards.any_sharded(self.param_groups)
        found: dict[Tensor, Tensor] = {}
        for number, group in enumerate(self.param_groups):
            for at, param in enumerate(group["params"]):
                main = getattr(param, "main_grad", None) if self.main_grads else None
                grad = param.grad if main is None else main
                if grad is None:
                    continue
                where = f"{name}: parameter {at} of group {number}"
                if sharded and any(p.is_partial() for p in getattr(param, "placements", ())):
                    raise RuntimeError(f"{where}: a DTensor whose pieces are still to be summed")
                if param.is_complex():
                    raise RuntimeError(f"{name} does not support complex parameters ({where})")
                own = shards.local(grad) if sharded else grad
                if own.layout != torch.strided:
                    raise RuntimeError(f"{name} does not support sparse gradients ({where})")
                if param.dtype not in library.DTYPES or grad.dtype not in library.DTYPES:
                    raise RuntimeError(
                        f"{where}: expected float32, bfloat16 or float16, got {param.dtype} with a "
                        f"gradient of {grad.dtype}"
                    )
                if grad.shape != param.shape or grad.device != param.device:
                    raise RuntimeError(
                        f"{where}: expected a gradient of shape {list(param.shape)} on "
                        f"{param.device}, got {list(grad.shape)} on {grad.device}"
                    )
                if sharded:
                    own = shards.piece(grad, param, f"{name}: gradient of {where}")
                found[param] = own
        return found

    def _factor(self, grads: dict[Tensor, Tensor]) -> float | None:
        """What the gradients are to be multiplied by; None: the step is skipped."""
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and shards.any_sharded(self.param_groups):
            found_inf = shards.anywhere(found_inf, list(grads))
        if found_inf is not None and float(found_inf) != 0:
            return None
        scale = getattr(self, "grad_scale", None)
        factor = 1.0 if scale is None else 1.0 / float(scale)
        clips = self.max_grad_norm is not None
        norm = self.norm_estimate if clips else None
        if self.skip_nonfinite or (clips and norm is None):
            masked = (
                (g if (mask := self._mask(p)) is None else g.masked_fill(~mask, 0.0), p)
                for p, g in grads.items()
            )
            measured = shards.total_norm(masked) * factor
            if self.skip_nonfinite and not torch.isfinite(torch.tensor(measured)):
                return None
            norm = measured if norm is None else norm
        if self.max_grad_norm is not None and norm is not None:
            self._norm.fill_(norm)
            clip = self.max_grad_norm / (float(norm) + 1e-6)
            factor *= clip if not clip >= 1.0 else 1.0
        return factor

    def _mask(self, param: Tensor) -> Tensor | None:
        mask = self._masks.get(param)
        name = f"{type(self).__name__}.set_mask"
        return None if mask is None else shards.piece(mask, param, name)

    def _averages(self, grads: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Weight averages, which start as the parameter before its first step.

        They enter the state after the update: torch takes a state that is not empty for its own.
        """
        if self.ema_decay is None:
            return {}
        states = {p: self.state.get(p, {}).get("ema") for p in grads}
        return {
            p: p.detach().to(torch.float32, copy=True) if ema is None else ema
            for p, ema in states.items()
        }

    def _finish(
        self, group: dict[str, Any], grads: dict[Tensor, Tensor], averages: dict[Tensor, Tensor]
    ) -> None:
        threshold = float(group["lr"]) * group.get("l1", 0.0)
        if not (threshold > 0 or self._masks or self._copies or averages):
            return
        for param in grads:
            piece = shards.local(param)
            if threshold > 0:
                piece.copy_(piece.sign() * (piece.abs() - threshold).clamp_(min=0))
            if (mask := self._mask(param)) is not None:
                piece.masked_fill_(~mask, 0.0)
                for name in self.state_names(group):
                    value = shards.local(self.state[param].get(name))
                    if value is not None and value.shape == mask.shape:
                        value.masked_fill_(~mask, 0.0)
            if (copy := self._copies.get(param)) is not None:
                shards.local(copy).copy_(piece)
            if param in averages and self.ema_decay is not None:
                average = shards.local(averages[param])
                average.add_(piece.float() - average, alpha=1.0 - self.ema_decay)
                self.state[param]["ema"] = averages[param]
