"""Bodies of tests/test_optim_distributed.py: each runs in both of two processes that talk by gloo.

The reference, one process without any of it, sees both processes' batches and averages their
gradients: (a + b) / 2 has the same bits however it is reduced.
"""

from __future__ import annotations

import copy
import os
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as states
import torch.multiprocessing as multiprocessing
from optim_cases import same_bits
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

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
}
FULL = states.StateDictOptions(full_state_dict=True)


# --- the two processes


class Processes:
    """Two processes that run a function of this file at a time."""

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
            pipe.send((function.__name__, arguments))
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
        name, arguments = pipe.recv()
        try:
            globals()[name](*arguments)
            pipe.send(None)
        except BaseException:
            pipe.send(traceback.format_exc())


# --- models


def model() -> nn.Module:
    """Lengths that two processes cannot share evenly; of the last layer the second gets nothing."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 17), nn.Tanh(), nn.Linear(17, 13), nn.Tanh(), nn.Linear(13, 1)
    )


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


def sharded() -> nn.Module:
    net = model()
    for layer in net:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh())
    return fully_shard(net, mesh=mesh())


def make(name: str, net: nn.Module, **options: Any) -> Any:
    return getattr(optim, name)(net.parameters(), **{**CASES[name], **options})


def alone(name: str, steps: int = STEPS, **options: Any) -> tuple[nn.Module, Any]:
    net = model()
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


# --- DDP and FSDP2


def ddp(name: str) -> None:
    net = model()
    optimizer = make(name, net, max_grad_norm=0.3)  # every process has all gradients
    train(DistributedDataParallel(net), optimizer)
    want, reference = alone(name, max_grad_norm=0.3)
    assert_same(net, want)
    assert_same_states(net, optimizer, want, reference)


def fsdp(name: str) -> None:
    net = sharded()
    empty = [p.to_local().numel() == 0 for p in net.parameters()]
    assert any(empty) == (dist.get_rank() == 1)
    optimizer = make(name, net)
    train(net, optimizer)
    want, reference = alone(name)
    assert_same(net, want)
    assert_same_states(net, optimizer, want, reference)


def fsdp_against_torch() -> None:
    """torch's fused kernel on the same pieces: the same bits, tails included."""
    ours, theirs = sharded(), sharded()
    train(ours, optim.AdamW(ours.parameters(), lr=0.01))
    train(theirs, torch.optim.AdamW(theirs.parameters(), lr=0.01, fused=True))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert same_bits(p.to_local(), q.to_local())


def fsdp_in_bf16() -> None:
    """Pieces of bfloat16 with float32 states, as one process has them."""
    nets = [model().to(torch.bfloat16), model().to(torch.bfloat16)]
    net = fully_shard(nets[0], mesh=mesh())
    options = {"lr": 0.01, "torch_tails": False, "state_dtype": torch.float32}
    ours, theirs = (optim.AdamW(n.parameters(), **options) for n in nets)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(net.parameters(), nets[1].parameters(), strict=True):
            q.grad = torch.randn(q.shape, generator=generator).bfloat16()
            p.grad = distribute_tensor(q.grad, p.device_mesh, p.placements)
        ours.step()
        theirs.step()
    assert_same(net, nets[1])


# --- 8-bit states of pieces

CODED: dict[str, Any] = {"lr": 0.01, "torch_tails": False, "state_dtype": "int8"}


def coded(cut: bool, features: int) -> tuple[nn.Module, Any]:
    """A matrix [32, features] with 8-bit states, and a bias that is too small for them."""
    torch.manual_seed(0)
    net: nn.Module = nn.Linear(features, 32)
    net = fully_shard(net, mesh=mesh()) if cut else net
    return net, optim.AdamW(net.parameters(), min_8bit_numel=256, **CODED)


def coded_step(step: int, *pairs: tuple[nn.Module, Any]) -> None:
    generator = torch.Generator().manual_seed(step)
    for number in range(2):
        grad = None
        for net, _ in pairs:
            p = list(net.parameters())[number]
            grad = torch.randn(p.shape, generator=generator) if grad is None else grad
            cut = isinstance(p, DTensor)
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if cut else grad.clone()
    for _, optimizer in pairs:
        optimizer.step()


def loaded(cut: bool, net: nn.Module, saved: Any) -> tuple[nn.Module, Any]:
    """Another model with the weights of ``net``, which is whole, and its optimizer with the states of ``saved``."""
    other, optimizer = coded(cut, 256)
    states.set_optimizer_state_dict(other, optimizer, copy.deepcopy(saved), options=FULL)
    for p, q in zip(other.parameters(), net.parameters(), strict=True):
        full = q.detach()
        p.data.copy_(distribute_tensor(full, p.device_mesh, p.placements) if cut else full)
    return other, optimizer


