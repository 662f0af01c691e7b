"""Two processes that talk by gloo, and what they train: for tests/test_optim_distributed.py.

The reference, one process without any of it, sees both processes' batches and averages their
gradients: (a + b) / 2 has the same bits however it is reduced.
"""

from __future__ import annotations

import importlib
import os
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as states
import torch.multiprocessing as multiprocessing
from optim_cases import same_bits
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from trimtab import optim

RANKS = 2
STEPS = 4
# Class and options with which pieces round as the whole does.
CASES: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9},
    "AdamW": {"lr": 0.01, "amsgrad": True, "torch_tails": False},
    "Adagrad": {"lr": 0.05, "torch_tails": False},
    "RMSprop": {"lr": 0.01, "centered": True},
    "NAdam": {"lr": 0.01},
    "Lion": {"lr": 0.001, "ema_decay": 0.9, "l1": 0.01},
    "Adam": {"lr": 0.01, "weight_decay": 0.1, "torch_tails": False},
    "RAdam": {"lr": 0.01},
    "Adamax": {"lr": 0.01},
}
# Those that step by sums over whole tensors, rows or columns, which pieces add up in another order.
SUMS: dict[str, dict[str, Any]] = {
    "LAMB": {"lr": 0.01},
    "Adafactor": {"lr": 0.01, "weight_decay": 0.1, "ema_decay": 0.9},
    "Muon": {"lr": 0.01},
}
FULL = states.StateDictOptions(full_state_dict=True)


# --- the two processes


class Processes:
    """Two processes that run a function of a module of tests at a time."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        self.failed = False
        for rank in range(RANKS):
            pipe, end = context.Pipe()
            arguments = (rank, f"file://{folder / 'meeting'}", end)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self.pipes.append(pipe)
            self.processes.append(process)

    def run(self, function: Callable[..., None], *arguments: Any) -> None:
        """AssertionError with the trace of each process in which it raised."""
        for pipe in self.pipes:
            pipe.send((function.__module__, function.__name__, arguments))
        failed = [pipe.recv() if pipe.poll(120) else "no answer" for pipe in self.pipes]
        self.failed = any(failed)
        assert not self.failed, "\n".join(f"process {i}: {f}" for i, f in enumerate(failed) if f)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(rank: int, meeting: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    # Where one has failed the other waits in vain; not for long.
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=RANKS, timeout=timedelta(seconds=15)
    )
    while True:
        module, name, arguments = pipe.recv()
        try:
            getattr(importlib.import_module(module), name)(*arguments)
            pipe.send(None)
        except BaseException:
            pipe.send(traceback.format_exc())


# --- models


def model(bias: bool = True) -> nn.Module:
    """Lengths that two processes cannot share evenly; of the last layer the second gets nothing."""
    torch.manual_seed(0)
    layers = [nn.Linear(*sizes, bias=bias) for sizes in ((5, 17), (17, 13), (13, 1))]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def backward(net: nn.Module, step: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(RANKS * step + rank)
    x, y = torch.randn(8, 5, generator=generator), torch.randn(8, 1, generator=generator)
    nn.functional.mse_loss(net(x), y).backward()


def train(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Sequence[int] = range(STEPS),
    before_step: Callable[[], object] = lambda: None,
) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(net, step, dist.get_rank())
        before_step()
        optimizer.step()


def train_alone(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Sequence[int] = range(STEPS),
    before_step: Callable[[], object] = lambda: None,
) -> None:
    """What the processes do together, in one."""
    params = list(net.parameters())
    for step in steps:
        found = []
        for rank in range(RANKS):
            optimizer.zero_grad()
            backward(net, step, rank)
            found.append([p.grad.clone() for p in params])
        for p, *grads in zip(params, *found):
            p.grad = sum(grads) / RANKS
        before_step()
        optimizer.step()


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (RANKS,))


def sharded(bias: bool = True) -> nn.Module:
    net = model(bias)
    for layer in net:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh())
    return fully_shard(net, mesh=mesh())


def make(name: str, net: nn.Module, **options: Any) -> Any:
    return getattr(optim, name)(net.parameters(), **{**{**CASES, **SUMS}[name], **options})


def has_bias(name: str) -> bool:
    return name != "Muon"  # which takes matrices only


def alone(name: str, steps: int = STEPS, **options: Any) -> tuple[nn.Module, Any]:
    net = model(has_bias(name))
    optimizer = make(name, net, **options)
    train_alone(net, optimizer, range(steps))
    return net, optimizer


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same(net: nn.Module, want: nn.Module) -> None:
    for (name, p), q in zip(net.named_parameters(), want.parameters(), strict=True):
        differ = int((whole(p) != q).sum())
        assert same_bits(whole(p), q), f"{name}: {differ} of {q.numel()} differ"


def assert_close(net: nn.Module, want: nn.Module) -> None:
    for p, q in zip(net.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(whole(p), q.detach(), rtol=1e-5, atol=1e-7)


def assert_same_states(net: nn.Module, ours: Any, want: nn.Module, theirs: Any) -> None:
    for (name, p), q in zip(net.named_parameters(), want.parameters(), strict=True):
        assert ours.state[p].keys() == theirs.state[q].keys()
        for key, value in theirs.state[q].items():
            assert same_bits(whole(ours.state[p][key]), value), f"{key} of {name}"


os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
