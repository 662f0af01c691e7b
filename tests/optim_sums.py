"""Bodies of tests/test_optim_distributed.py: LAMB, Adafactor and Muon, which see whole tensors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as states
from optim_processes import (
    FULL,
    STEPS,
    SUMS,
    alone,
    assert_close,
    assert_same,
    has_bias,
    make,
    mesh,
    model,
    sharded,
    train,
    train_alone,
    whole,
)
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from trimtab import optim

# A shape and how it is cut; None: not a DTensor. Of (1, 13) and (1, 4, 3) the second process has nothing.
CUTS = (
    ((17, 5), Shard(0)), ((5, 18), Shard(1)), ((1, 13), Shard(0)), ((13, 4), Replicate()), ((6, 8), None),
    ((3, 4, 5), Shard(0)), ((1, 4, 3), Shard(0)), ((4, 3, 7), Shard(1)), ((2, 3, 9), Shard(2)),
    ((70, 2100), Shard(0)), ((7,), Shard(0)), ((9,), None),
)  # fmt: skip


def cut_like(value: torch.Tensor, cut: Any) -> torch.Tensor:
    value = value.clone()  # which distribute_tensor may keep
    return value if cut is None else distribute_tensor(value, mesh(), [cut])


def pairs(name: str) -> tuple[list, list, list]:
    """Parameters in pieces, the same whole, and how they are cut."""
    torch.manual_seed(0)
    cuts = [(shape, cut) for shape, cut in CUTS if len(shape) == 2 or name != "Muon"]
    whole_ones = [nn.Parameter(torch.randn(shape)) for shape, _ in cuts]
    pieces = [nn.Parameter(cut_like(p.detach(), cut)) for p, (_, cut) in zip(whole_ones, cuts)]
    return pieces, whole_ones, [cut for _, cut in cuts]


def pieces_on_gpus(name: str) -> None:
    """Each process has a GPU, one of the SIMT machine's."""
    import cuda_sim
    import optim_on_sim

    with optim_on_sim.as_gpu(cuda_sim.Simulator(seed=dist.get_rank())) as gpu:
        pieces_against_the_whole(name)
        assert gpu.sim.launches > 0


def pieces_against_the_whole(name: str) -> None:
    """Cut by rows, columns and batches, empty, and with all that a step folds in."""
    pieces, others, cuts = pairs(name)
    options = {**SUMS[name], "max_grad_norm": 100.0, "l1": 0.01, "zero_grads": True}
    ours, theirs = (getattr(optim, name)(params, **options) for params in (pieces, others))
    keep = torch.rand(17, 5) < 0.7
    ours.set_mask(pieces[0], cut_like(keep, cuts[0]))
    theirs.set_mask(others[0], keep)
    for step in range(4):
        for p, q, cut in zip(pieces, others, cuts):
            q.grad = torch.randn(q.shape) * keep if q is others[0] else torch.randn(q.shape)
            p.grad = cut_like(q.grad, cut)
        if step == 2:  # told to one process only: neither steps
            ours.found_inf = torch.tensor(float(dist.get_rank() == 1))
            ours.step()
            ours.found_inf = torch.zeros(())
            for p, q, cut in zip(pieces, others, cuts):
                p.grad = cut_like(q.grad, cut)
        ours.step()
        theirs.step()
    assert ours.skipped_steps == 1
    torch.testing.assert_close(ours.grad_norm, theirs.grad_norm, rtol=1e-6, atol=0)
    for p, q in zip(pieces, others):
        torch.testing.assert_close(whole(p), q.detach(), rtol=1e-5, atol=1e-6)
        assert ours.state[p].keys() == theirs.state[q].keys()
        for key, value in theirs.state[q].items():
            torch.testing.assert_close(whole(ours.state[p][key]), value, rtol=1e-5, atol=1e-7)
        assert not p.grad.to_local().any() if isinstance(p, DTensor) else not p.grad.any()


def ddp_and_fsdp(name: str) -> None:
    """And a state dict of two processes goes on in one, and of one in two."""
    want, _ = alone(name)
    net = model(has_bias(name))
    train(DistributedDataParallel(net), make(name, net))
    assert_same(net, want)  # every process has all of it
    net = sharded(has_bias(name))
    optimizer = make(name, net)
    train(net, optimizer, range(2))
    parts = copy.deepcopy(states.get_state_dict(net, optimizer, options=FULL))
    train(net, optimizer, range(2, STEPS))
    assert_close(net, want)
    if dist.get_rank() == 0:
        single = model(has_bias(name))
        one = make(name, single)
        load(single, one, parts)
        train_alone(single, one, range(2, STEPS))
        assert_close(single, want)
    single, one = alone(name, steps=2)
    parts = states.get_state_dict(single, one, options=FULL)
    net = sharded(has_bias(name))
    optimizer = make(name, net)
    load(net, optimizer, parts)
    train(net, optimizer, range(2, STEPS))
    assert_close(net, want)


def load(net: nn.Module, optimizer: Any, parts: Any) -> None:
    states.set_state_dict(
        net, optimizer, model_state_dict=parts[0], optim_state_dict=parts[1], options=FULL
    )


def refuses_pieces_to_be_summed() -> None:
    for name in SUMS:
        partial = DTensor.from_local(torch.ones(3, 4), mesh(), [Partial()])
        p = nn.Parameter(partial)
        p.grad = DTensor.from_local(torch.ones(3, 4), mesh(), [Partial()])
        with pytest.raises(RuntimeError, match="pieces are still to be summed"):
            getattr(optim, name)([p]).step()
