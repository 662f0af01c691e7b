"""Bodies of tests/test_optim_distributed.py: state dicts that are cut anew, and ZeRO."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as states
from optim_cases import same_bits
from optim_processes import (
    CASES,
    FULL,
    STEPS,
    alone,
    assert_same,
    assert_same_states,
    make,
    model,
    sharded,
    train,
    train_alone,
)
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from trimtab import optim

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
