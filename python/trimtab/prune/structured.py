"""Channels, neurons and heads really removed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import removal, state
from .apply import Sparsity
from .calibration import as_call, evaluating
from .checks import expect, expect_model, names, whole
from .graph import KNOWN, Graph, trace
from .masks import block_sums, check_scores, check_sparsity, kept, largest
from .state import set_mask_
from .undo import Undo

OP = "structured_"
TOLERANCE = 1e-3  # of the largest output: beyond it removal and masking disagree, not just round


@dataclass
class Group:
    """Layers whose outputs go together. Counts are of channels, or of heads."""

    layers: list[str]
    before: int
    after: int
    kind: str = "channels"
    note: str = ""


@dataclass
class StructuredReport:
    """What became smaller, and what was left alone and why; print it."""

    groups: list[Group] = field(default_factory=list)
    parameters_before: int = 0
    parameters_after: int = 0

    def __str__(self) -> str:
        lines = []
        for group in self.groups:
            note = f"  {group.note}" if group.note else ""
            names = ", ".join(group.layers)
            lines.append(f"{names}: {group.before} -> {group.after} {group.kind}{note}")
        counts = f"{self.parameters_before:,} -> {self.parameters_after:,} parameters"
        return "\n".join([*lines, counts])


def structured_(
    model: nn.Module,
    sparsity: Sparsity,
    example_inputs: Any,
    *,
    round_to: int = 8,
    scope: str = "layer",
    importance: Mapping[str, Tensor] | None = None,
    layers: Iterable[str] | None = None,
    remove: bool = True,
) -> StructuredReport:
    """Removes the least important channels, neurons and attention heads, in place.

    One run of the model on ``example_inputs`` shows what goes together: a channel with its batch norm,
    the layers that read it, and all that it is added to. nn.Linear, nn.Conv1d to nn.Conv3d (depthwise
    too), nn.BatchNorm, nn.LayerNorm, nn.Embedding, nn.PReLU, bare parameters and
    nn.MultiheadAttention become smaller; attention written out with views loses whole heads as well.
    What can't be followed, and the model's outputs, stay, and the report says why.

    The outputs are those of the model with the same channels masked (``remove=False``): a
    :class:`PrunedLayerNorm` still counts the features it has lost. Parameters are new objects: make
    optimizers afterwards. ``state_dict`` holds all shapes; :func:`load_state_dict_` loads it.

    Args:
        sparsity: share of the channels of each layer to remove, 0 to 1, or one for each layer by name.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments.
        round_to: channels left are a multiple of this (of as many heads as make one), rounded up;
            never none.
        scope: "layer", or "global": one ranking, by mean square of a channel's weights.
        importance: name of a parameter and scores of its shape, whose squares are summed instead of the
            weights' ("magnitude": L2 norm in float64, ties keep the lower index).
        layers: names of layers whose outputs may shrink; what they are coupled to shrinks with them.
        remove: False masks the same channels, see :func:`set_mask_`.

    Raises:
        TypeError: a name in ``layers`` of an unknown type of layer.
        ValueError: sparsity outside [0, 1], NaN weights (named), inputs that the model doesn't take,
            nothing to prune, a model that doesn't run with smaller layers. It is then as it was.
    """
    expect_model(OP, model)
    whole(OP, "round_to", round_to, 1)
    if scope not in ("layer", "global"):
        raise ValueError(f'{OP}: expected scope "layer" or "global", got {scope!r}')
    named = _named(model, sparsity, layers)
    _check_importance(model, importance)
    args, kwargs = as_call(OP, example_inputs)
    with torch.no_grad(), evaluating(model):
        try:
            graph, _ = trace(model, args, kwargs)
        except Exception as error:
            shapes = [list(x.shape) for x in (*args, *kwargs.values()) if hasattr(x, "shape")]
            raise ValueError(
                f"{OP}: the model does not take inputs of shapes {shapes}: {error}"
            ) from error
        pools = _pools(graph, _scores(model, graph, importance))
        report = StructuredReport(parameters_before=_count(model))
        gone = _choose(graph, pools, named, round_to, scope, report)
        with Undo() as undo:
            _mask(graph, gone, undo)
            if remove:
                masked = _run(model, args, kwargs)
                _remove(graph, gone, undo)
                _compare(model, args, kwargs, masked)
    state._changes += 1
    report.parameters_after = _count(model)
    return report


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _named(
    model: nn.Module, sparsity: Sparsity, layers: Iterable[str] | None
) -> dict[str, float] | float:
    """The sparsity of each layer that may shrink, or one for all."""
    modules = dict(model.named_modules())
    if isinstance(sparsity, Mapping):
        found = {name: check_sparsity(OP, value) for name, value in sparsity.items()}
    elif layers is None:
        return check_sparsity(OP, sparsity)
    else:
        found = dict.fromkeys(names(OP, layers), check_sparsity(OP, sparsity))
    for name in found:
        if name not in modules:
            raise ValueError(f"{OP}: expected names of layers, got {name!r}, not in the model")
        if not isinstance(modules[name], KNOWN):
            raise TypeError(
                f"{OP}: {name}: expected a layer out of {', '.join(k.__name__ for k in KNOWN)}, got "
                f"{type(modules[name]).__name__}"
            )
    return found


def _check_importance(model: nn.Module, importance: Mapping[str, Tensor] | None) -> None:
    if importance is None:
        return
    good = isinstance(importance, Mapping)
    expect(OP, "importance as a dict of scores by names of parameters", good, importance)
    parameters = dict(model.named_parameters())
    if unknown := sorted(set(importance) - set(parameters)):
        raise ValueError(
            f"{OP}: expected importance of parameters, got {unknown}, not in the model"
        )
    for name, values in importance.items():
        expect(OP, f"a tensor as importance of {name}", isinstance(values, Tensor), values)
        if values.shape != parameters[name].shape:
            raise ValueError(
                f"{OP}: importance of {name}: expected {list(parameters[name].shape)}, got "
                f"{list(values.shape)}"
            )


def _scores(
    model: nn.Module, graph: Graph, importance: Mapping[str, Tensor] | None
) -> dict[int, float]:
    """The mean square of the weights that make each unit, in float64."""
    names = {id(p): name for name, p in model.named_parameters()}
    sums: dict[int, float] = {}
    sizes: dict[int, int] = {}
    for slot in graph.slots.values():
        weight = slot.module._parameters.get(slot.key)
        if not slot.produces or weight is None or weight.dim() < 2:
            continue
        name = names[id(weight)]
        check_scores(OP, name, weight.detach())
        values = weight.detach()
        if importance is not None:
            values = importance[name] if name in importance else torch.zeros_like(values)
            check_scores(OP, f"the importance of {name}", values)
        lines = values.movedim(slot.dim, 0).reshape(len(slot.ids), -1).double().square()
        norms = block_sums(lines, (1, lines.shape[1])).reshape(-1).tolist()
        for unit, norm in zip(graph.roots(slot.ids).tolist(), norms):
            sums[unit] = sums.get(unit, 0.0) + norm
            sizes[unit] = sizes.get(unit, 0) + lines.shape[1]
    return {unit: total / sizes[unit] for unit, total in sums.items()}


@dataclass
class _Pool:
    """Units of coupled layers, lowest number first."""

    units: list[int]
    scores: list[float]
    layers: list[str]
    reason: str
    heads: bool
    size: int  # channels of a unit in the layer that makes it


def _pools(graph: Graph, scores: dict[int, float]) -> list[_Pool]:
    members: dict[int, set[int]] = {}
    sizes: dict[int, int] = {}
    for slot in graph.slots.values():
        roots = graph.roots(slot.ids).tolist()
        for unit in roots:
            members.setdefault(graph.pool(unit), set()).add(unit)
        if slot.produces:
            size = next((i for i, unit in enumerate(roots) if unit != roots[0]), len(roots))
            for pool in {graph.pool(unit) for unit in roots}:
                sizes[pool] = max(sizes.get(pool, 1), size)
    pools = []
    for at, units in sorted(members.items()):
        own = [
            source
            for i, source in enumerate(graph.sources)
            if graph._root(graph._source_parents, i) == at
        ]
        names = list(dict.fromkeys(source.name for source in own if source.layer))
        if not names:
            continue  # a dimension of a bare parameter
        reason = next((source.frozen for source in own if source.frozen), "")
        order = sorted(units)
        heads = any(source.heads for source in own) or sizes.get(at, 1) > 1
        values = [scores.get(unit, 0.0) for unit in order]
        pools.append(_Pool(order, values, names, reason, heads, sizes.get(at, 1)))
    return pools


def _choose(
    graph: Graph,
    pools: Sequence[_Pool],
    named: dict[str, float] | float,
    round_to: int,
    scope: str,
    report: StructuredReport,
) -> set[int]:
    """Units to remove; fills the report."""
    wanted: list[float | None] = []
    for pool in pools:
        if isinstance(named, dict):
            given = [named[layer] for layer in pool.layers if layer in named]
            if given and pool.reason:
                raise ValueError(f"{OP}: {', '.join(pool.layers)} can't shrink: {pool.reason}")
            wanted.append(max(given) if given else None)
        else:
            wanted.append(None if pool.reason else named)
    open_ = [pool for pool, share in zip(pools, wanted) if share is not None]
    if not open_:
        why = {pool.reason for pool in pools if pool.reason}
        raise ValueError(f"{OP}: nothing can be removed ({'; '.join(sorted(why)) or 'no layers'})")
    left: dict[int, int] = {}
    if scope == "global" and len({share for share in wanted if share is not None}) == 1:
        one = next(share for share in wanted if share is not None)
        flat = torch.tensor([score for pool in open_ for score in pool.scores], dtype=torch.float64)
        keep = largest(flat, kept(len(flat), one)).split([len(pool.units) for pool in open_])
        left = {id(pool): int(part.sum()) for pool, part in zip(open_, keep)}
    elif scope == "global":
        raise ValueError(f'{OP}: scope="global" takes one sparsity for all layers')
    gone: set[int] = set()
    for pool, share in zip(pools, wanted):
        count = len(pool.units)
        stay = count
        if share is not None:
            stay = left.get(id(pool), kept(count, share))
            unit = round_to // math.gcd(pool.size, round_to)
            stay = min(max(-(-stay // unit) * unit, unit), count)
            keep_mask = largest(torch.tensor(pool.scores, dtype=torch.float64), stay).tolist()
            gone |= {u for u, stays in zip(pool.units, keep_mask) if not stays}
        kind = f"heads of {pool.size}" if pool.heads else "channels"
        note = f"left alone: {pool.reason}" if pool.reason else ""
        report.groups.append(Group(pool.layers, count, stay, kind, note))
    return gone


def _positions(graph: Graph, gone: set[int]) -> list[tuple[Any, Tensor]]:
    """Slots that lose something, and which positions stay (bool)."""
    found = []
    for slot in graph.slots.values():
        keep = torch.tensor([unit not in gone for unit in graph.roots(slot.ids).tolist()])
        if not bool(keep.all()):
            found.append((slot, keep))
    return found


def _mask(graph: Graph, gone: set[int], undo: Undo) -> None:
    """Masks weights, biases and bare parameters of the units."""
    masks: dict[tuple[nn.Module, str], Tensor] = {}
    for slot, keep in _positions(graph, gone):
        undo.save(slot.module)
        param = slot.module._parameters.get(slot.key)
        if param is None:
            continue
        shape = [1] * param.dim()
        shape[slot.dim] = len(keep)
        own = keep.reshape(shape).expand(param.shape).to(param.device)
        at = slot.module, slot.key
        masks[at] = own & masks[at] if at in masks else own
    for (module, key), mask in masks.items():
        old = module._buffers.get(key + state.SUFFIX)
        set_mask_(module, key, mask if old is None else mask & old)


def _remove(graph: Graph, gone: set[int], undo: Undo) -> None:
    slots = _positions(graph, gone)
    changed = dict.fromkeys(slot.module for slot, _ in slots)
    for module in changed:
        undo.drop_new_buffers(module)  # masks for the comparison; older ones are cut like weights
        if isinstance(module, nn.LayerNorm):
            removal.become_layer_norm_(module)
        if isinstance(module, nn.MultiheadAttention):
            removal.become_attention_(module)
    for slot, keep in slots:
        if slot.key != "dense_features":
            removal.keep_(slot.module, slot.key, slot.dim, keep.nonzero().reshape(-1))
    for module in changed:
        removal.fit_(module)


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    out = model(*args, **kwargs)
    found, todo = [], [out]
    while todo:
        item = todo.pop()
        if isinstance(item, Tensor):
            found.append(item.detach().clone())
        elif hasattr(item, "values"):
            todo += item.values()
        elif isinstance(item, (list, tuple)):
            todo += item
    return found


def _compare(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], masked: list[Tensor]
) -> None:
    try:
        removed = _run(model, args, kwargs)
    except Exception as error:
        raise ValueError(f"{OP}: the model does not run with smaller layers: {error}") from error
    if not any(one.numel() for one in masked):
        raise ValueError(f"{OP}: expected example_inputs of at least one row, got empty outputs")
    for one, other in zip(masked, removed):
        if one.shape != other.shape:
            raise ValueError(
                f"{OP}: an output of shape {list(one.shape)} became {list(other.shape)}"
            )
        if not one.is_floating_point() or not one.numel():
            continue
        scale = float(one.abs().max())
        worst = float((one.double() - other.double()).abs().max())
        if not math.isfinite(scale):
            raise ValueError(f"{OP}: expected finite outputs on example_inputs, got {scale}")
        low = one.dtype in (torch.float16, torch.bfloat16)
        if not worst <= (0.05 if low else TOLERANCE) * scale + 1e-6:
            raise ValueError(
                f"{OP}: outputs of the smaller model are {worst:.3g} off those of the masked one; it "
                "does something to channels that can't be followed"
            )
