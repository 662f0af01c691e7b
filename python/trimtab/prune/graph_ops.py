"""What ATen operations do to channels: a rule takes the tracer, the result, and the call's arguments.

Labels are {dimension: units}. A rule raises LosesChannels, with a reason, where channels can't be
followed; all channels of the operands are then left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from math import prod
from typing import Any

import numpy as np
from torch import Tensor

Labels = dict[int, np.ndarray]


class LosesChannels(Exception):
    """Which channel is where can't be followed through an operation; says why."""


def elementwise(tracer: Any, out: Tensor, *args: Any, **kwargs: Any) -> None:
    """Operands broadcast; units at the same position become one."""
    given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    labels: Labels = {}
    for dim, size in enumerate(out.shape):
        found, plain = [], False
        for x in given:
            own = dim - out.dim() + x.dim()
            if own < 0:
                continue
            ids = tracer.get(x).get(own)
            if ids is not None and x.shape[own] == size:
                found.append(ids)
            elif ids is not None:
                tracer.graph.freeze(ids, "a single channel is broadcast")
            elif x.shape[own] > 1:
                plain = True
        for ids in found[1:]:
            tracer.graph.merge(found[0], ids)
        if found and plain:
            tracer.graph.freeze(found[0], "it is added to or multiplied with a fixed tensor")
        elif found:
            labels[dim] = found[0]
    tracer.put(out, labels)


def same(tracer: Any, out: Tensor, x: Tensor, *_: Any, **__: Any) -> None:
    tracer.put(out, dict(tracer.get(x)))


def permute(tracer: Any, out: Tensor, x: Tensor, dims: Sequence[int]) -> None:
    labels = tracer.get(x)
    order = [dim % x.dim() for dim in dims]
    tracer.put(out, {new: labels[old] for new, old in enumerate(order) if old in labels})


def transpose(tracer: Any, out: Tensor, x: Tensor, a: int = 0, b: int = 1) -> None:
    order = list(range(x.dim()))
    if x.dim() > 1:
        order[a], order[b] = order[b], order[a]
    permute(tracer, out, x, order)


def expand(tracer: Any, out: Tensor, x: Tensor, *_: Any, **__: Any) -> None:
    shift = out.dim() - x.dim()
    labels = tracer.get(x)
    for dim, ids in labels.items():
        if x.shape[dim] != out.shape[dim + shift]:
            tracer.graph.freeze(ids, "a single channel is broadcast")
    tracer.put(out, {d + shift: i for d, i in labels.items() if len(i) == out.shape[d + shift]})


def view(tracer: Any, out: Tensor, x: Tensor, *_: Any, **__: Any) -> None:
    """Dimensions merge and split in runs of equal size: [B, H, d] -> [B, H d] and back."""
    labels: Labels = {}
    i = j = 0
    old, new = list(x.shape), list(out.shape)
    while i < len(old) or j < len(new):
        begin, first = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while prod(old[begin:i]) != prod(new[first:j]):
            if prod(old[begin:i]) < prod(new[first:j]):
                i += 1
            else:
                j += 1
        # Sides of 1 belong to either run.
        while i < len(old) and old[i] == 1 and (j >= len(new) or new[j] != 1):
            i += 1
        while j < len(new) and new[j] == 1 and (i >= len(old) or old[i] != 1):
            j += 1
        carried = {d: tracer.get(x)[d] for d in range(begin, i) if d in tracer.get(x)}
        carried = {d: ids for d, ids in carried.items() if old[d] > 1 or i - begin == 1}
        if carried:
            labels.update(_run(tracer, carried, begin, old[begin:i], first, new[first:j]))
    tracer.put(out, labels)


