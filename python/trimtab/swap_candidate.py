"""A layer that may be exchanged, with the int8 one for it."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .progress import progress
from .report import Patch, Row, tensor_bytes
from .swap_fuse import Fusion
from .swap_rules import KINDS, Survey, kind_of

Chosen = list[tuple[nn.Module, str, Row]]


@dataclasses.dataclass
class Candidate:
    module: nn.Module
    name: str
    row: Row
    fusion: Fusion | None
    replacement: nn.Module

    def before(self, args: tuple, kwargs: dict[str, Any]) -> Callable[[], Any]:
        module, act = self.module, self.fusion.act if self.fusion else None
        if act is None:
            return lambda: module(*args, **kwargs)
        return lambda: act(module(*args, **kwargs))

    def after(self, args: tuple, kwargs: dict[str, Any]) -> Callable[[], Any]:
        replacement = self.replacement
        return lambda: replacement(*args, **kwargs)

    def likeness(self) -> tuple:
        """Equal for candidates that cost the same on the same input."""
        act = self.fusion.activation if self.fusion else ""
        tensors = [self.module._parameters.get(key) for key in ("weight", "bias")]
        kinds = tuple(None if t is None else (str(t.dtype), str(t.device)) for t in tensors)
        return (type(self.module), self.module.extra_repr(), kinds, act)


def _layer(kind: str) -> Any:
    from . import nn as layers

    return getattr(layers, kind, None)


def layer_problem(kind: str, options: dict[str, Any]) -> str:
    """Why a kind of layer cannot be had with this configuration; empty if it can."""
    layer = _layer(kind)
    if layer is None:
        return f"no {kind} in this version"
    unknown = set(options) - set(inspect.signature(layer.from_float).parameters)
    # An embedding multiplies nothing: its weight is all there is to quantize.
    if "Embedding" in kind:
        unknown.discard("weight_only")
    return f"{kind} has no {', '.join(sorted(unknown))}" if unknown else ""


def build(chosen: Chosen, fusions: dict[int, Fusion], options: dict[str, Any]) -> list[Candidate]:
    candidates = []
    with progress(len(chosen), "quantizing") as bar:
        for module, name, row in chosen:
            candidate = _quantized(module, name, row, fusions.get(id(module)), options)
            if candidate is not None:
                candidates.append(candidate)
            bar.advance(name)
    return candidates


def _quantized(
    module: nn.Module, name: str, row: Row, fusion: Fusion | None, options: dict[str, Any]
) -> Candidate | None:
    base = kind_of(module)
    assert base is not None
    layer = _layer(KINDS[base])
    options = dict(options)
    if "Embedding" in KINDS[base]:
        options.pop("weight_only", None)
    if fusion is not None:
        options["activation"] = fusion.activation
    replacement = layer.from_float(module, **options)
    row.bytes_after = tensor_bytes([replacement])
    sqnr_db = _sqnr_db(module, replacement)
    if math.isnan(sqnr_db):
        row.leave("weight has NaN or Inf")
        return None
    row.sqnr_db = sqnr_db
    return Candidate(module, name, row, fusion, replacement)


def _sqnr_db(module: nn.Module, replacement: nn.Module) -> float:
    """10 log10(sum w^2 / sum (w - w_int8)^2) of the weight; NaN if the weight has NaN or Inf."""
    weight: Any = module._parameters["weight"]
    weight = weight.detach().to(torch.float32)
    stands_for: Any = replacement.weight
    error = weight - stands_for.reshape(weight.shape).to(torch.float32)
    norm = torch.linalg.vector_norm
    signal, noise = (float(norm(t, dtype=torch.float64)) for t in (weight, error))
    if noise == 0:
        return math.inf
    return 20 * math.log10(signal / noise) if signal and noise < math.inf else math.nan


def patches_of(candidates: Sequence[Candidate], survey: Survey) -> list[Patch]:
    patches = []
    for candidate in candidates:
        for place in survey.places[id(candidate.module)]:
            patches.append(
                Patch(place.parent, place.key, candidate.module, candidate.replacement, place.name)
            )
        if candidate.fusion is not None:
            patches.append(candidate.fusion.patch())
    return patches
