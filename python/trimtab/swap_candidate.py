"""A layer that may be exchanged, with those that may take its place."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .nn.sparse_format import DoesNotFit
from .progress import progress
from .report import Patch, Row, tensor_bytes
from .swap_fuse import Fusion
from .swap_rules import KINDS, Survey, kind_of

if TYPE_CHECKING:
    from .swap import Int8, Sparse

Chosen = list[tuple[nn.Module, str, Row]]
# (words for it, name in trimtab.nn, options of its from_float)
Spec = tuple[str, str, dict[str, Any]]

# Without example_inputs nothing is measured: a weight of fewer zeros or fewer weights than this stays
# dense. On one thread of an AMX Xeon, 80 % zeros, 1 to 256 rows, fp32 and bf16: from 1024 x 1024 on
# sparse took 0.2 to 0.7 of torch's time; at 512 x 512, one row, fp32 up to 1.23. 2:4 in fp32 lost.
STATIC_SPARSITY = {"bitmap": 0.8, "2:4": 1.0, "block": 0.8}
STATIC_WEIGHTS = 1 << 20


@dataclasses.dataclass
class Choice:
    """A layer that might take a module's place."""

    label: str
    module: nn.Module
    sqnr_db: float

    def likeness(self) -> tuple:
        """Equal for weights that cost the same: of a sparse one its share of zeros decides, to 1 %."""
        sparsity = getattr(self.module, "sparsity", None)
        return (self.label, None if sparsity is None else round(100 * sparsity))


@dataclasses.dataclass
class Candidate:
    """A module, what might take its place, in the order of rising error, and what does so far."""

    module: nn.Module
    name: str
    row: Row
    fusion: Fusion | None
    choices: list[Choice]
    best: Choice | None = None

    @property
    def replacement(self) -> nn.Module:
        assert self.best is not None
        return self.best.module

    def call(self, choice: Choice | None, args: tuple, kwargs: dict[str, Any]) -> Callable[[], Any]:
        """What a choice computes, or with None the module and its activation."""
        if choice is not None:
            replacement = choice.module
            return lambda: replacement(*args, **kwargs)
        module, act = self.module, self.fusion.act if self.fusion else None
        if act is None:
            return lambda: module(*args, **kwargs)
        return lambda: act(module(*args, **kwargs))

    def take(self, choice: Choice | None) -> None:
        """Makes it the best so far; None is the module itself."""
        self.best, row = choice, self.row
        if choice is None:
            row.bytes_after, row.sqnr_db = row.bytes_before, None
        else:
            row.bytes_after, row.sqnr_db = tensor_bytes([choice.module]), choice.sqnr_db

    def likeness(self, holder: Choice | None, choice: Choice) -> tuple:
        """Equal for candidates that cost the same on the same input, in both forms."""
        act = self.fusion.activation if self.fusion else ""
        tensors = [self.module._parameters.get(key) for key in ("weight", "bias")]
        kinds = tuple(None if t is None else (str(t.dtype), str(t.device)) for t in tensors)
        held = None if holder is None else holder.likeness()
        return (type(self.module), self.module.extra_repr(), kinds, act, held, choice.likeness())


def _layer(kind: str) -> Any:
    from . import nn as layers

    return getattr(layers, kind, None)


def layer_problem(config: Int8 | Sparse, kind: str) -> str:
    """Why a kind of layer cannot be had with this configuration; empty if it can."""
    choices = config.choices(kind)
    if not choices:
        return f"no sparse form of {kind}"
    for _, name, options in choices:
        layer = _layer(name)
        if layer is None:
            return f"no {name} in this version"
        unknown = set(options) - set(inspect.signature(layer.from_float).parameters)
        # An embedding multiplies nothing: its weight is all there is to quantize.
        if "Embedding" in name:
            unknown.discard("weight_only")
        if unknown:
            return f"{name} has no {', '.join(sorted(unknown))}"
    return ""


