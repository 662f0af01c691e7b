"""Gradients on their way to the step: stepped and freed inside backward, or accumulated in place."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .base import FusedStep


def release_gradients(optimizer: FusedStep) -> ReleasedGradients:
    """Makes backward step each parameter as soon as its gradient is there, and free the gradient.

    The bits are those of the ordinary step, and at no time more than a few gradients live. The training
    loop stays as it is: ``optimizer.step()`` has nothing left to update, and tells that the next
    backward is another step.

    Clipping needs ``norm_estimate``, as the norm of all gradients is known only when the first of them
    have gone; ``released.grad_norm``, the norm of those of the last backward, is one for the next.

    Args:
        optimizer: of :mod:`trimtab.optim`; no parameter may hold a gradient

    Returns:
        a handle: ``remove()`` ends it, as does the end of a ``with`` block.

    Raises:
        TypeError: not an optimizer of ours.
        RuntimeError: what the optimizer is asked for needs all gradients at once. Inside backward: a
            second gradient of a parameter before ``optimizer.step()``, which would be accumulation.
    """
    return ReleasedGradients(optimizer)


class ReleasedGradients:
    """What :func:`release_gradients` returns."""

    def __init__(self, optimizer: FusedStep) -> None:
        if not isinstance(optimizer, FusedStep):
            raise TypeError(
                f"release_gradients: expected an optimizer of trimtab.optim, got "
                f"{type(optimizer).__name__}"
            )
        self.optimizer = optimizer
        self._single: dict[Tensor, FusedStep] = {}
        self._stepped: set[Tensor] = set()
        home = next(iter(self._params())).device
        self._squares = torch.zeros((), dtype=torch.float64, device=home)
        # What the optimizers of single parameters share with the whole.
        optimizer._skipped, optimizer._norm = optimizer._skipped.to(home), optimizer._norm.to(home)
        self._check()
        for at, param in enumerate(self._params()):
            if param.grad is not None:
                raise RuntimeError(
                    f"release_gradients: parameter {at} already holds a gradient, to which the next "
                    "backward would add; call zero_grad() first"
                )
        self._hooks: list[Any] = [
            param.register_post_accumulate_grad_hook(self._step)
            for param in self._params()
            if param.requires_grad
        ]
        self._hooks.append(optimizer.register_step_pre_hook(self._next))

    @property
    def grad_norm(self) -> Tensor:
        """Norm of all gradients since the last ``optimizer.step()`` began, before clipping (0-d)."""
        return self._squares.sqrt().float()

    def remove(self) -> None:
        """Back to gradients that wait for ``optimizer.step()``."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._single.clear()

    def __enter__(self) -> ReleasedGradients:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _params(self) -> list[Tensor]:
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def _check(self) -> None:
        optimizer = self.optimizer
        if optimizer.max_grad_norm is not None and optimizer.norm_estimate is None:
            raise RuntimeError(
                "release_gradients: max_grad_norm needs the norm of all gradients, which is known "
                "only after the first parameters were updated; set norm_estimate (to the norm of the "
                "step before, say), or don't release gradients"
            )
        if optimizer.skip_nonfinite:
            raise RuntimeError(
                "release_gradients: skip_nonfinite leaves out whole steps, but a NaN or Inf may come "
                "after the first parameters were updated"
            )
        if getattr(optimizer, "grad_scale", None) is not None:
            raise RuntimeError(
                "release_gradients: GradScaler looks at all gradients before the first update; "
                "train in bfloat16, which needs no scaling"
            )
        if optimizer.main_grads:
            raise RuntimeError(
                "release_gradients: main_grads accumulates gradients that release_gradients frees"
            )

    def _next(self, *_: Any) -> None:
        """optimizer.step() was called: the next gradients belong to another step."""
        self._stepped.clear()
        self._squares.zero_()

    def _step(self, param: Tensor) -> None:
        if param in self._stepped:
            raise RuntimeError(
                "release_gradients: a second gradient of a parameter before optimizer.step(): it was "
                "already updated with the first, so gradients can't accumulate over several "
                "backwards; remove() the hooks, or call optimizer.step() after each backward"
            )
        self._check()
        grad = param.grad
        if grad is None:
            return
        if self.optimizer.max_grad_norm is not None and grad.layout == torch.strided:
            norm = torch.linalg.vector_norm(grad, dtype=torch.float64)
            self._squares += norm.to(self._squares.device) ** 2
        single = self._of(param)
        single.step()
        self._stepped.add(param)
        param.grad = None
        self.optimizer.__dict__["_opt_called"] = (
            True  # lr_scheduler's question whether a step was made
        )

    def _of(self, param: Tensor) -> FusedStep:
        """An optimizer of this parameter alone that shares its state and follows its group."""
        whole = self.optimizer
        group = next(g for g in whole.param_groups if any(p is param for p in g["params"]))
        alone = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        single = self._single.get(param)
        if single is None:
            single = self._single[param] = object.__new__(type(whole))
            single.__dict__.update(whole.__dict__)
            single.__dict__.pop("step", None)  # a scheduler's wrapper, which calls the whole's
            for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
                single.__dict__[hooks] = OrderedDict()
            single.param_groups = [{"params": [param], **alone}]
            single.state = defaultdict(dict)
        for key in ("norm_estimate", "max_grad_norm", "clip_rounding", "ema_decay", "zero_grads"):
            setattr(single, key, getattr(whole, key))
        single.param_groups[0].update(alone)
        if single.state.get(param) is not whole.state[param]:  # load_state_dict
            single.state = defaultdict(dict, {param: whole.state[param]})
            single._plan = None
        return single


