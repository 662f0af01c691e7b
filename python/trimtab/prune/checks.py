"""Wrong arguments, told before anything changes: the op, what was expected, what came."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def shown(value: object) -> str:
    """A number or a text as it is, of all else the type."""
    return repr(value) if isinstance(value, (int, float, str)) else type(value).__name__


def expect(op: str, words: str, good: bool, value: object) -> None:
    """TypeError unless ``good``."""
    if not good:
        raise TypeError(f"{op}: expected {words}, got {shown(value)}")


def expect_model(op: str, model: Any) -> None:
    expect(op, "an nn.Module", isinstance(model, nn.Module), model)


def expect_optimizer(op: str, optimizer: Any) -> None:
    expect(op, "a torch optimizer", isinstance(optimizer, torch.optim.Optimizer), optimizer)


def expect_function(op: str, words: str, value: Any) -> None:
    expect(op, words, callable(value), value)


def number(op: str, name: str, value: Any) -> float:
    """``value`` as a float; TypeError if it is none."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    expect(op, f"a number as {name}", good, value)
    return float(value)


def whole(op: str, name: str, value: Any, least: int) -> int:
    """``value`` if it is an int of at least ``least``."""
    good = isinstance(value, int) and not isinstance(value, bool)
    expect(op, f"an int as {name}", good, value)
    if value < least:
        raise ValueError(f"{op}: expected {name} >= {least}, got {value}")
    return value


def names(op: str, layers: Any) -> list[str]:
    """Names of layers as a list; one name is one layer."""
    if isinstance(layers, str):
        return [layers]
    found = None
    if not isinstance(layers, (int, float)) and layers is not None:
        try:
            found = list(layers)
        except TypeError:
            pass
    good = found is not None and all(isinstance(name, str) for name in found)
    expect(op, "names of layers", good, layers if found is None else found)
    assert found is not None
    return found
