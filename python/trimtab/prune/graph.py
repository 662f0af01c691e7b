"""Which entries of which tensors go together: channels followed through one run of the model.

Every output channel of a layer is a unit with a number. Beside each tensor of the run stands, for a
dimension that carries channels, the number of the unit at each position. Views move the numbers, adding
two tensors makes their units one, a layer's weight notes the numbers that come in. What an operation
does to channels that isn't known here freezes them, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import attention
from .graph_ops import RULES, Labels, LosesChannels, elementwise

Ids = np.ndarray  # int64: the unit at each position of a dimension


@dataclass
class Slot:
    """A dimension of a parameter or buffer, and the unit of each of its positions."""

    module: nn.Module
    key: str
    dim: int
    ids: Ids
    produces: bool  # outputs of a layer: their weights say how important the unit is


@dataclass
class Source:
    """A layer's outputs, or a bare parameter's; units of one source are pruned by one count."""

    name: str
    layer: bool
    heads: bool = False
    frozen: str = ""


@dataclass
class Graph:
    """All slots; ``find`` gives a unit's number after merging, ``pool`` its source's."""

    slots: dict[tuple[nn.Module, str, int], Slot] = field(default_factory=dict)
    sources: list[Source] = field(default_factory=list)
    _unit_source: list[int] = field(default_factory=list)
    _parents: list[int] = field(default_factory=list)
    _source_parents: list[int] = field(default_factory=list)

    @staticmethod
    def _root(parents: list[int], at: int) -> int:
        while parents[at] != at:
            parents[at] = parents[parents[at]]
            at = parents[at]
        return at

    def find(self, unit: int) -> int:
        return self._root(self._parents, unit)

    def roots(self, ids: Ids) -> Ids:
        return np.array([self.find(int(unit)) for unit in ids], np.int64)

    def pool(self, unit: int) -> int:
        return self._root(self._source_parents, self._unit_source[unit])

    def units(self, count: int, source: Source) -> Ids:
        """New units."""
        self.sources.append(source)
        self._source_parents.append(len(self._source_parents))
        first = len(self._parents)
        self._parents += range(first, first + count)
        self._unit_source += [len(self.sources) - 1] * count
        return np.arange(first, first + count)

    def merge(self, one: Ids, other: Ids) -> None:
        """Units at the same positions become one."""
        for a, b in set(zip(one.tolist(), other.tolist())):
            x, y = self.find(a), self.find(b)
            if x != y:
                low, high = min(x, y), max(x, y)
                self._parents[high] = low
                p, q = self.pool(low), self.pool(high)
                if p != q:
                    self._source_parents[max(p, q)] = min(p, q)

    def freeze(self, ids: Ids, reason: str) -> None:
        for source in {self._unit_source[int(unit)] for unit in ids}:
            self.sources[source].frozen = self.sources[source].frozen or reason

    def slot(self, module: nn.Module, key: str, dim: int, ids: Ids, produces: bool = False) -> None:
        """Notes a slot; one that is known is merged with."""
        absent = module._parameters.get(key) is None and module._buffers.get(key) is None
        if absent and key != "dense_features":
            return
        known = self.slots.get((module, key, dim))
        if known is None:
            self.slots[module, key, dim] = Slot(module, key, dim, ids, produces)
        else:
            self.merge(known.ids, ids)
            known.produces |= produces

    def produced(self, module: nn.Module, key: str, count: int, source: Source) -> Ids:
        """Units of a layer's outputs: new ones in its first call."""
        known = self.slots.get((module, key, 0))
        return self.units(count, source) if known is None else known.ids


