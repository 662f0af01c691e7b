"""trimtab: INT8, sparse and fused-optimizer kernels as drop-in PyTorch layers and optimizers.

Importing it is cheap and silent: torch, the kernels and CUDA are touched when a name is first used.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULES = ("kernels", "nn", "numpy", "ops", "optim", "prune", "reference", "report", "swap")
_NAMES = {
    "swap_": "swap",
    "Int8": "swap",
    "Sparse": "swap",
    "SwapReport": "report",
    "get_isa": "ops",
    "set_isa": "ops",
}

__all__ = [
    "Int8",
    "Sparse",
    "SwapReport",
    "get_cmake_dir",
    "get_include",
    "get_isa",
    "get_library_dir",
    "kernels",
    "nn",
    "numpy",
    "ops",
    "optim",
    "prune",
    "reference",
    "report",
    "set_isa",
    "swap",
    "swap_",
]

if TYPE_CHECKING:
    from . import kernels, nn, numpy, ops, optim, prune, reference, report, swap
    from .ops import get_isa, set_isa
    from .report import SwapReport
    from .swap import Int8, Sparse, swap_


def get_include() -> str:
    """Folder of the C headers: ``#include <trimtab/int8_linear.h>``."""
    return str(Path(__file__).parent / "include")


def get_library_dir() -> str:
    """Folder of libtrimtab.so."""
    return str(Path(__file__).parent / "lib")


def get_cmake_dir() -> str:
    """Folder of trimtab-config.cmake, for ``find_package(trimtab)``."""
    return str(Path(__file__).parent / "cmake")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _NAMES:
        return getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)
    raise AttributeError(f"module 'trimtab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
