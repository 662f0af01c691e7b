"""Parameters cut over processes: DTensors, as FSDP2 and tensor parallelism make them.

Each process steps the piece it holds; the states are DTensors cut alike, so that checkpoints reshard.
Only what concerns all pieces, the norm of the gradients and whether they are finite, is agreed on
between the processes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def dtensor_class() -> Any:
    """torch's DTensor; None while nobody has imported it, and then there are none."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def is_sharded(tensor: Tensor) -> bool:
    kind = dtensor_class()
    return kind is not None and isinstance(tensor, kind)


def any_sharded(param_groups: Iterable[dict[str, Any]]) -> bool:
    kind = dtensor_class()
    return kind is not None and any(
        isinstance(param, kind) for group in param_groups for param in group["params"]
    )


def local(tensor: Any) -> Any:
    """The piece that this process holds; any other tensor is its own."""
    return tensor._local_tensor if is_sharded(tensor) else tensor


def piece(value: Tensor, param: Tensor, what: str, summed: int | None = None) -> Tensor:
    """The piece of ``value``, which must be cut like its parameter.

    ``summed``: a dimension of the parameter that it has not; processes that share that have all of it.
    """
    if is_sharded(value) != is_sharded(param):
        kinds = ["a plain tensor", "a DTensor"]
        raise ValueError(
            f"{what}: expected {kinds[is_sharded(param)]}, like its parameter, got "
            f"{kinds[is_sharded(value)]}; torch.distributed.tensor.distribute_tensor cuts one, "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict a whole state dict"
        )
    if is_sharded(value) and _cut(value) != _cut(param, summed):
        raise ValueError(f"{what}: expected it cut as {_cut(param, summed)}, got {_cut(value)}")
    return local(value)


def like(value: Tensor, param: Tensor, summed: int | None = None) -> Tensor:
    """``value``, a piece, as a tensor cut like ``param``; ``summed`` as in :func:`piece`."""
    kind = dtensor_class()
    if kind is None or not isinstance(param, kind):
        return value
    mesh, placements = _cut(param, summed)
    shape, stride = param.shape, param.stride()
    # A stride of the whole only says in which order its dimensions lie.
    if summed is not None:
        whole = without(torch.empty(shape, device="meta"), summed)
        shape, stride = whole.shape, whole.stride()
    return kind.from_local(value, mesh, placements, run_check=False, shape=shape, stride=stride)


def without(tensor: Tensor, dim: int) -> Tensor:
    """An empty tensor of its shape but for that dimension, which is 1."""
    shape = list(tensor.shape)
    shape[dim] = 1
    return tensor.new_empty(shape)


def whole(value: Tensor, param: Tensor) -> Tensor:
    """The whole of ``value``, of which every process has a piece cut like ``param``."""
    return like(value, param).full_tensor() if is_sharded(param) else value  # type: ignore[attr-defined]


def cut(value: Tensor, param: Tensor) -> Tensor:
    """A whole tensor, which every process has, cut like ``param``."""
    if is_sharded(value):
        return value
    mesh, placements = _cut(param)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def _cut(tensor: Any, summed: int | None = None) -> tuple[Any, Any]:
    mesh, placements = tensor.device_mesh, tensor.placements
    if summed is None:
        return mesh, placements
    from torch.distributed.tensor import Replicate

    gone = summed % tensor.dim()
    return mesh, tuple(Replicate() if p.is_shard(gone) else p for p in placements)


def _groups(tensor: Tensor, dim: int | None = None) -> tuple[Any, ...]:
    """The process groups that hold different pieces of it, one a dimension of its mesh.

    ``dim``: those between which that dimension of the tensor is cut.
    """
    if not is_sharded(tensor):
        return ()
    mesh, placements = _cut(tensor)
    cuts = [not p.is_replicate() if dim is None else p.is_shard(dim) for p in placements]
    return tuple(mesh.get_group(i) for i, cuts_it in enumerate(cuts) if cuts_it)


def add_up(parts: Iterable[tuple[Tensor, Tensor, int | None]]) -> None:
    """Sums over pieces, in place: numbers, their parameter, the dimension summed over or None for all.

    Numbers that the same processes share travel together.
    """
    alike: dict[tuple[Any, ...], list[Tensor]] = {}
    for numbers, param, dim in parts:
        if numbers.numel() and (
            groups := _groups(param, None if dim is None else dim % param.dim())
        ):
            alike.setdefault(groups, []).append(numbers)
    for groups, several in alike.items():
        flat = torch.cat(several)
        for group in groups:
            torch.distributed.all_reduce(flat, group=group)
        for numbers, total in zip(several, flat.split([n.numel() for n in several])):
            numbers.copy_(total)


def total_norm(grads: Iterable[tuple[Tensor, Tensor]]) -> float:
    """2-norm of all gradients, (this process's piece, parameter) each; every process gets the same."""
    sums: dict[tuple[Any, ...], Tensor] = {}  # on the device of their pieces, as NCCL wants them
    for grad, param in grads:
        groups = _groups(param)
        square = torch.linalg.vector_norm(grad, dtype=torch.float64) ** 2
        sums[groups] = sums[groups] + square.to(sums[groups].device) if groups in sums else square
    total = 0.0
    for groups, shared in sums.items():
        for group in groups:
            torch.distributed.all_reduce(shared, group=group)
        total += float(shared)
    return math.sqrt(total)


def anywhere(found: Any, params: Sequence[Tensor]) -> Tensor:
    """GradScaler's found_inf, which each process has of its own pieces: 1 if one of them saw one."""
    place = local(params[0]).device
    worst = torch.as_tensor(local(found), dtype=torch.float32, device=place).reshape(()).clone()
    for group in dict.fromkeys(group for param in params for group in _groups(param)):
        torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX, group=group)
    return worst


def refuse_partition(name: str, options: Sequence[str]) -> None:
    """Raises if ZeroRedundancyOptimizer is making this optimizer and one of the options is on.

    It gives each process whole parameters, but not all of them, and nothing tells the optimizer so:
    a norm or a skip of its own would differ from process to process.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = sys._getframe() if module is not None and options else None
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), module.ZeroRedundancyOptimizer):  # type: ignore[union-attr]
            raise ValueError(
                f"{name}: {' and '.join(options)} would look at this process's share of the "
                "parameters only under ZeroRedundancyOptimizer; every process has all gradients, so "
                "call torch.nn.utils.clip_grad_norm_(model.parameters(), ...) before step()"
            )
        frame = frame.f_back