def build(
    chosen: Chosen, fusions: dict[int, Fusion], config: Int8 | Sparse, measured: bool
) -> list[Candidate]:
    """Candidates with all their choices; if nothing will be measured, with the one that is taken."""
    candidates = []
    with progress(len(chosen), "building") as bar:
        for module, name, row in chosen:
            candidate = _candidate(module, name, row, fusions.get(id(module)), config)
            if candidate is not None and not measured:
                candidate = _static(candidate, config)
            if candidate is not None:
                candidates.append(candidate)
            bar.advance(name)
    return candidates


def _candidate(
    module: nn.Module, name: str, row: Row, fusion: Fusion | None, config: Int8 | Sparse
) -> Candidate | None:
    base = kind_of(module)
    assert base is not None
    mask = _mask(module, config)
    choices, problems = [], []
    for label, kind, options in config.choices(KINDS[base]):
        options = dict(options)
        if "Embedding" in kind:
            options.pop("weight_only", None)
        if fusion is not None:
            options["activation"] = fusion.activation
        if mask is not None and kind.startswith("Sparse"):
            options["mask"] = mask
        try:
            replacement = _layer(kind).from_float(module, **options)
        except DoesNotFit as problem:
            problems.append(str(problem))
            continue
        sqnr_db = _sqnr_db(module, replacement)
        if math.isnan(sqnr_db):
            problems.append("weight has NaN or Inf")
            continue
        choices.append(Choice(label, replacement, sqnr_db))
    if not choices:
        row.leave("; ".join(dict.fromkeys(problems)))
        return None
    if problems:
        row.reason = "; ".join(dict.fromkeys(problems))  # told beside what is chosen
    return Candidate(module, name, row, fusion, choices)


def _mask(module: nn.Module, config: Int8 | Sparse) -> Tensor | None:
    """What Sparse(sparsity=...) keeps of a weight; None where the weight itself says it."""
    weight: Any = module._parameters["weight"]
    sparsity = getattr(config, "sparsity", None)
    if sparsity is None or bool(torch.isnan(weight).any()):  # from_float names a NaN
        return None
    from .prune.masks import Pattern, kept, largest

    pattern = Pattern.parse("Sparse", config.pattern, config.block)  # type: ignore[union-attr]
    units = pattern.units(weight.detach().abs())
    keep = None
    if pattern.sparsity is None:
        keep = largest(units, kept(units.numel(), sparsity))
    return pattern.mask(units, keep, weight.shape)


def _static(candidate: Candidate, config: Int8 | Sparse) -> Candidate | None:
    """Without a measurement: the first choice that a fixed rule trusts to gain."""
    pattern = getattr(config, "pattern", "")
    weights = torch.Size(candidate.row.shape).numel()
    for choice in reversed(candidate.choices):
        sparsity = getattr(choice.module, "sparsity", None)
        trusted = sparsity is not None and sparsity >= STATIC_SPARSITY[pattern]
        if sparsity is None or (trusted and weights >= STATIC_WEIGHTS):
            candidate.take(choice)
            return candidate
    most = max(getattr(choice.module, "sparsity", 0.0) for choice in candidate.choices)
    candidate.row.leave(
        f"{100 * most:.0f} % zeros: without example_inputs to measure on, {pattern} is trusted to gain "
        f"from {100 * STATIC_SPARSITY[pattern]:.0f} % and {STATIC_WEIGHTS:,} weights on"
        if STATIC_SPARSITY[pattern] < 1
        else f"without example_inputs to measure on, {pattern} is not trusted to gain"
    )
    return None


def _sqnr_db(module: nn.Module, replacement: nn.Module) -> float:
    """10 log10(sum w^2 / sum (w - w')^2) of the weight; NaN if the weight has NaN or Inf."""
    weight: Any = module._parameters["weight"]
    weight = weight.detach().to(torch.float32)
    stands_for: Any = replacement.weight
    error = weight - stands_for.detach().reshape(weight.shape).to(torch.float32)
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
