"""What the demo's parts count alike: percentiles of times, bytes in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile, linear between neighbours."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def spread(times: Sequence[float]) -> tuple[float, float, float]:
    """p20, median, p80."""
    low, middle, high = (quantile(times, q) for q in (0.2, 0.5, 0.8))
    return low, middle, high


def held_bytes(*roots: Any) -> int:
    """Bytes of all tensors in there, each memory counted once; of a module all that it has."""
    from torch import Tensor, nn  # the demo's command line comes up without torch

    storages: dict[int, int] = {}
    todo = list(roots)
    while todo:
        item = todo.pop()
        if isinstance(item, Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, nn.Module):
            todo += [*item.parameters(), *item.buffers()]
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, (list, tuple)):
            todo += item
    return sum(storages.values())
