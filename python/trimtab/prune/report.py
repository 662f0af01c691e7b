"""How sparse each layer is."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from ..nn.sparse_weight import SparseWeight
from .checks import expect_model
from .state import ATTENTION, LAYERS, masked


@dataclass
class Row:
    """One weight. ``zeros`` counts zeros, masked or not; ``note`` tells of padding."""

    name: str
    shape: tuple[int, ...]
    zeros: int
    masked: bool
    note: str = ""

    @property
    def numel(self) -> int:
        count = 1
        for side in self.shape:
            count *= side
        return count

    @property
    def sparsity(self) -> float:
        return self.zeros / self.numel if self.numel else 0.0


@dataclass
class PruneReport:
    """Rows of all prunable weights; print it."""

    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    @property
    def sparsity(self) -> float:
        """Share of zeros in all these weights."""
        total = sum(row.numel for row in self.rows)
        return sum(row.zeros for row in self.rows) / total if total else 0.0

    def __str__(self) -> str:
        wide = max([len(row.name) for row in self.rows] + [5])
        lines = [f"{'layer':<{wide}}  {'shape':<18} {'weights':>10} {'zeros':>8}"]
        for row in self.rows:
            shape = "x".join(map(str, row.shape))
            kind = "" if row.masked else "  no mask"
            note = f"  {row.note}" if row.note else ""
            share = f"{row.sparsity:8.2%}"
            lines.append(f"{row.name:<{wide}}  {shape:<18} {row.numel:>10,} {share}{kind}{note}")
        total = sum(row.numel for row in self.rows)
        lines.append(f"{'all':<{wide}}  {'':<18} {total:>10,} {self.sparsity:8.2%}")
        return "\n".join([*lines, *self.notes])


def report(model: nn.Module) -> PruneReport:
    """Sparsity of every Linear, convolution, attention projection, sparse layer and masked weight."""
    expect_model("report", model)
    held = {id(target.weight): target.name for target in masked(model)}
    rows, seen = [], set()
    for layer, module in model.named_modules():
        if isinstance(module, SparseWeight):
            name = f"{layer}.weight" if layer else "weight"
            total = torch.Size(module.weight_shape).numel()
            zeros = total - int(module.values.detach().count_nonzero())
            rows.append(Row(name, module.weight_shape, zeros, False, f"{module.pattern} layer"))
        for key, weight in module._parameters.items():
            kind = isinstance(module, LAYERS) and key == "weight"
            kind |= isinstance(module, nn.MultiheadAttention) and key in ATTENTION
            if weight is None or id(weight) in seen or not (kind or id(weight) in held):
                continue
            seen.add(id(weight))
            own = f"{layer}.{key}" if layer else key
            name = held.get(id(weight), own)  # of a tied one where its mask is
            zeros = weight.numel() - int(weight.detach().count_nonzero())
            rows.append(Row(name, tuple(weight.shape), zeros, id(weight) in held))
    return PruneReport(rows)
