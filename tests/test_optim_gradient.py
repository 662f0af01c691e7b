"""Gradients on their way: stepped inside backward, accumulated in place, scaled by autocast's scaler, clipped."""

from __future__ import annotations

import copy

import optim_cases
import pytest
import torch
from optim_cases import ident
from torch import nn

from trimtab import optim

DTYPES = (torch.float32, torch.bfloat16)
RULES = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "AdamW": {"lr": 0.01},
    "Adagrad": {"lr": 0.1},
    "NAdam": {"lr": 0.01},
    "Lion": {"lr": 0.01},
    "LAMB": {"lr": 0.01},
    "Adafactor": {"lr": 0.01},
}


def network(dtype: torch.dtype = torch.float32, layers: int = 12) -> nn.Sequential:
    torch.manual_seed(0)
    modules = [m for _ in range(layers) for m in (nn.Linear(24, 24), nn.Tanh())]
    return nn.Sequential(*modules, nn.Linear(24, 3)).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(8, 24, generator=torch.Generator().manual_seed(step)).to(dtype)


def backward(model: nn.Module, step: int, dtype: torch.dtype = torch.float32) -> None:
    model(batch(step, dtype)).float().square().mean().backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("name", RULES)
def test_release_gives_the_bits_of_the_ordinary_step(name: str, dtype: torch.dtype) -> None:
    model = network(dtype)
    twin = copy.deepcopy(model)
    clipped = {"max_grad_norm": 0.1, "norm_estimate": 0.3}
    ours = getattr(optim, name)(model.parameters(), **RULES[name], **clipped)
    plain = getattr(optim, name)(twin.parameters(), **RULES[name], **clipped)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.8) for o in (ours, plain)]
    with optim.release_gradients(ours):
        for step in range(5):
            for m, o, schedule in zip((model, twin), (ours, plain), schedules):
                backward(m, step, dtype)
                o.step()
                o.zero_grad()
                schedule.step()
    for p, q in zip(model.parameters(), twin.parameters()):
        assert optim_cases.same_bits(p, q)
        assert list(ours.state[p]) == list(plain.state[q])
        for key, value in plain.state[q].items():
            assert torch.equal(ours.state[p][key], value), key
    for m, o in ((model, ours), (twin, plain)):  # without the hooks, as before
        backward(m, 9, dtype)
        assert all(p.grad is not None for p in m.parameters())
        o.step()
    assert all(map(optim_cases.same_bits, model.parameters(), twin.parameters()))


def test_release_keeps_few_gradients_alive() -> None:
    """At no hook more than a layer's gradients exist; ordinarily all 26 do at the end."""
    model = network()
    params = list(model.parameters())
    alive: list[int] = []

    def count(_: torch.Tensor) -> None:
        alive.append(sum(p.grad is not None for p in params))

    for p in params:
        p.register_post_accumulate_grad_hook(count)
    ours = optim.AdamW(params)
    backward(model, 0)
    assert max(alive) == len(params)
    ours.zero_grad()
    alive.clear()
    with optim.release_gradients(ours):
        backward(model, 0)
    assert len(alive) == len(params) and max(alive) <= 2
    assert all(p.grad is None for p in params)


def test_release_measures_the_norm_for_the_next_step() -> None:
    model = network()
    twin = copy.deepcopy(model)
    ours = optim.SGD(model.parameters(), lr=0.1, max_grad_norm=0.01, norm_estimate=1.0)
    with optim.release_gradients(ours) as released:
        backward(model, 0)
        backward(twin, 0)
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 1e9)
        torch.testing.assert_close(released.grad_norm, norm)
        ours.norm_estimate = released.grad_norm
        ours.step()
        assert released.grad_norm == 0
        torch.testing.assert_close(ours.norm_estimate, norm)