def _run(
    tracer: Any, carried: Labels, begin: int, old: list[int], first: int, new: list[int]
) -> Labels:
    if len(carried) > 1:
        raise LosesChannels("two dimensions of channels become one")
    ((dim, ids),) = carried.items()
    sides = [1] * len(old)
    sides[dim - begin] = len(ids)
    flat = np.broadcast_to(ids.reshape(sides), old).reshape(new)
    for j in range(len(new)):  # is it one of the new dimensions alone?
        line = np.moveaxis(flat, j, 0).reshape(new[j], -1)
        if (line == line[:, :1]).all() and new[j] > 1:
            return {first + j: line[:, 0]}
    wide = [j for j, side in enumerate(new) if side > 1]
    # Heads: [H d] -> [H, d] go as a whole; [3 H d] -> [3, H, d] holds query, key and value.
    j = wide[1] if len(wide) == 3 and new[wide[0]] in (2, 3) else wide[0]
    line = np.moveaxis(flat, j, 0).reshape(new[j], -1)
    for column in line.T[1:]:
        tracer.graph.merge(line[:, 0].copy(), column)
    return {first + j: line[:, 0]}


def unsqueeze(tracer: Any, out: Tensor, x: Tensor, dim: int) -> None:
    dim %= out.dim()
    tracer.put(out, {d + (d >= dim): ids for d, ids in tracer.get(x).items()})


def select(tracer: Any, out: Tensor, x: Tensor, dim: int, *_: Any, **__: Any) -> None:
    dim %= x.dim()
    if dim in tracer.get(x):
        raise LosesChannels("single channels are taken out")
    tracer.put(out, {d - (d > dim): ids for d, ids in tracer.get(x).items()})


def unbind(tracer: Any, out: Sequence[Tensor], x: Tensor, dim: int = 0) -> None:
    for part in out:
        select(tracer, part, x, dim)