def accumulate_(into: Tensor, grad: Tensor) -> Tensor:
    """``into += grad``, in place and in one pass; each element is rounded once, to ``into``'s dtype.

    Args:
        into: float32, bfloat16 or float16
        grad: of the same shape; any of these dtypes
    """
    if into.shape != grad.shape:
        raise ValueError(
            f"accumulate_: expected a gradient of shape {list(into.shape)}, got {list(grad.shape)}"
        )
    if not into.is_floating_point() or not grad.is_floating_point():
        raise TypeError(f"accumulate_: expected floats, got {into.dtype} and {grad.dtype}")
    with torch.no_grad():
        return into.add_(grad)


def accumulate_main_grads(
    params: Iterable[nn.Parameter], dtype: torch.dtype = torch.float32
) -> MainGrads:
    """Makes backward add each gradient to ``param.main_grad`` of the given dtype, and free it.

    So gradients of bfloat16 parameters add up over micro-batches in float32, without a moment at which
    all of them exist twice. An optimizer with ``main_grads=True`` steps by them, and its ``zero_grad``
    clears them. The first gradient makes ``main_grad``; a parameter without any has None there.

    Args:
        params: parameters, of which those that require a gradient take part
        dtype: float32, bfloat16 or float16

    Returns:
        a handle: ``remove()`` ends it, as does the end of a ``with`` block.
    """
    return MainGrads(params, dtype)


class MainGrads:
    """What :func:`accumulate_main_grads` returns."""

    def __init__(self, params: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"accumulate_main_grads: expected float32, bfloat16 or float16, got {dtype}"
            )
        self.dtype = dtype
        self.params = [param for param in params if param.requires_grad]
        for param in self.params:
            param.__dict__["main_grad"] = None
        self._hooks = [
            param.register_post_accumulate_grad_hook(self._accumulate) for param in self.params
        ]

    def _accumulate(self, param: Any) -> None:
        if param.grad.layout != torch.strided:
            raise RuntimeError("accumulate_main_grads does not support sparse gradients")
        if param.main_grad is None:
            param.main_grad = param.grad.to(self.dtype)
        else:
            accumulate_(param.main_grad, param.grad)
        param.grad = None

    def remove(self) -> None:
        """Back to gradients in ``param.grad``."""
        for hook in self._hooks:
            hook.remove()
        for param in self.params:
            param.__dict__.pop("main_grad", None)
        self._hooks, self.params = [], []

    def __enter__(self) -> MainGrads:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()