def test_release_follows_groups_and_state_dicts() -> None:
    model = network()
    twin = copy.deepcopy(model)

    def make(m: nn.Module) -> optim.AdamW:
        first, *rest = m.parameters()
        return optim.AdamW([{"params": [first], "lr": 0.1}, {"params": rest, "betas": (0.8, 0.9)}])

    ours, plain = make(model), make(twin)
    saved = [copy.deepcopy(o.state_dict()) for o in (ours, plain)]
    optim.release_gradients(ours)
    for step in range(6):
        for m, o, state in zip((model, twin), (ours, plain), saved):
            if step == 3:
                o.load_state_dict(copy.deepcopy(state))
            o.param_groups[1]["lr"] = 0.01 * (step + 1)
            backward(m, step)
            o.step()
            o.zero_grad()
    optim_cases.assert_same(ours, plain)


def test_release_refuses_what_needs_all_gradients() -> None:
    def refused(match: str, **options) -> None:
        with pytest.raises(RuntimeError, match=match):
            optim.release_gradients(optim.AdamW(network().parameters(), **options))

    refused("max_grad_norm needs the norm of all gradients.*norm_estimate", max_grad_norm=1.0)
    refused("skip_nonfinite leaves out whole steps", skip_nonfinite=True)
    refused("main_grads accumulates", main_grads=True)
    with pytest.raises(TypeError, match="an optimizer of trimtab.optim, got AdamW"):
        optim.release_gradients(torch.optim.AdamW(network().parameters()))
    model = network()
    backward(model, 0)
    ours = optim.AdamW(model.parameters())
    with pytest.raises(RuntimeError, match="parameter 0 already holds a gradient"):
        optim.release_gradients(ours)
    ours.zero_grad()
    with optim.release_gradients(ours):
        ours.max_grad_norm = 1.0
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(RuntimeError, match="max_grad_norm needs"):
            backward(model, 0)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_release_refuses_accumulation() -> None:
    model = network()
    ours = optim.AdamW(model.parameters())
    with optim.release_gradients(ours):
        backward(model, 0)
        with pytest.raises(RuntimeError, match="gradients can't accumulate over several backwards"):
            backward(model, 1)
        ours.zero_grad()
        ours.step()
        backward(model, 2)


# --- accumulation


@pytest.mark.parametrize("into", (*DTYPES, torch.float16), ids=ident)
@pytest.mark.parametrize("grad", (*DTYPES, torch.float16), ids=ident)
def test_accumulate_in_place(into: torch.dtype, grad: torch.dtype) -> None:
    """One rounding, of the exact sum's float32, to the target's dtype."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1001, generator=generator).to(into)
    g = torch.randn(1001, generator=generator).to(grad)
    want = (x.float() + g.float()).to(into)
    address = x.data_ptr()
    assert optim.accumulate_(x, g) is x and x.data_ptr() == address
    assert optim_cases.same_bits(x, want)


def test_accumulate_refuses() -> None:
    with pytest.raises(ValueError, match=r"expected a gradient of shape \[3\], got \[1\]"):
        optim.accumulate_(torch.zeros(3), torch.zeros(1))
    with pytest.raises(TypeError, match="expected floats"):
        optim.accumulate_(torch.zeros(3, dtype=torch.int32), torch.zeros(3))
    with pytest.raises(ValueError, match="expected float32, bfloat16 or float16"):
        optim.accumulate_main_grads(network().parameters(), torch.float64)


@pytest.mark.parametrize("name", ["AdamW", "LAMB", "Adafactor"])
def test_main_grads(name: str) -> None:
    """64 micro-batches of a bf16 model: float32 sums are those of float64, bf16's are far off."""
    model = network(torch.bfloat16)
    twins = {"float64": copy.deepcopy(model), "bfloat16": copy.deepcopy(model)}
    ours = getattr(optim, name)(model.parameters(), lr=0.01, main_grads=True)
    sums = [torch.zeros(p.shape, dtype=torch.float64) for p in model.parameters()]
    with optim.accumulate_main_grads(model.parameters()):
        assert all(p.main_grad is None for p in model.parameters())
        for step in range(64):
            backward(model, step, torch.bfloat16)
            assert all(p.grad is None for p in model.parameters())
            twins["float64"].zero_grad()
            for twin in twins.values():
                backward(twin, step, torch.bfloat16)
            for total, p in zip(sums, twins["float64"].parameters()):
                total += p.grad.double()
        exact = torch.cat([s.flatten() for s in sums])
        wide = torch.cat([p.main_grad.flatten() for p in model.parameters()]).double()
        narrow = torch.cat([p.grad.flatten() for p in twins["bfloat16"].parameters()]).double()
        assert float((wide - exact).norm() / exact.norm()) < 1e-6
        assert float((narrow - exact).norm() / exact.norm()) > 1e-3

        # The step reads them: that of the same parameters with these as gradients.
        before = [p.detach().clone() for p in model.parameters()]
        steps = [nn.Parameter(p) for p in optim_cases.clones(before)]
        plain = getattr(optim, name)(steps, lr=0.01)
        grads = [p.main_grad for p in model.parameters()]
        for q, g in zip(steps, grads):
            q.grad_dtype = None
            q.grad = g.clone()
        ours.step()
        plain.step()
        assert all(map(optim_cases.same_bits, model.parameters(), steps))
        assert not any(map(torch.equal, model.parameters(), before))
        ours.zero_grad(set_to_none=False)
        assert not any(p.main_grad.any() for p in model.parameters())
        ours.zero_grad()
        assert all(p.main_grad is None for p in model.parameters())
        ours.step()
        assert all(map(optim_cases.same_bits, model.parameters(), steps))
    assert not any(hasattr(p, "main_grad") for p in model.parameters())
    backward(model, 0, torch.bfloat16)
    ours.step()  # of the ordinary gradients