class Tracer(TorchDispatchMode):
    """Runs beside the model; layers report by hooks, all else as ATen operations."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.graph = Graph()
        self.model = model
        self._labels: dict[int, Labels] = {}
        self._alive: list[Tensor] = []  # so that no id comes twice
        self._inside = 0  # a layer that reports as a whole
        self._bare: dict[int, tuple[str, nn.Module, str]] = {}
        for name, module in model.named_modules():
            for key, param in module._parameters.items():
                if param is not None:
                    self._bare[id(param)] = f"{name}.{key}".strip("."), module, key

    # --- labels

    def get(self, x: Tensor) -> Labels:
        """The labels of a tensor; a bare parameter's are made when it is first met."""
        if id(x) not in self._labels and id(x) in self._bare:
            name, module, key = self._bare[id(x)]
            labels: Labels = {}
            for dim, size in enumerate(x.shape):
                if size > 1:
                    labels[dim] = self.graph.units(size, Source(name, layer=False))
                    self.graph.slot(module, key, dim, labels[dim])
            self.put(x, labels)
        return self._labels.get(id(x), {})

    def put(self, x: Tensor, labels: Labels) -> None:
        self._alive.append(x)
        self._labels[id(x)] = labels

    def freeze(self, x: Any, reason: str) -> None:
        if isinstance(x, Tensor):
            for ids in self.get(x).values():
                self.graph.freeze(ids, reason)
        elif isinstance(x, dict):
            self.freeze(list(x.values()), reason)
        elif isinstance(x, (list, tuple)):
            for item in x:
                self.freeze(item, reason)

    def channels(self, x: Tensor, dim: int) -> Ids | None:
        """Labels of the dimension that a layer reads; those of others pass it by."""
        return self.get(x).get(dim % x.dim())

    # --- operations

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self._inside:
            return out
        given = [x for x in _flat((args, kwargs)) if isinstance(x, Tensor)]
        if not any(self.get(x) for x in given):
            return out
        name = func._schema.name.removeprefix("aten::")
        rule: Callable[..., Any] | None = RULES.get(name)
        if rule is None and torch.Tag.pointwise in func.tags and isinstance(out, Tensor):
            rule = elementwise
        if rule is None:
            self.freeze(given, f"{name} does not say what becomes of its channels")
            return out
        try:
            rule(self, out, *args, **kwargs)
        except LosesChannels as error:
            self.freeze(given, str(error))
        return out

    # --- layers

    def enter(self, *_: Any) -> None:
        self._inside += 1

    def leave(self, name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            self._inside -= 1
            if self._inside == 0:
                given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
                report(self, name, module, given, out)

        return hook


def _flat(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return [value]
    return [leaf for item in value for leaf in _flat(item)]


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
KNOWN = (
    *(nn.Linear, nn.Embedding, nn.LayerNorm, nn.PReLU, nn.MultiheadAttention),
    *CONVOLUTIONS,
    *BATCH_NORMS,
)


def report(tracer: Tracer, name: str, module: Any, given: list[Tensor], out: Any) -> None:
    """What a layer does to channels."""
    graph, x = tracer.graph, given[0]
    if isinstance(module, nn.MultiheadAttention):
        _attention(tracer, name, module, given, out[0])
        return
    if "weight" not in module._parameters:  # int8, sparse, parametrized
        tracer.freeze(given, f"{name} is a {type(module).__name__}, whose weight cannot shrink")
        return
    labels = dict(tracer.get(x))
    if isinstance(module, (nn.Linear, nn.Embedding)):
        at = out.dim() - 1
        if isinstance(module, nn.Linear) and (ids := labels.pop(x.dim() - 1, None)) is not None:
            graph.slot(module, "weight", 1, ids)
        if isinstance(module, nn.Linear):
            labels[at] = _outputs(graph, name, module, out.shape[at])
        else:
            ids = graph.units(out.shape[at], Source(name, layer=True))
            known = graph.slots.get((module, "weight", 1))
            labels[at] = ids if known is None else known.ids
            graph.slot(module, "weight", 1, labels[at], produces=True)
    elif isinstance(module, CONVOLUTIONS):
        at = out.dim() - 1 - len(module.kernel_size)
        ids = labels.pop(at, None)
        others, labels = labels, {}
        if others:
            tracer.freeze(x, f"{name} mixes them over space")
        labels[at] = _convolution(graph, name, module, ids)
    else:
        at = x.dim() - 1 if isinstance(module, nn.LayerNorm) else 1
        ids = labels.get(at)
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
            tracer.freeze(x, f"{name} normalizes over several dimensions")
        elif ids is not None and getattr(module, "num_parameters", 0) != 1:
            for key in ("weight", "bias", "running_mean", "running_var"):
                graph.slot(module, key, 0, ids)
            if isinstance(module, nn.LayerNorm):  # its statistics are over these, see removal.py
                graph.slot(module, "dense_features", 0, ids)
    tracer.put(out, labels)


def _outputs(graph: Graph, name: str, module: nn.Module, count: int) -> Ids:
    ids = graph.produced(module, "weight", count, Source(name, layer=True))
    graph.slot(module, "weight", 0, ids, produces=True)
    graph.slot(module, "bias", 0, ids)
    return ids


def _convolution(graph: Graph, name: str, module: Any, ids: Ids | None) -> Ids:
    if module.groups == 1:
        if ids is not None:
            graph.slot(module, "weight", 1, ids)
        return _outputs(graph, name, module, module.out_channels)
    if module.groups == module.in_channels == module.out_channels and ids is not None:
        graph.slot(module, "weight", 0, ids)  # depthwise: channels pass, each with its filter
        graph.slot(module, "bias", 0, ids)
        return ids
    made = _outputs(graph, name, module, module.out_channels)
    for which in (ids, made):
        if which is not None:
            graph.freeze(which, f"{name} has {module.groups} groups")
    return made


def _attention(tracer: Tracer, name: str, module: Any, given: list[Tensor], out: Tensor) -> None:
    graph = tracer.graph
    parts = attention.projections(module)
    given = (given[:1] * 3) if len(given) < 3 else given[:3]
    rows = module.out_proj.in_features
    source = Source(name, layer=True, heads=True)
    known = graph.slots.get((module.out_proj, "weight", 1))
    if known is None:
        heads = np.repeat(graph.units(module.num_heads, source), rows // module.num_heads)
    else:
        heads = known.ids
    for x, (key, _) in zip(given, parts):
        if (ids := tracer.channels(x, -1)) is not None:
            graph.slot(module, key, 1, ids)
        elif (other := graph.slots.get((module, key, 1))) is not None:
            graph.freeze(other.ids, f"{name} also reads channels that can't be pruned")
    packed = len({key for key, _ in parts}) == 1
    for key in sorted({key for key, _ in parts}):
        graph.slot(module, key, 0, np.tile(heads, 3) if packed else heads, produces=True)
    graph.slot(module, "in_proj_bias", 0, np.tile(heads, 3))
    graph.slot(module.out_proj, "weight", 1, heads)
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        graph.freeze(heads, f"{name} has add_bias_kv or add_zero_attn")
        for x in given:
            tracer.freeze(x, f"{name} has add_bias_kv or add_zero_attn")
    made = _outputs(graph, f"{name}.out_proj", module.out_proj, out.shape[-1])
    tracer.put(out, {out.dim() - 1: made})


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Graph, Any]:
    """The graph of one run, and what it gave."""
    tracer = Tracer(model)
    handles = []
    try:
        for name, module in model.named_modules():
            if isinstance(module, KNOWN):
                handles.append(module.register_forward_pre_hook(tracer.enter))
                hook = tracer.leave(name or "the model")
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
        with tracer:
            out = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    values = list(out.values()) if hasattr(out, "values") and not isinstance(out, Tensor) else out
    tracer.freeze(values, "the model's output")
    owners: dict[int, int] = {}
    for module in model.modules():
        for param in filter(lambda p: p is not None, module._parameters.values()):
            owners[id(param)] = owners.get(id(param), 0) + 1
    for slot in tracer.graph.slots.values():
        if owners.get(id(slot.module._parameters.get(slot.key)), 1) > 1:
            tracer.graph.freeze(slot.ids, "several layers share the parameter")
    return tracer.graph, out
