"""Flop formulas for torch.utils.flop_counter, registered when that module is first imported.

Importing it pulls in Triton where it is installed (0.2 s and more), which `import trimtab` must not
cost; so the formulas wait here until somebody counts flops.
"""

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"
_waiting: list[tuple[Any, Callable[..., int]]] = []


def register_flop_formula(op: torch._ops.OpOverloadPacket) -> Callable[..., Any]:
    """As torch.utils.flop_counter.register_flop_formula, without importing it."""

    def register(formula: Callable[..., int]) -> Callable[..., int]:
        if _COUNTER in sys.modules:
            sys.modules[_COUNTER].register_flop_formula(op)(formula)
        else:
            _waiting.append((op, formula))
        return formula

    return register


class _AfterImport:
    """A finder that answers for the flop counter alone, and registers what waits once it has run."""

    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for op, formula in _waiting:
                module.register_flop_formula(op)(formula)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _AfterImport())