def test_main_grads_in_bfloat16() -> None:
    model = network(torch.float32)
    with optim.accumulate_main_grads(model.parameters(), torch.bfloat16):
        backward(model, 0)
        assert {p.main_grad.dtype for p in model.parameters()} == {torch.bfloat16}


# --- autocast and GradScaler


@pytest.mark.parametrize("name", ["AdamW", "Adam", "Adagrad"])
def test_autocast_and_grad_scaler(name: str) -> None:
    """A training with overflows, the first step's too: torch's fused bits, losses and scales."""
    models = [network() for _ in range(2)]
    ours = getattr(optim, name)(models[0].parameters(), lr=0.01)
    theirs = getattr(torch.optim, name)(models[1].parameters(), lr=0.01, fused=True)
    optimizers = (ours, theirs)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3) for _ in range(2)]
    for step in range(12):
        losses = []
        for model, optimizer, scaler in zip(models, optimizers, scalers):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = model(batch(step))
            loss = out.float().square().mean()
            scaler.scale(loss).backward()
            if step in (0, 6):
                next(iter(model.parameters())).grad[0, 0] = torch.inf
            before = copy.deepcopy(model.state_dict())
            scaler.step(optimizer)
            scaler.update()
            if step in (0, 6):
                assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
            losses.append(float(loss.detach()))
        if step == 0:
            assert all(not s.get("step", 0) for s in ours.state.values())
            if name != "Adagrad":  # whose sum torch makes in its constructor
                states = [v for s in ours.state.values() for v in s.values()]
                assert not any(v.any() for v in states)
        assert losses[0] == losses[1]
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert ours.skipped_steps == 2
    optim_cases.assert_same(ours, theirs)


@pytest.mark.parametrize("name", ["Adafactor", "Muon", "LAMB"])
def test_grad_scaler_on_the_rest(name: str) -> None:
    """Scaled by a power of two, the steps are those without scaling; overflows are skipped and counted."""
    shapes = ((33, 17), (5, 8))
    params, twins = optim_cases.parameters(shapes), optim_cases.parameters(shapes)
    ours, plain = getattr(optim, name)(params), getattr(optim, name)(twins)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for step in range(6):
        optim_cases.set_gradients(step, params, twins)
        scale = float(scaler.scale(torch.ones(())))
        for p in params:
            p.grad *= scale
        if step in (0, 3):
            params[0].grad[0, 0] = torch.inf
        else:
            plain.step()
        scaler.step(ours)
        scaler.update()
    assert ours.skipped_steps == 2
    for p, q in zip(params, twins):
        assert torch.equal(p, q)


