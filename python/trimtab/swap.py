"""swap_: exchanges a model's layers for int8 or sparse ones, in place, where that pays."""

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

    def choices(self, kind: str) -> list[tuple[str, str, dict[str, Any]]]:
        """What may replace a torch.nn ``kind``: (words for it, name in trimtab.nn, its options)."""
        return [("in int8", f"Int8{kind}", self.options())]


@dataclasses.dataclass(frozen=True)
class Sparse:
    """Configuration of swap_: what a pruned model has left, compressed, where that is faster.

    Attributes:
        pattern: "bitmap" (any weights), "2:4" (at most two of four adjacent inputs) or "block".
        sparsity: None takes the weights as they are: what does not fit the pattern is left alone, and
            the report names its first position. A number in [0, 1] asks for that share of each
            exchanged layer's weights to be pruned, by magnitude, exactly (trimtab.prune has better
            ways); 2:4 takes 0.5 alone.
        block: (outputs, inputs) of a block; (32, 32) if not given, with pattern "block" alone.
        int8: allows int8 values, and a dense int8 layer where that is faster still: the error of
            Int8(). False keeps the weights that stand exactly as they are.
    """

    pattern: str = "bitmap"
    sparsity: float | None = None
    block: tuple[int, int] | None = None
    int8: bool = False

    def __post_init__(self) -> None:
        from .prune.masks import Pattern, check_sparsity

        if self.pattern not in ("bitmap", "2:4", "block"):
            raise ValueError(
                f"Sparse: expected pattern 'bitmap', '2:4' or 'block', got {self.pattern!r}"
            )
        Pattern.parse("Sparse", self.pattern, self.block)
        if not isinstance(self.int8, bool):
            raise TypeError(f"Sparse: expected int8 True or False, got {self.int8!r}")
        if self.sparsity is not None:
            check_sparsity("Sparse", self.sparsity)
            if self.pattern == "2:4" and self.sparsity != 0.5:
                raise ValueError(
                    f"Sparse: expected sparsity 0.5 or None with pattern '2:4', got {self.sparsity}"
                )

    def choices(self, kind: str) -> list[tuple[str, str, dict[str, Any]]]:
        """As Int8.choices: dense first, which what is sparse has to beat, then by rising error."""
        if kind not in ("Linear", "Conv2d"):
            return []
        form: dict[str, Any] = {"pattern": self.pattern}
        if self.pattern == "block":
            form["block"] = tuple(self.block or (32, 32))
        sparse = ("sparse", f"Sparse{kind}", form)
        if not self.int8:
            return [sparse]
        in_int8 = ("sparse in int8", f"Sparse{kind}", {**form, "int8": True})
        return [("in int8", f"Int8{kind}", {}), sparse, in_int8]


def swap_(
    model: nn.Module,
    config: Int8 | Sparse,
    filter_fn: FilterFn | None = None,
    *,
    example_inputs: Any = None,
) -> SwapReport:
    """Exchanges the Linear, Conv2d, Embedding and EmbeddingBag modules for int8 or sparse ones.

    Works in place on instances, never on classes, and leaves alone what it could break: tied,
    parametrized, hooked, sharded, meta or lazy weights, subclasses with a forward of their own,
    weights that are read by a parent instead of the module being called. The report has the reason of
    each. A Linear or Conv2d whose output goes straight into ReLU, GELU or SiLU computes that as well.

    With ``trimtab.Sparse`` a Linear or Conv2d stays dense or becomes sparse or, with ``int8=True``,
    int8 or sparse int8: whichever is fastest on ``example_inputs``. A form takes a place only if it is
    faster by 3 % and, by a sign test over interleaved rounds, surely faster; if not by far, thrice:
    with calls in turns and, later, with pauses between them and with the same call again and again. Of
    two that are as good a dense one is kept, or else the one of smaller error. A sparse weight never
    takes more memory than the dense one. Masks of trimtab.prune beside a weight say what is kept, and
    end with the module they belong to.

    Where a nn.TransformerEncoderLayer gets an int8 Linear, its fused inference path is turned off on
    that instance, as it would bypass the Linear; a nn.TransformerEncoder then computes padded tokens
    instead of returning zeros for them.

    Args:
        model: any module; itself it cannot be exchanged, so a lone nn.Linear is left alone.
        config: such as ``trimtab.Int8()`` or ``trimtab.Sparse("bitmap")``.
        filter_fn: called with (module, qualified name) of each module that has such a form; only
            those are exchanged for which it is true.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments. The float model
            is run on them once, with its buffers and all random states restored afterwards, and each
            layer is measured on the shapes it saw; only what is faster is exchanged. That takes about
            0.1 to 0.4 s for each distinct layer and shape, up to 3 s where it is close or other
            processes disturb. Without them layers too small to gain are left alone by a fixed rule.

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

    return run(model, config, filter_fn, example_inputs)


def _check(model: Any, config: Any, filter_fn: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap_: expected model to be an nn.Module, got {type(model).__name__}")
    if not isinstance(config, Int8 | Sparse):
        shown = config.__name__ if isinstance(config, type) else type(config).__name__
        raise TypeError(f"swap_: expected config such as trimtab.Int8(), got {shown}")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(
            "swap_: expected filter_fn(module, name) -> bool or None, got "
            f"{type(filter_fn).__name__}"
        )
