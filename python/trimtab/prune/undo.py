"""Pruning happens or doesn't: what was saved comes back if anything fails midway."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from . import state


class Undo:
    """with Undo() as undo: undo.save(module); change it. An exception brings all of them back.

    Saved are the module's class, attributes, and the values of its own parameters and buffers.
    """

    def __init__(self) -> None:
        self._saved: dict[nn.Module, tuple[type, dict[str, Any], list[tuple[Tensor, Tensor]]]] = {}

    def save(self, module: nn.Module, values: bool = True) -> None:
        """``values=False`` where tensors are exchanged but never written to."""
        if module in self._saved:
            return
        # The dicts of parameters, buffers and children are copied, the rest is only named.
        attributes = {
            key: value.copy() if isinstance(value, dict) else value
            for key, value in module.__dict__.items()
            if "_hooks" not in key  # whoever added them takes them away
        }
        tensors = [*module._parameters.values(), *module._buffers.values()]
        copies = [(t, t.detach().clone()) for t in tensors if values and t is not None]
        self._saved[module] = type(module), attributes, copies

    def drop_new_buffers(self, module: nn.Module) -> None:
        """Buffers that the module did not have when it was saved; the old ones are back."""
        module._buffers.clear()
        module._buffers.update(self._saved[module][1]["_buffers"])

    def restore(self) -> None:
        state._changes += 1
        for module, (kind, attributes, copies) in self._saved.items():
            module.__class__ = kind
            for key in [k for k in module.__dict__ if k not in attributes and "_hooks" not in k]:
                del module.__dict__[key]
            for key, value in attributes.items():
                now = module.__dict__.get(key)
                if isinstance(value, dict) and isinstance(now, dict):
                    now.clear()
                    now.update(value)
                else:
                    module.__dict__[key] = value
            with torch.no_grad():
                for tensor, value in copies:
                    if tensor.shape == value.shape and tensor.dtype == value.dtype:
                        tensor.copy_(value)
                    else:  # .half(), or the values of a sparse layer that took a checkpoint
                        tensor.data = value
        self._saved.clear()

    def __enter__(self) -> Undo:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.restore()