# --- clipping


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float16), ids=ident)
@pytest.mark.parametrize("name", ["AdamW", "Adam", "Adagrad"])
def test_clip_rounding_of_torch(name: str, dtype: torch.dtype) -> None:
    """Given its norm, clip_grad_norm_ and torch's fused step to the bit, the rounding between included."""
    params = optim_cases.parameters(dtype=dtype)
    twins = optim_cases.clones(params)
    ours = getattr(optim, name)(params, max_grad_norm=1.0, clip_rounding="torch")
    theirs = getattr(torch.optim, name)(twins, fused=True)
    for step in range(30):
        optim_cases.set_gradients(step, params, twins)
        for twin in twins:
            twin.grad *= 10.0**-step if step % 5 == 0 else 1.0
        for p, q in zip(params, twins):
            p.grad.copy_(q.grad)
        ours.norm_estimate = torch.nn.utils.clip_grad_norm_(twins, 1.0)
        ours.step()
        theirs.step()
        assert float(ours.grad_norm) == float(ours.norm_estimate)
    optim_cases.assert_same(ours, theirs)


def test_clip_rounding_of_torch_without_its_norm() -> None:
    """The norm itself may differ in its last bits: bf16's coefficient then by one step of 2^-8."""
    params = optim_cases.parameters(dtype=torch.bfloat16)
    twins = optim_cases.clones(params)
    ours = optim.SGD(params, lr=1.0, max_grad_norm=1.0, clip_rounding="torch")
    optim_cases.set_gradients(0, params, twins)
    norm = torch.nn.utils.clip_grad_norm_(twins, 1.0)
    before = [p.detach().float() for p in params]
    ours.step()
    torch.testing.assert_close(ours.grad_norm, norm.float(), rtol=2**-7, atol=0)
    for p, old, q in zip(params, before, twins):
        torch.testing.assert_close(p.detach().float(), old - q.grad.float(), rtol=2**-7, atol=2**-6)


def test_folded_clipping_rounds_less() -> None:
    """The default keeps the clipped gradients of bf16 in float32 up to the momentum."""
    (p,) = optim_cases.parameters((4099,), torch.bfloat16)
    (q,) = optim_cases.clones([p])
    want = p.detach().double()
    optim_cases.set_gradients(0, [p], [q])
    norm = float(p.grad.double().norm())
    errors = {}
    for x, rounding in ((p, "folded"), (q, "torch")):
        ours = optim.AdamW(
            [x], max_grad_norm=1.0, clip_rounding=rounding, state_dtype=torch.float32
        )
        ours.step()
        clipped = x.grad.double() / (norm + 1e-6)
        error = ours.state[x]["exp_avg"].double() - 0.1 * clipped
        errors[rounding] = float(error.norm() / (0.1 * clipped).norm())
    assert errors["folded"] < 1e-6 < 1e-4 < errors["torch"]
    assert want.shape == p.shape


def test_norm_estimate_and_its_errors() -> None:
    params, twins = optim_cases.parameters(), optim_cases.parameters()
    ours = optim.AdamW(params, max_grad_norm=1.0, norm_estimate=4.0)
    plain = optim.AdamW(twins)
    optim_cases.set_gradients(0, params, twins)
    for q in twins:
        q.grad /= 4.0 + 1e-6
    ours.step()
    plain.step()
    for p, q in zip(params, twins):
        torch.testing.assert_close(p, q)
    with pytest.raises(ValueError, match="expected max_grad_norm too"):
        optim.AdamW(params, norm_estimate=1.0)
    with pytest.raises(
        ValueError, match='expected clip_rounding "folded" or "torch", got \'bf16\''
    ):
        optim.AdamW(params, clip_rounding="bf16")
