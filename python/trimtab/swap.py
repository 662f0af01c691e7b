"""swap_: exchanges a model's layers for int8 ones, in place, where that pays (swap_run.py)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from .report import SwapReport
    from .swap_rules import FilterFn


@dataclasses.dataclass(frozen=True)
class Int8:
    """Configuration of swap_: int8 weights.

    Attributes:
        weight_only: False quantizes each row of the input as well and multiplies in int8; True keeps
            the input in floating point.
        bits: of an affine weight, 2 to 8; with weight_only, where the layer has it.
        group_size: inputs of an output channel that share a scale; None for all of them.
    """

    weight_only: bool = False
    bits: int = 8
    group_size: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"Int8: expected bits in 2..8, got {self.bits}")
        if not self.weight_only and (self.bits != 8 or self.group_size is not None):
            raise ValueError(
                "Int8: expected weight_only=True with bits or group_size, got weight_only=False, "
                f"bits={self.bits}, group_size={self.group_size}"
            )

    def options(self) -> dict[str, Any]:
        """What differs from the default, as keyword arguments of a layer's from_float."""
        fields = ((field.name, field.default) for field in dataclasses.fields(self))
        return {
            name: getattr(self, name) for name, default in fields if getattr(self, name) != default
        }


def swap_(
    model: nn.Module,
    config: Int8,
    filter_fn: FilterFn | None = None,
    *,
    example_inputs: Any = None,
) -> SwapReport:
    """Exchanges the Linear, Conv2d, Embedding and EmbeddingBag modules of ``model`` for int8 ones.

    Works in place on instances, never on classes, and leaves alone what it could break: tied,
    parametrized, hooked, sharded, meta or lazy weights, subclasses with a forward of their own,
    weights that are read by a parent instead of the module being called. The report has the reason of
    each. A Linear or Conv2d whose output goes straight into ReLU, GELU or SiLU computes that as well.

    Where a nn.TransformerEncoderLayer gets an int8 Linear, its fused inference path is turned off on
    that instance, as it would bypass the Linear; a nn.TransformerEncoder then computes padded tokens
    instead of returning zeros for them.

    Args:
        model: any module; itself it cannot be exchanged, so a lone nn.Linear is left alone.
        config: such as ``trimtab.Int8()``.
        filter_fn: called with (module, qualified name) of each module that has an int8 form; only
            those are exchanged for which it is true.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments. The float model
            is run on them once, with its buffers and all random states restored afterwards, and each
            layer is measured on the shapes it saw; only what is faster is exchanged. Without them
            layers too small to gain are left alone by a fixed rule.

    Returns:
        A SwapReport; ``print`` it, ``undo()`` it. It keeps the float modules alive until it is
        dropped or told to ``release()`` them.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: example_inputs with a module that is still lazy.

    Whatever is raised, KeyboardInterrupt too, leaves the model as it was.
    """
    _check(model, config, filter_fn)
    from .swap_run import run  # 40 ms, which only those who swap should pay

    return run(model, config.options(), filter_fn, example_inputs)


def _check(model: Any, config: Any, filter_fn: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap_: expected model to be an nn.Module, got {type(model).__name__}")
    if not isinstance(config, Int8):
        shown = config.__name__ if isinstance(config, type) else type(config).__name__
        raise TypeError(f"swap_: expected config such as trimtab.Int8(), got {shown}")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(
            "swap_: expected filter_fn(module, name) -> bool or None, got "
            f"{type(filter_fn).__name__}"
        )