def fsdp_8_bit() -> None:
    """Where no block spans processes: the bits of one process, and state dicts to it and back."""
    net, ours = coded(True, 256)
    want, theirs = coded(False, 256)
    for step in range(3):
        coded_step(step, (net, ours), (want, theirs))
    assert_same(net, want)
    assert ours.state[net.weight]["exp_avg_codes"].numel() == 16 * 256
    assert ours.state[net.bias]["exp_avg"].dtype == torch.float32
    of_pieces = states.get_optimizer_state_dict(net, ours, options=FULL)
    of_one = states.get_optimizer_state_dict(want, theirs, options=FULL)
    others = [loaded(True, want, of_one)]
    if dist.get_rank() == 0:  # who alone has the whole
        others += [loaded(False, want, of_pieces)]
    coded_step(3, (net, ours), (want, theirs), *others)
    for other, _ in ((net, ours), *others):
        assert_same(other, want)


def fsdp_8_bit_goes_on() -> None:
    """Pieces that end within a block: state_dict() and load_state_dict() lose nothing."""
    net, ours = coded(True, 77)
    for step in range(3):
        coded_step(step, (net, ours))
    saved = copy.deepcopy(ours.state_dict())
    assert isinstance(saved["state"][0]["exp_avg"], DTensor)
    assert saved["state"][0]["exp_avg"].shape == net.weight.shape
    other, again = coded(True, 77)
    for p, q in zip(other.parameters(), net.parameters(), strict=True):
        p.data.copy_(q.data)
    again.load_state_dict(saved)
    for step in range(3, 5):
        coded_step(step, (net, ours), (other, again))
    for p, q in zip(other.parameters(), net.parameters(), strict=True):
        assert same_bits(p.to_local(), q.to_local())


# --- what the pieces must agree on


def clipping() -> None:
    for norm in (0.1, 1e6):
        net = sharded()
        optimizer = make("AdamW", net, max_grad_norm=norm)
        train(net, optimizer)
        want, reference = alone("AdamW", max_grad_norm=norm)
        torch.testing.assert_close(optimizer.grad_norm, reference.grad_norm, rtol=1e-6, atol=0)
        assert agreed(optimizer.grad_norm)
        (assert_close if norm < 1 else assert_same)(net, want)
        theirs = sharded()
        clipped = torch.optim.AdamW(theirs.parameters(), lr=0.01, amsgrad=True)

        def clip(theirs: nn.Module = theirs, norm: float = norm) -> None:
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), norm)

        train(theirs, clipped, before_step=clip)
        assert_close(net, want)


def agreed(value: torch.Tensor) -> bool:
    values = [torch.empty_like(value) for _ in range(RANKS)]
    dist.all_gather(values, value)
    return all(same_bits(v, value) for v in values)


def clipping_of_mixed_cuts() -> None:
    """Cut by rows, by columns, held by all, and not a DTensor: each element counts once."""
    cuts = ([Shard(0)], [Shard(1)], [Replicate()], None)
    torch.manual_seed(0)
    plain = [nn.Parameter(torch.randn(5, 3)) for _ in cuts]
    params = []
    for p, cut in zip(plain, cuts):
        p.grad = torch.randn(5, 3)
        if cut is None:
            params.append(copy.deepcopy(p))
            params[-1].grad = p.grad.clone()
        else:
            params.append(nn.Parameter(distribute_tensor(p.detach(), mesh(), cut)))
            params[-1].grad = distribute_tensor(p.grad, mesh(), cut)
    options = {"lr": 0.1, "max_grad_norm": 0.5, "torch_tails": False}
    ours, theirs = optim.AdamW(params, **options), optim.AdamW(plain, **options)
    ours.step()
    theirs.step()
    torch.testing.assert_close(ours.grad_norm, theirs.grad_norm, rtol=1e-6, atol=0)
    for p, q in zip(params, plain):
        torch.testing.assert_close(whole(p), q.detach(), rtol=1e-5, atol=1e-7)


def skipping() -> None:
    """A NaN in one process's piece, or its found_inf, keeps the other from stepping too."""
    net = sharded()
    before = [whole(p).clone() for p in net.parameters()]
    optimizer = make("AdamW", net, skip_nonfinite=True)

    def spoil() -> None:
        if dist.get_rank() == 0:
            net[4].bias.grad.to_local().fill_(float("nan"))

    train(net, optimizer, [0], spoil)
    assert optimizer.skipped_steps == 1
    optimizer.found_inf = torch.tensor(float(dist.get_rank() == 1))
    train(net, optimizer, [0])
    assert optimizer.skipped_steps == 2
    for p, q in zip(net.parameters(), before):
        assert same_bits(whole(p), q)
    optimizer.found_inf = torch.zeros(())
    train(net, optimizer)
    assert optimizer.skipped_steps == 2
    assert_same(net, alone("AdamW")[0])


