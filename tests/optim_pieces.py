"""Bodies of tests/test_optim_distributed.py: DDP, FSDP2, 8-bit states, what pieces agree on, bad input."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as states
from optim_cases import same_bits
from optim_processes import (
    FULL,
    RANKS,
    STEPS,
    alone,
    assert_close,
    assert_same,
    assert_same_states,
    make,
    mesh,
    model,
    sharded,
    train,
    whole,
)
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from trimtab import optim

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