def slice_(
    tracer: Any,
    out: Tensor,
    x: Tensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> None:
    dim %= x.dim()
    labels = dict(tracer.get(x))
    if dim in labels and out.shape[dim] != x.shape[dim]:
        raise LosesChannels("channels are cut by number")
    tracer.put(out, labels)


def cut(tracer: Any, out: Sequence[Tensor], x: Tensor, _: Any, dim: int = 0) -> None:
    dim %= x.dim()
    if dim in tracer.get(x):
        raise LosesChannels("channels are cut by number")
    for part in out:
        tracer.put(part, dict(tracer.get(x)))


def cat(tracer: Any, out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> None:
    dim %= out.dim()
    labels: Labels = {}
    for d in range(out.dim()):
        parts = [tracer.get(x).get(d) for x in tensors]
        known = [ids for ids in parts if ids is not None]
        if len(known) not in (0, len(parts)):
            for ids in known:
                tracer.graph.freeze(ids, "it is joined with a fixed tensor")
        elif known and d == dim:
            labels[d] = np.concatenate(known)
        elif known:
            for ids in known[1:]:
                tracer.graph.merge(known[0], ids)
            labels[d] = known[0]
    tracer.put(out, labels)


def reduce(
    tracer: Any, out: Tensor, x: Tensor, dims: Any = None, keepdim: bool = False, **_: Any
) -> None:
    if dims is None or dims == []:
        dims = range(x.dim())
    gone = {d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)}
    labels = tracer.get(x)
    if gone & labels.keys():
        raise LosesChannels("channels are summed or averaged")
    if keepdim:
        tracer.put(out, dict(labels))
    else:
        tracer.put(out, {d - sum(g < d for g in gone): ids for d, ids in labels.items()})


def pad(tracer: Any, out: Tensor, x: Tensor, sides: Sequence[int], *_: Any) -> None:
    """Pairs of sides, the last dimension's first."""
    padded = {x.dim() - 1 - at // 2 for at, count in enumerate(sides) if count}
    if padded & tracer.get(x).keys():
        raise LosesChannels("channels are padded")
    tracer.put(out, dict(tracer.get(x)))


def flip(tracer: Any, out: Tensor, x: Tensor, dims: Sequence[int]) -> None:
    if {dim % x.dim() for dim in dims} & tracer.get(x).keys():
        raise LosesChannels("channels are moved by number")
    tracer.put(out, dict(tracer.get(x)))


def roll(tracer: Any, out: Tensor, x: Tensor, _: Any, dims: Sequence[int] = ()) -> None:
    flip(tracer, out, x, dims or range(x.dim()))


def spatial(tracer: Any, out: Any, x: Tensor, *_: Any, **__: Any) -> None:
    """Pooling and resizing: all but the last dimensions pass."""
    outs = [out] if isinstance(out, Tensor) else list(out)
    labels = tracer.get(x)
    if any(ids.size != outs[0].shape[d] for d, ids in labels.items()):
        raise LosesChannels("channels are pooled")
    for part in outs:
        tracer.put(part, dict(labels))


def softmax(tracer: Any, out: Tensor, x: Tensor, dim: int, *_: Any, **__: Any) -> None:
    if dim % x.dim() in tracer.get(x):
        raise LosesChannels("softmax over the channels")
    tracer.put(out, dict(tracer.get(x)))


def bmm(tracer: Any, out: Tensor, a: Tensor, b: Tensor) -> None:
    x, y = tracer.get(a), tracer.get(b)
    if 2 in x or 1 in y:
        raise LosesChannels("channels are summed in a product of two tensors")
    if (0 in x) != (0 in y):
        raise LosesChannels("it is multiplied with a fixed tensor")
    labels: Labels = {}
    if 0 in x:
        tracer.graph.merge(x[0], y[0])
        labels[0] = x[0]
    if 1 in x:
        labels[1] = x[1]
    if 2 in y:
        labels[2] = y[2]
    tracer.put(out, labels)


def attend(tracer: Any, out: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> None:
    """Heads [B, H, L, d] pass; the scale of the logits needs d as it is."""
    labels = [tracer.get(x) for x in (q, k, v)]
    if any(set(own) != {1} for own in labels) or len({len(own[1]) for own in labels}) > 1:
        raise LosesChannels("attention of heads that don't go together")
    for own in labels[1:]:
        tracer.graph.merge(labels[0][1], own[1])
    tracer.put(out if isinstance(out, Tensor) else out[0], {1: labels[0][1]})


def _each(rule: Callable[..., None], names: str) -> dict[str, Callable[..., None]]:
    return dict.fromkeys(names.split(), rule)


# ATen's name and its rule; pointwise operations need no entry.
RULES: dict[str, Callable[..., None]] = dict(
    chain.from_iterable(
        table.items()
        for table in (
            _each(elementwise, "add add_ mul mul_ sub sub_ div div_ rsub where masked_fill_"),
            _each(same, "clone detach alias _to_copy contiguous lift_fresh gelu native_dropout"),
            _each(same, "hardswish hardswish_"),
            _each(permute, "permute"),
            _each(transpose, "transpose t"),
            _each(expand, "expand"),
            _each(view, "view _unsafe_view reshape _reshape_alias squeeze"),
            _each(unsqueeze, "unsqueeze"),
            _each(select, "select"),
            _each(unbind, "unbind"),
            _each(slice_, "slice"),
            _each(cut, "split split_with_sizes"),
            _each(cat, "cat"),
            _each(reduce, "mean sum amax amin std var"),
            _each(pad, "constant_pad_nd"),
            _each(flip, "flip"),
            _each(roll, "roll"),
            _each(spatial, "max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d"),
            _each(spatial, "adaptive_max_pool2d upsample_nearest2d upsample_bilinear2d"),
            _each(spatial, "max_pool3d_with_indices avg_pool3d _adaptive_avg_pool3d"),
            _each(spatial, "adaptive_max_pool3d upsample_nearest1d upsample_linear1d"),
            _each(spatial, "upsample_nearest3d upsample_trilinear3d upsample_bicubic2d"),
            _each(spatial, "_upsample_bilinear2d_aa _upsample_bicubic2d_aa"),
            _each(spatial, "reflection_pad1d reflection_pad2d reflection_pad3d"),
            _each(spatial, "replication_pad1d replication_pad2d replication_pad3d"),
            _each(softmax, "_softmax softmax"),
            _each(bmm, "bmm"),
            _each(attend, "_scaled_dot_product_flash_attention_for_cpu"),
            _each(attend, "_scaled_dot_product_flash_attention"),
            _each(attend, "_scaled_dot_product_efficient_attention"),
        )
    )
)
