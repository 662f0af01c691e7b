"""Where masks live: a bool buffer ``weight_mask`` beside the ``weight`` it belongs to.

It is saved and loaded with the model. A pruned weight is exactly zero and its parameter stays a plain
one, so that layers, optimizers and swap_ see nothing new. :func:`hold_` keeps it zero in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .checks import expect, expect_model, names

SUFFIX = "_mask"
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")

Layers = Iterable[str] | Callable[[str, nn.Module], bool] | None


@dataclass(frozen=True)
class Target:
    """One weight that can be pruned: a parameter ``key`` of ``module``, outputs first."""

    layer: str
    module: nn.Module
    key: str

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.key}" if self.layer else self.key

    @property
    def weight(self) -> nn.Parameter:
        weight = self.module._parameters[self.key]
        assert weight is not None
        return weight

    @property
    def mask(self) -> Tensor | None:
        return self.module._buffers.get(self.key + SUFFIX)


def targets(op: str, model: nn.Module, layers: Layers = None) -> list[Target]:
    """The weights to prune, in the order of ``model.named_modules()``, shared ones once.

    Args:
        layers: names of layers, or a filter ``(name, module) -> bool``; None takes all nn.Linear,
            nn.Conv1d to nn.Conv3d and the projections of nn.MultiheadAttention.

    Raises:
        TypeError: a named layer is of a type that can't be pruned.
        ValueError: a name that isn't there, nothing to prune, or a weight that is lazy or on meta.
    """
    expect_model(op, model)
    modules = dict(model.named_modules())
    wanted: Iterable[str] = modules
    if layers is not None and not callable(layers):
        wanted = names(op, layers)
        if unknown := [name for name in wanted if name not in modules]:
            raise ValueError(f"{op}: expected names of layers, got {unknown}, not in the model")
    found: dict[int, Target] = {}
    for name in wanted:
        module = modules[name]
        own = _weights(name, module)
        if callable(layers):
            if not layers(name, module):
                continue
        elif layers is not None and not own:
            raise TypeError(
                f"{op}: {name}: expected nn.Linear, nn.Conv1d to nn.Conv3d or "
                f"nn.MultiheadAttention with float weights, got {type(module).__name__}"
            )
        for target in own:
            found.setdefault(id(target.weight), target)
    if not found:
        raise ValueError(f"{op}: the model has no layers to prune (or the filter takes none)")
    for target in found.values():
        if nn.parameter.is_lazy(target.weight) or target.weight.is_meta:
            kind = "is on the meta device" if target.weight.is_meta else "is still lazy"
            raise ValueError(f"{op}: {target.name} {kind}: it has no values to prune by")
    return list(found.values())


def _weights(name: str, module: nn.Module) -> list[Target]:
    if isinstance(module, nn.MultiheadAttention):
        keys: tuple[str, ...] = ATTENTION
    elif isinstance(module, LAYERS):
        keys = ("weight",)
    else:
        return []
    found = []
    for key in keys:
        weight = module._parameters.get(key)
        if weight is None or not weight.is_floating_point():
            continue
        if nn.parameter.is_lazy(weight) or weight.numel():
            found.append(Target(name, module, key))
    return found


# --- masks

_changes = 0  # counts masks set and taken away, so that a Hold knows when to look again


def set_mask_(module: nn.Module, key: str, mask: Tensor) -> None:
    """Gives parameter ``key`` this bool mask (True stays), in a buffer, and zeroes what it prunes.

    Raises:
        ValueError: there is no such parameter, the mask's shape is not its, or it has a NaN.
    """
    expect_model("set_mask_", module)
    expect("set_mask_", "a tensor as mask", isinstance(mask, Tensor), mask)
    weight = module._parameters.get(key)
    if weight is None:
        raise ValueError(f"set_mask_: {type(module).__name__} has no parameter {key!r}")
    if mask.shape != weight.shape:
        raise ValueError(
            f"set_mask_: {key}: expected a mask of shape {list(weight.shape)}, got {list(mask.shape)}"
        )
    if mask.is_floating_point() and bool(torch.isnan(mask).any()):
        raise ValueError(f"set_mask_: {key}: expected a bool mask, got one with NaN")
    global _changes
    _changes += 1
    with torch.inference_mode(False), torch.no_grad():  # an inference tensor has no version
        mask = (mask.detach() != 0).to(weight.device)
        weight.masked_fill_(~mask, 0.0)
    if key + SUFFIX in module._buffers:
        module._buffers[key + SUFFIX] = mask
    else:
        module.register_buffer(key + SUFFIX, mask)


def masked(model: nn.Module) -> list[Target]:
    """The weights that have a mask."""
    found = []
    for name, module in model.named_modules():
        for buffer, mask in module._buffers.items():
            key = buffer.removesuffix(SUFFIX)
            weight = module._parameters.get(key)
            ours = buffer.endswith(SUFFIX) and mask is not None and mask.dtype == torch.bool
            if ours and weight is not None and mask.shape == weight.shape:
                found.append(Target(name, module, key))
    return found


def masks(model: nn.Module) -> dict[str, Tensor]:
    """Name of each masked parameter and its mask: bool of its shape, True where it stays."""
    expect_model("masks", model)
    return {target.name: target.mask for target in masked(model) if target.mask is not None}


def finalize_(model: nn.Module) -> None:
    """Takes the masks away; pruned weights are zeros from now on, and may be trained again."""
    expect_model("finalize_", model)
    global _changes
    _changes += 1
    for target in masked(model):
        with torch.no_grad():
            target.weight.masked_fill_(~target.mask, 0.0)  # type: ignore[operator]
        del target.module._buffers[target.key + SUFFIX]
        target.module._non_persistent_buffers_set.discard(target.key + SUFFIX)


# --- training


def same(seen: tuple[Tensor, int], mask: Tensor) -> bool:
    """Whether it is the mask that was seen, and not written to since."""
    return seen[0] is mask and seen[1] == mask._version


class Hold:
    """Keeps masked weights of a model at zero under one optimizer; see :func:`hold_`."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        from ..optim import FusedStep
        from ..optim.matrix import MatrixStep

        self._model, self._optimizer = model, optimizer
        self._fused = isinstance(optimizer, FusedStep)
        self._elementwise = self._fused and not isinstance(optimizer, MatrixStep)
        self._seen: dict[Tensor, tuple[Tensor, int]] = {}
        self._targets: list[Target] = []
        self._owned: set[Tensor] = set()
        self._stamp = (-1, -1)  # masks set and taken away so far, and parameters of the optimizer
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        self._refresh()
        self._zero()

    def remove(self) -> None:
        """Lets go: pruned weights may be trained again."""
        for handle in self._handles:
            handle.remove()
        for param in self._seen if self._fused else ():
            self._optimizer.set_mask(param, None)  # type: ignore[attr-defined]
        self._handles.clear()
        self._seen.clear()

    def _refresh(self) -> None:
        """Masks may have been set, taken away, loaded or moved since the last step."""
        groups = self._optimizer.param_groups
        stamp = _changes, sum(len(group["params"]) for group in groups)
        if self._stamp != stamp:
            owned = self._owned = {p for group in groups for p in group["params"]}
            self._targets = [t for t in masked(self._model) if t.weight in owned]
            self._stamp = stamp
            current = {t.weight for t in self._targets}
            for param in [p for p in self._seen if p not in current]:
                del self._seen[param]
                if self._fused and param in owned:
                    self._optimizer.set_mask(param, None)  # type: ignore[attr-defined]
        changed = False
        for target in self._targets:
            mask, param = target.mask, target.weight
            if mask is None or param not in self._owned:  # exchanged by a load with assign=True
                continue
            if (seen := self._seen.get(param)) is None or not same(seen, mask):
                self._seen[param] = mask, mask._version
                changed = True
                if self._fused:
                    self._optimizer.set_mask(param, mask)  # type: ignore[attr-defined]
        if changed and isinstance(self._optimizer, torch.optim.LBFGS):
            self._optimizer.state.clear()  # directions that move pruned weights too

    def _before(
        self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._refresh()
        if self._elementwise:
            return None  # the step leaves these gradients out by itself
        self._leave_out()
        # A closure makes new gradients, LBFGS' several times in a step.
        named = {name: self._masking(value) for name, value in kwargs.items()}
        return tuple(self._masking(value) for value in args), named

    def _masking(self, argument: Any) -> Any:
        """A closure whose gradients are masked; anything else as it is."""
        if not callable(argument):
            return argument

        def closure() -> Any:
            loss = argument()
            self._leave_out()
            return loss

        return closure

    @torch.no_grad()
    def _leave_out(self) -> None:
        for param, (mask, _version) in self._seen.items():
            if param.grad is not None:
                param.grad.masked_fill_(~mask, 0.0)

    def _after(self, *_: Any) -> None:
        if not self._fused:
            self._zero()

    @torch.no_grad()
    def _zero(self) -> None:
        for param, (mask, _version) in self._seen.items():
            param.masked_fill_(~mask, 0.0)
            for name, value in self._optimizer.state.get(param, {}).items():
                coded = name.endswith("_codes")  # 8 bits: their zero is not 0, the step writes it
                if isinstance(value, Tensor) and value.shape == mask.shape and not coded:
                    value.masked_fill_(~mask, 0)


def hold_(model: nn.Module, optimizer: torch.optim.Optimizer) -> Hold:
    """Keeps the pruned weights of ``model`` and their optimizer state at exactly zero.

    trimtab.optim masks inside its step, in the same pass. Any other torch optimizer gets hooks: before
    a step, and after each call of its closure, gradients of pruned weights are zeroed, after it the
    weights and the states of their shape. Masks set, changed, loaded or finalized later are followed,
    and groups of parameters added. ``remove()`` of the result ends it.

    Raises:
        TypeError: not a module, or not a torch optimizer.
        ValueError: the optimizer has no parameter of the model.
    """
    if not isinstance(model, nn.Module) or not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"hold_: expected an nn.Module and a torch optimizer, got {type(model).__name__} and "
            f"{type(optimizer).__name__}"
        )
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if owned.isdisjoint(id(p) for p in model.parameters()):
        raise ValueError(
            f"hold_: expected an optimizer of the model's parameters, got {type(optimizer).__name__} "
            f"of {len(owned)} others"
        )
    known: Hold | None = optimizer.__dict__.get("_hold")
    if known is None or known._model is not model or not known._handles:
        known = optimizer.__dict__["_hold"] = Hold(model, optimizer)
    return known
