"""Calibration: one forward pass in which each layer is pruned just before it is first called.

So every layer sees what the pruned layers before it give, and no activation is stored.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..progress import Progress, progress
from . import attention
from .state import Target
from .undo import Undo

# Rows of a weight, and the inputs [samples, K] that they are multiplied with.
Parts = list[tuple[slice, Tensor]]


def as_call(op: str, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of one call of the model; a list of batches is joined along dimension 0."""
    if isinstance(inputs, list):
        if not inputs:
            raise ValueError(f"{op}: expected calibration data, got an empty list")
        calls = [as_call(op, batch) for batch in inputs]
        count, names = len(calls[0][0]), calls[0][1].keys()
        if any(len(args) != count or kwargs.keys() != names for args, kwargs in calls):
            raise ValueError(f"{op}: expected calibration batches of the same structure")
        joined = [_join(op, column) for column in zip(*(args for args, _ in calls))]
        named = {key: _join(op, tuple(kwargs[key] for _, kwargs in calls)) for key in names}
        return tuple(joined), named
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple):
        return inputs, {}
    raise TypeError(
        f"{op}: expected calibration data as a tensor, a tuple of arguments, a dict of keyword "
        f"arguments or a list of these, got {type(inputs).__name__}"
    )


def _join(op: str, column: tuple[Any, ...]) -> Any:
    first = column[0]
    if not isinstance(first, Tensor):
        return first
    for at, batch in enumerate(column):
        if not isinstance(batch, Tensor) or batch.shape[1:] != first.shape[1:]:
            got = list(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
            wanted = ", ".join(["*", *map(str, first.shape[1:])])
            raise ValueError(
                f"{op}: calibration batch {at}: expected shape [{wanted}] as in batch 0, got {got}"
            )
    return torch.cat(column)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode, attention by its plain path (the fused one calls no layers)."""
    modes = [(module, module.training) for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes:
            module.training = mode


@contextmanager
def calling_out_proj(model: nn.Module) -> Iterator[None]:
    """Attention layers call their out_proj as a layer, so that hooks on it run."""
    patched = []
    try:
        for module in model.modules():
            if isinstance(module, nn.MultiheadAttention) and "forward" not in module.__dict__:
                module.forward = types.MethodType(attention.attend, module)  # type: ignore[method-assign]
                patched.append(module)
        yield
    finally:
        for module in patched:
            del module.__dict__["forward"]


class _Failed(Exception):
    """Carries an error of ours through the model's forward, past its own."""


def each_layer(
    op: str,
    model: nn.Module,
    chosen: list[Target],
    inputs: Any,
    prune: Callable[[Target, Parts], None],
) -> list[str]:
    """Calls ``prune(target, parts)`` for each target that a forward pass reaches, in that order.

    Returns the names of those it doesn't reach. After an error all weights are what they were.

    Raises:
        ValueError: the model doesn't take the inputs, or a layer sees NaN or Inf.
    """
    args, kwargs = as_call(op, inputs)
    waiting: dict[nn.Module, list[Target]] = {}
    for target in chosen:
        waiting.setdefault(target.module, []).append(target)
        if isinstance(target.module, nn.MultiheadAttention):
            attention.refuse(op, target.name, target.module)
        if isinstance(target.module, nn.Conv3d):
            raise TypeError(f"{op}: {target.name}: Conv3d has no calibrated pruning; layers= less")

    def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        for target in waiting.pop(module, []):
            bar.advance(target.name, steps=0)
            parts = seen(target, given, named)  # fails as the layer itself would
            try:
                check_inputs(op, target, parts)
                undo.save(target.module)
                prune(target, parts)
            except Exception as error:
                raise _Failed from error
            bar.advance(target.name)

    handles = []
    bar: Progress
    with torch.no_grad(), evaluating(model), Undo() as undo:
        with calling_out_proj(model), progress(len(chosen), op) as bar:
            try:
                for module in list(waiting):
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
                model(*args, **kwargs)
            except _Failed as failed:
                assert failed.__cause__ is not None
                raise failed.__cause__ from None
            except Exception as error:
                shapes = [list(x.shape) for x in (*args, *kwargs.values()) if hasattr(x, "shape")]
                raise ValueError(
                    f"{op}: the model does not take calibration data of shapes {shapes}: {error}"
                ) from error
            finally:
                for handle in handles:
                    handle.remove()
        missed = [target.name for left in waiting.values() for target in left]
        if len(missed) == len(chosen):
            raise ValueError(f"{op}: the forward pass calls none of the layers to prune")
    return missed


def seen(target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Parts:
    """The inputs of a weight in a call of its layer."""
    module, weight = target.module, target.weight
    if isinstance(module, nn.MultiheadAttention):
        names = ("query", "key", "value")
        given = [kwargs[n] if n in kwargs else args[i] for i, n in enumerate(names)]
        pairs = zip(given, attention.projections(module))
        own = [(x, part) for x, (key, part) in pairs if key == target.key]
        if all(x is own[0][0] for x, _ in own):  # self-attention
            own = [(own[0][0], slice(None))]
        parts = [(part, x.reshape(-1, weight.shape[1])) for x, part in own]
    else:
        x = args[0] if args else next(iter(kwargs.values()))
        if isinstance(module, nn.Linear):
            parts = [(slice(None), x.reshape(-1, weight.shape[1]))]
        else:
            parts = _unfolded(module, x)
    return parts


def check_inputs(op: str, target: Target, parts: Parts) -> None:
    """ValueError for NaN, Inf, nothing, integers, or another device."""
    for _, x in parts:
        if x.device != target.weight.device:
            raise ValueError(
                f"{op}: {target.layer}: expected calibration inputs on {target.weight.device}, got "
                f"{x.device}"
            )
        if not x.is_floating_point():
            raise ValueError(
                f"{op}: {target.layer}: expected floating-point calibration inputs, got {x.dtype}"
            )
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{op}: {target.layer}: its calibration inputs hold NaN or Inf")
        if not len(x):
            raise ValueError(f"{op}: {target.layer}: the calibration data is empty")


def _unfolded(module: Any, x: Tensor) -> Parts:
    """The patches that a convolution multiplies its filters with, group by group."""
    sizes: Any = (module.kernel_size, module.dilation, module.stride)
    spatial = len(module.kernel_size)
    if x.dim() == spatial + 1:
        x = x[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    if spatial == 1:
        x, sizes = x[:, :, None], tuple((1, *size) for size in sizes)
    kernel, dilation, stride = sizes
    patches = F.unfold(x, kernel, dilation, 0, stride).transpose(1, 2).flatten(0, 1)
    rows = module.out_channels // module.groups
    columns = patches.split(patches.shape[1] // module.groups, 1)
    return [(slice(g * rows, (g + 1) * rows), part) for g, part in enumerate(columns)]
