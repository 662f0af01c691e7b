"""What a model's layers really see: one run on example inputs."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .swap_fuse import Fusion

_INDEX_DTYPES = (torch.int32, torch.int64)


@dataclasses.dataclass
class Call:
    """Arguments of one call: float tensors as a description, all else as it was."""

    leaves: list[Any]
    tree: Any
    autocast: tuple[str, torch.dtype] | None

    @staticmethod
    def of(args: tuple, kwargs: dict[str, Any]) -> Call:
        leaves, tree = pytree.tree_flatten((args, kwargs))
        device = next((leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)), "cpu")
        on = torch.is_autocast_enabled(device)
        autocast = (device, torch.get_autocast_dtype(device)) if on else None
        return Call([_keep(leaf) for leaf in leaves], tree, autocast)

    def key(self) -> tuple:
        """Equal for calls that cost the same."""
        shapes = (leaf.key() if isinstance(leaf, _Spec) else _other(leaf) for leaf in self.leaves)
        return (str(self.tree), self.autocast, *shapes)

    def arguments(self) -> tuple[tuple, dict[str, Any]]:
        """Arguments of the same shapes, strides and dtypes, random where they were float."""
        random_numbers = torch.Generator().manual_seed(0)
        leaves = [
            leaf.tensor(random_numbers) if isinstance(leaf, _Spec) else leaf for leaf in self.leaves
        ]
        return pytree.tree_unflatten(leaves, self.tree)

    def context(self) -> contextlib.AbstractContextManager:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.autocast[0], self.autocast[1])


@dataclasses.dataclass(frozen=True)
class _Spec:
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def key(self) -> tuple:
        return (tuple(self.shape), self.stride, str(self.dtype), str(self.device))

    def tensor(self, generator: torch.Generator) -> Tensor:
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride))
        storage = torch.randn(max(last + 1, 1), generator=generator)
        return storage.to(self.device, self.dtype).as_strided(self.shape, self.stride)


def _keep(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    plain = type(leaf) in (Tensor, nn.Parameter) and leaf.layout == torch.strided
    if plain and not leaf.is_nested and leaf.is_floating_point():
        return _Spec(leaf.shape, leaf.stride(), leaf.dtype, leaf.device)
    return leaf.detach().clone()


def _other(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        # Indices are kept as they were: one embedding's may be out of another one's range.
        largest = leaf.max().item() if leaf.numel() and leaf.dtype in _INDEX_DTYPES else None
        return (tuple(leaf.shape), str(leaf.dtype), str(leaf.device), str(leaf.layout), largest)
    return repr(leaf)


class Capture:
    """One run of a model on example inputs: what was called, with what, how often."""

    def __init__(self) -> None:
        self.counts: dict[int, Counter[tuple]] = {}
        self.calls: dict[tuple, Call] = {}
        self.first: dict[int, Call] = {}  # with the arguments themselves, for whole encoders
        self._direct: Counter[int] = Counter()
        self._pending: dict[int, Tensor] = {}

    def reached(self, module: nn.Module) -> bool:
        return id(module) in self.counts

    def confirms(self, module: nn.Module, fusion: Fusion) -> bool:
        """True if each output of ``module`` went into the activation as the very next thing."""
        if not isinstance(fusion.act, nn.Module):
            return True  # a function cannot be hooked; its class's source decides
        return self._direct[id(module)] == sum(self.counts[id(module)].values())

    def run(
        self,
        model: nn.Module,
        example_inputs: Any,
        modules: Sequence[nn.Module],
        fusions: Mapping[int, Fusion],
        units: Sequence[nn.Module],
    ) -> None:
        """Calls the model once without gradients; leaves no trace in it."""
        args, kwargs = _arguments(example_inputs)
        handles = []
        try:
            for module in modules:
                hook = self._see if id(module) not in fusions else self._see_fusable
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
            acts = {id(f.act): f.act for f in fusions.values() if isinstance(f.act, nn.Module)}
            for act in acts.values():
                handles.append(act.register_forward_pre_hook(self._see_activation))
            for unit in units:
                handles.append(unit.register_forward_pre_hook(self._see_unit, with_kwargs=True))
            with unchanged(model), torch.no_grad():
                model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
            self._pending.clear()

    def _see(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        call = Call.of(args, kwargs)
        key = call.key()
        self.calls.setdefault(key, call)
        self.counts.setdefault(id(module), Counter())[key] += 1

    def _see_fusable(self, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        self._see(module, args, kwargs, out)
        self._pending[id(module)] = out

    def _see_activation(self, act: nn.Module, args: tuple) -> None:
        for module_id, out in list(self._pending.items()):
            if args and args[0] is out:
                self._direct[module_id] += 1
                del self._pending[module_id]

    def _see_unit(self, unit: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if id(unit) not in self.first:
            leaves, tree = pytree.tree_flatten((args, kwargs))
            kept = [x.detach().clone() if isinstance(x, Tensor) else x for x in leaves]
            self.first[id(unit)] = Call(kept, tree, Call.of(args, kwargs).autocast)


def _arguments(example_inputs: Any) -> tuple[tuple, dict[str, Any]]:
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    raise TypeError(
        "swap_: expected example_inputs as a tensor, a tuple of arguments or a dict of keyword "
        f"arguments, got {type(example_inputs).__name__}"
    )


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restores buffers (batch-norm statistics) and every random state; forces plain eager calls."""
    saved = []
    for module in model.modules():
        # Our own layers' buffers are their weight: large, and no forward writes to them.
        if module._buffers and not hasattr(module, "resident_bytes"):
            objects = dict(module._buffers)
            copies = {k: b.clone() for k, b in objects.items() if b is not None}
            saved.append((module, objects, copies))
    cuda = {t.device.index for t in model.parameters() if t.device.type == "cuda"}
    python_state, numpy_state = random.getstate(), _numpy_state()
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        with torch.random.fork_rng(sorted(cuda)), torch.compiler.set_stance("force_eager"):
            # nn.TransformerEncoderLayer's fast path calls none of the modules to be watched.
            torch.backends.mha.set_fastpath_enabled(False)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        random.setstate(python_state)
        _numpy_state(numpy_state)
        with torch.no_grad():
            for module, objects, copies in saved:
                module._buffers.clear()
                module._buffers.update(objects)
                for key, copy in copies.items():
                    buffer = objects[key]
                    if buffer is not None and not torch.equal(buffer, copy):
                        buffer.copy_(copy)


def _numpy_state(state: Any = None) -> Any:
    import numpy  # late, as it takes its time

    if state is None:
        return numpy.random.get_state()
    return numpy.random.set_state(state)
