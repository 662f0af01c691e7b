"""The update rules: torch's bits, or its values within 2 ulp a step; the same on every instruction set."""

from __future__ import annotations

import cases
import optim_cases
import pytest
import torch
from optim_cases import OPTIONS, ident

from trimtab import ops, optim

EXACT = [(name, o) for name in ("Adam", "AdamW", "Adagrad") for o in OPTIONS[name]]
CLOSE = [(name, o) for name in ("RMSprop", "NAdam", "RAdam", "Adamax") for o in OPTIONS[name]]
ALL = [(name, o) for name in OPTIONS for o in OPTIONS[name]]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def without_capturable(options):
    return {key: value for key, value in options.items() if key != "capturable"}


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize(("name", "options"), EXACT, ids=ident)
def test_fused_bits(name: str, options: dict, dtype: torch.dtype) -> None:
    """0 differing bits in parameters and states after 200 steps of torch's fused kernel."""
    params = optim_cases.parameters(dtype=dtype)
    twins = optim_cases.clones(params)
    ours = getattr(optim, name)(params, **options)
    theirs = getattr(torch.optim, name)(twins, **without_capturable(options), fused=True)
    for step in range(200):
        optim_cases.set_gradients(step, params, twins)
        ours.step()
        theirs.step()
    optim_cases.assert_same(ours, theirs)


@pytest.mark.parametrize("peer", ["foreach", "fused"])
@pytest.mark.parametrize("options", OPTIONS["SGD"], ids=ident)
def test_sgd_bits(options: dict, peer: str) -> None:
    """foreach at every length; fused on whole vectors, as its tail is rounded otherwise."""
    params = optim_cases.parameters(optim_cases.SIZES if peer == "foreach" else (64, 1024, 4096))
    twins = optim_cases.clones(params)
    ours = optim.SGD(params, **options)
    theirs = torch.optim.SGD(twins, **options, **{peer: True})
    for step in range(200):
        optim_cases.set_gradients(step, params, twins)
        ours.step()
        theirs.step()
    optim_cases.assert_same(ours, theirs)


@pytest.mark.parametrize(("name", "options"), CLOSE, ids=ident)
def test_foreach_ulps(name: str, options: dict) -> None:
    """Each step from torch's state. torch.sqrt is not rounded correctly on the CPU, so not to the bit.

    In units of the last place of the largest of the parameter before, after, and the largest
    update, 10 lr / (1 - momentum): a sum that cancels shows an error of its operands.
    """
    params = optim_cases.parameters()
    twins = optim_cases.clones(params)
    ours = getattr(optim, name)(params, **options)
    theirs = getattr(torch.optim, name)(twins, **without_capturable(options), foreach=True)
    largest = 10 * ours.param_groups[0]["lr"] / (1 - options.get("momentum", 0))
    for step in range(30):
        optim_cases.set_gradients(step, params, twins)
        before = [p.detach().clone() for p in params]
        ours.step()
        theirs.step()
        for p, q, old in zip(params, twins, before):
            new = q.detach()
            scale = torch.maximum(old.abs(), new.abs()).clamp(min=largest)
            ulp = torch.nextafter(scale, torch.tensor(torch.inf)) - scale
            assert bool(((p - q).abs() <= 2 * ulp).all())
            for key, value in theirs.state[q].items():
                if key != "momentum_buffer":
                    assert optim_cases.ulps(ours.state[p][key], value) <= 2, key
                else:
                    torch.testing.assert_close(ours.state[p][key], value, rtol=1e-6, atol=2e-6)
        with torch.no_grad():
            for p, q in zip(params, twins):
                p.copy_(q)
                for key, value in theirs.state[q].items():
                    ours.state[p][key].copy_(value)


def test_lion() -> None:
    """Against the paper's formula in float64."""
    (p,) = optim_cases.parameters((1001,))
    want, m = p.detach().double(), torch.zeros(1001, dtype=torch.float64)
    ours = optim.Lion([p], lr=0.01, betas=(0.9, 0.98), weight_decay=0.1)
    for step in range(20):
        optim_cases.set_gradients(step, [p])
        p.grad[5] = 0.0
        g = p.grad.double()
        want = want * (1 - 0.01 * 0.1) - 0.01 * torch.sign(0.9 * m + 0.1 * g)
        m = 0.98 * m + 0.02 * g
        ours.step()
    torch.testing.assert_close(p.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.state[p]["exp_avg"].double(), m, rtol=1e-5, atol=1e-6)