# --- state dicts


def state_dict_of_the_whole(name: str) -> None:
    """From two processes to one, and from one to two: the continuation is that of one alone."""
    half, rest = range(2), range(2, STEPS)
    want, _ = alone(name)

    net = sharded()
    optimizer = make(name, net)
    train(net, optimizer, half)
    parts = states.get_state_dict(net, optimizer, options=FULL)
    if dist.get_rank() == 0:
        single = model()
        one = make(name, single)
        states.set_state_dict(
            single, one, model_state_dict=parts[0], optim_state_dict=parts[1], options=FULL
        )
        train_alone(single, one, rest)
        assert_same(single, want)

    single, one = alone(name, steps=2)
    parts = states.get_state_dict(single, one, options=FULL)
    net = sharded()
    optimizer = make(name, net)
    states.set_state_dict(
        net, optimizer, model_state_dict=parts[0], optim_state_dict=parts[1], options=FULL
    )
    train(net, optimizer, rest)
    assert_same(net, want)


def state_dict_of_pieces() -> None:
    """state_dict() and load_state_dict(), ours and torch's, in each process by itself."""
    want = sharded()
    fused = {"lr": 0.01, "fused": True}
    train(want, torch.optim.AdamW(want.parameters(), **fused))
    for first, second in ((optim, torch.optim), (torch.optim, optim), (optim, optim)):
        net = sharded()
        optimizer = first.AdamW(net.parameters(), **fused)
        train(net, optimizer, range(2))
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer = second.AdamW(net.parameters(), **fused)
        optimizer.load_state_dict(saved)
        train(net, optimizer, range(2, STEPS))
        for p, q in zip(net.parameters(), want.parameters(), strict=True):
            assert same_bits(p.to_local(), q.to_local())


# --- ZeRO


def zero(name: str) -> None:
    """Whole parameters, each stepped by one process; its state dict goes on in one process alone."""
    net = model()
    optimizer = ZeroRedundancyOptimizer(
        net.parameters(), optimizer_class=getattr(optim, name), **CASES[name]
    )
    parallel = DistributedDataParallel(net)
    train(parallel, optimizer)
    want, reference = alone(name)
    assert_same(net, want)
    optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        one = make(name, net)
        one.load_state_dict(optimizer.state_dict())
        more = range(STEPS, STEPS + 2)
        train_alone(net, one, more)
        train_alone(want, reference, more)
        assert_same(net, want)
        assert_same_states(net, one, want, reference)


def zero_loads() -> None:
    """A state dict of one process alone, into ZeRO."""
    single, one = alone("AdamW", steps=2)
    net = copy.deepcopy(single)
    optimizer = ZeroRedundancyOptimizer(
        net.parameters(), optimizer_class=optim.AdamW, **CASES["AdamW"]
    )
    optimizer.load_state_dict(copy.deepcopy(one.state_dict()))
    train(DistributedDataParallel(net), optimizer, range(2, STEPS))
    assert_same(net, alone("AdamW")[0])


def zero_refuses_what_needs_all() -> None:
    for option in ({"max_grad_norm": 1.0}, {"skip_nonfinite": True}):
        with pytest.raises(ValueError, match=r"ZeroRedundancyOptimizer.*clip_grad_norm_"):
            ZeroRedundancyOptimizer(model().parameters(), optimizer_class=optim.AdamW, **option)
    optim.AdamW(model().parameters(), max_grad_norm=1.0)  # beside it, as ever


# --- bad input


def refusals() -> None:
    net = sharded()
    weight = net[0].weight
    optimizer = make("AdamW", net)
    train(net, optimizer, [0])
    before = [p.to_local().clone() for p in net.parameters()]

    def refused(match: str, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=match):
            optimizer.step()
        for p, q in zip(net.parameters(), before):
            assert same_bits(p.to_local(), q)

    optimizer.set_mask(weight, torch.ones(weight.shape))
    refused("set_mask: expected a DTensor, like its parameter, got a plain tensor")
    optimizer.set_mask(weight, None)

    state = optimizer.state[weight]
    pieces = state["exp_avg"]
    state["exp_avg"] = pieces.full_tensor()
    refused("exp_avg: expected a DTensor, .* got a plain tensor; .*set_optimizer_state_dict")
    state["exp_avg"] = pieces

    grad = weight.grad
    weight.grad = grad.redistribute(placements=[Replicate()])
    refused(r"gradient of parameter 0 .*: expected it cut as")
    weight.grad = grad

    partial = DTensor.from_local(torch.ones(3), mesh(), [Partial()])
    optimizer = optim.AdamW([nn.Parameter(partial)])
    partial_param = optimizer.param_groups[0]["params"][0]
    partial_param.grad = DTensor.from_local(torch.ones(3), mesh(), [Partial()])
    refused("pieces are still to be summed", RuntimeError)


os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