def run(name: str, options: dict, dtype: torch.dtype, sizes=optim_cases.SIZES, **extra):
    params = optim_cases.parameters(sizes, dtype)
    optimizer = getattr(optim, name)(params, **options, **extra)
    for step in range(4):
        optim_cases.set_gradients(step, params)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize(("name", "options"), ALL, ids=ident)
def test_instruction_sets_agree(name: str, options: dict, dtype: torch.dtype) -> None:
    extra = {"max_grad_norm": 1.0, "ema_decay": 0.9, "l1": 0.01}
    try:
        ops.set_isa("scalar")
        want = run(name, options, dtype, **extra)
        for isa in ops.available_isas()[1:]:
            ops.set_isa(isa)
            optim_cases.assert_same(run(name, options, dtype, **extra), want)
    finally:
        ops.set_isa(None)


@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8"}], ids=ident)
@pytest.mark.parametrize("name", ["AdamW", "NAdam", "RMSprop"])
def test_gradients_of_any_size(name: str, options: dict) -> None:
    """Squares that are 0 or Inf: vectors divide as scalars, and AdamW as torch, which leaves the parameter."""
    exponents = torch.linspace(-45.0, 38.0, 4096, dtype=torch.float64)
    grad = (10.0**exponents).float() * torch.tensor([1.0, -1.0]).repeat(2048)
    found = []
    try:
        for isa in (*ops.available_isas(), "torch"):
            ops.set_isa(None if isa == "torch" else isa)
            if isa == "torch" and (name != "AdamW" or options):
                continue
            (p,) = optim_cases.parameters((4096,))
            ours = getattr(torch.optim if isa == "torch" else optim, name)
            optimizer = ours([p], **(options or ({"fused": True} if isa == "torch" else {})))
            for _ in range(1 if options else 3):
                p.grad = grad.clone()
                optimizer.step()
            found.append([p.detach(), *optimizer.state[p].values()])
    finally:
        ops.set_isa(None)
    assert torch.isfinite(found[0][0]).all()
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_do_not_matter(count: int) -> None:
    sizes = (1, 70001, 5, 200000, 0, 3)
    want = run("AdamW", {}, torch.float32, sizes, max_grad_norm=1.0)
    with cases.threads(count):
        optim_cases.assert_same(run("AdamW", {}, torch.float32, sizes, max_grad_norm=1.0), want)


@pytest.mark.parametrize(("name", "options"), ALL, ids=ident)
def test_split_gives_the_bits_of_the_whole(name: str, options: dict) -> None:
    whole = optim_cases.parameters((1021,))
    parts = [torch.nn.Parameter(x.clone()) for x in whole[0].detach().split([1, 500, 17, 503])]
    one = getattr(optim, name)(whole, **options, torch_tails=False)
    many = getattr(optim, name)(parts, **options, torch_tails=False)
    for step in range(10):
        optim_cases.set_gradients(step, whole)
        for p, g in zip(parts, whole[0].grad.split([1, 500, 17, 503])):
            p.grad = g.clone()
        one.step()
        many.step()
    assert optim_cases.same_bits(torch.cat([p.detach() for p in parts]), whole[0].detach())


@pytest.mark.parametrize("name", ["Adam", "SGD", "Adagrad", "RMSprop"])
def test_zero_grad_and_no_grad(name: str) -> None:
    """A missing gradient skips parameter and step count; a zero one decays and counts, as in torch."""
    params = optim_cases.parameters()
    twins = optim_cases.clones(params)
    ours = getattr(optim, name)(params, lr=0.1, weight_decay=0.1)
    theirs = getattr(torch.optim, name)(twins, lr=0.1, weight_decay=0.1, foreach=True)
    for step in range(6):
        optim_cases.set_gradients(step, params, twins, scale=float(step % 2))
        for i in (step % 3, 4):
            params[i].grad = twins[i].grad = None
        ours.step()
        theirs.step()
    for p, q in zip(params, twins):
        torch.testing.assert_close(p, q)
        if "step" in theirs.state[q]:
            assert ours.state[p]["step"] == theirs.state[q]["step"]
    assert params[4] not in ours.state or not ours.state[params[4]].get("step", 0)
