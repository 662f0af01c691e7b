"""What the step folds in: clipping, GradScaler, skipping, zeroing, averages, copies, masks, shrinkage."""

from __future__ import annotations

import copy

import optim_cases
import pytest
import torch
from optim_cases import OPTIONS, ident

from trimtab import optim

NAMES = tuple(OPTIONS)
DTYPES = (torch.float32, torch.bfloat16)


def pair(name: str, dtype: torch.dtype = torch.float32, **options):
    """An optimizer with the options and one without, on equal parameters and gradients."""
    params = optim_cases.parameters(dtype=dtype)
    twins = optim_cases.clones(params)
    optim_cases.set_gradients(0, params, twins)
    cls = getattr(optim, name)
    return cls(params, lr=0.05, **options), cls(twins, lr=0.05), params, twins


@pytest.mark.parametrize("max_norm", [0.5, 1e6, 0.0])
@pytest.mark.parametrize("name", NAMES)
def test_clipping(name: str, max_norm: float) -> None:
    ours, plain, params, twins = pair(name, max_grad_norm=max_norm)
    norm = torch.nn.utils.clip_grad_norm_(twins, max_norm)
    ours.step()
    plain.step()
    torch.testing.assert_close(ours.grad_norm, norm)
    for p, q in zip(params, twins):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [1e30, 1e-30])
def test_norm_neither_overflows_nor_vanishes(value: float) -> None:
    p = torch.nn.Parameter(torch.zeros(5000))
    p.grad = torch.full((5000,), value)
    ours = optim.SGD([p], lr=1.0, max_grad_norm=1.0)
    ours.step()
    if value > 1:
        assert float(ours.grad_norm) == pytest.approx(value * 5000**0.5, rel=1e-5)
        assert float(p.detach().norm()) == pytest.approx(1.0, rel=1e-5)
    else:
        assert torch.equal(p, -p.grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("name", ["Adam", "AdamW", "Adagrad"])
def test_grad_scaler_bits(name: str, dtype: torch.dtype) -> None:
    """Through torch's GradScaler, with overflows, as its fused optimizers; gradients stay as they came."""
    params = optim_cases.parameters(dtype=dtype)
    twins = optim_cases.clones(params)
    ours = getattr(optim, name)(params)
    theirs = getattr(torch.optim, name)(twins, fused=True)
    scale = 3.0 if dtype == torch.float32 else 4.0  # 16 bits: Adagrad's tail rounds 3 another time
    scalers = [torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2) for _ in range(2)]
    for step in range(10):
        optim_cases.set_gradients(step, params, twins)
        if step in (0, 5):
            params[3].grad[7] = twins[3].grad[7] = torch.inf
        for scaler, optimizer in zip(scalers, (ours, theirs)):
            scaler.scale(torch.ones(()))
            scaler.step(optimizer)
            scaler.update()
    assert scalers[0].get_scale() == scalers[1].get_scale()
    assert ours.skipped_steps == 2
    optim_cases.assert_same(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_overflow_on_the_first_step(name: str) -> None:
    """Nothing changes, no state comes to be that a later step would take for real."""
    ours, plain, params, _ = pair(name)
    ours.found_inf = torch.ones(())
    before = [p.detach().clone() for p in params]
    ours.step()
    assert all(map(optim_cases.same_bits, params, before)) and ours.skipped_steps == 1
    assert all(
        (not s.get("step", 0) and "momentum_buffer" not in s) or name == "RMSprop"
        for s in ours.state.values()
    )
    del ours.found_inf
    ours.step()
    plain.step()
    optim_cases.assert_same(ours, plain)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", NAMES)
def test_nonfinite_gradient(name: str, bad: float) -> None:
    """Skipped whole and counted when asked; otherwise it goes where torch's would."""
    ours, plain, params, twins = pair(name, skip_nonfinite=True)
    plain.step()
    ours.step()
    optim_cases.set_gradients(1, params, twins)
    params[5].grad[999] = twins[5].grad[999] = bad
    ours.step()
    optim_cases.assert_same(ours, plain)
    assert ours.skipped_steps == 1
    plain.step()
    if name not in ("Lion", "SGD") and not torch.isfinite(torch.tensor(bad)):
        assert not torch.isfinite(twins[5].detach()[999]) or name == "Adamax"
    assert bool(torch.isfinite(twins[5].detach()[:999]).all())


@pytest.mark.parametrize("name", NAMES)
def test_zero_grads(name: str) -> None:
    ours, plain, params, _ = pair(name, zero_grads=True)
    addresses = [p.grad.data_ptr() for p in params]
    ours.step()
    plain.step()
    optim_cases.assert_same(ours, plain)
    assert [p.grad.data_ptr() for p in params] == addresses
    assert not any(p.grad.any() for p in params)
    params[0].grad.fill_(torch.inf)
    ours.found_inf = torch.ones(())
    ours.step()
    optim_cases.assert_same(ours, plain)
    assert not params[0].grad.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("name", NAMES)
def test_ema(name: str, dtype: torch.dtype) -> None:
    ours, _, params, _ = pair(name, dtype, ema_decay=0.9)
    want = [p.detach().double() for p in params]
    for step in range(5):
        optim_cases.set_gradients(step, params)
        ours.step()
        for w, p in zip(want, params):
            w += 0.1 * (p.detach().double() - w)
    for w, p in zip(want, params):
        assert ours.state[p]["ema"].dtype == torch.float32
        torch.testing.assert_close(ours.state[p]["ema"].double(), w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_ema_of_a_master(name: str) -> None:
    """The average follows the float32 that is trained, not the bfloat16 that stands for it."""
    ours, _, params, _ = pair(name, torch.bfloat16, ema_decay=0.9, master="remainder")
    want = [p.detach().double() for p in params]
    for step in range(5):
        optim_cases.set_gradients(step, params)
        ours.step()
        for w, p in zip(want, params):
            w += 0.1 * (ours.master_weight(p).double() - w)
    for w, p in zip(want, params):
        torch.testing.assert_close(ours.state[p]["ema"].double(), w, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_another_dtype(name: str, dtype: torch.dtype) -> None:
    """A gradient beside the parameter, wider or narrower than it, counts as its values do."""
    ours, plain, params, _ = pair(name, dtype, main_grads=True)
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    for p, q in zip(params, plain.param_groups[0]["params"]):
        q.grad = p.grad.bfloat16().to(dtype)
        p.main_grad = q.grad.to(other)
        p.grad = None
    ours.step()
    plain.step()
    optim_cases.assert_same(ours, plain)


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16, torch.float32], ids=ident)
@pytest.mark.parametrize("name", NAMES)
def test_copy(name: str, to: torch.dtype) -> None:
    ours, plain, params, _ = pair(name)
    copies = [torch.zeros(p.shape, dtype=to) for p in params]
    for p, target in zip(params, copies):
        ours.set_copy(p, target)
    ours.step()
    plain.step()
    optim_cases.assert_same(ours, plain)
    assert all(optim_cases.same_bits(c, p.detach().to(to)) for p, c in zip(params, copies))


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("name", NAMES)
def test_mask(name: str, dtype: torch.dtype) -> None:
    """Pruned weights and their states are 0, even under NaN gradients; the others are as without it."""
    ours, plain, params, twins = pair(name, dtype, skip_nonfinite=True)
    mask = torch.arange(1000) % 3 != 0
    ours.set_mask(params[5], mask)
    for step in range(3):
        optim_cases.set_gradients(step, params, twins)
        params[5].grad[~mask] = torch.nan
        ours.step()
        plain.step()
    pruned = [params[5], *(s for s in ours.state[params[5]].values() if s.dim())]
    whole = [twins[5], *(s for s in plain.state[twins[5]].values() if s.dim())]
    for x, y in zip(pruned, whole):
        assert not x.detach()[~mask].any()
        assert optim_cases.same_bits(x.detach()[mask], y.detach()[mask])
    assert ours.skipped_steps == 0
    ours.set_mask(params[5], None)
    ours.step()


@pytest.mark.parametrize("name", NAMES)
def test_l1(name: str) -> None:
    """p = sign(p) max(|p| - lr l1, 0) after the update; a group has its own strength."""
    params = optim_cases.parameters()
    twins = optim_cases.clones(params)
    groups = [{"params": params[:4]}, {"params": params[4:], "l1": 2.0}]
    ours = getattr(optim, name)(groups, lr=0.05, l1=0.5)
    plain = getattr(optim, name)(twins, lr=0.05)
    optim_cases.set_gradients(0, params, twins)
    ours.step()
    plain.step()
    for i, (p, q) in enumerate(zip(params, twins)):
        q = q.detach()
        want = q.sign() * (q.abs() - 0.05 * (0.5 if i < 4 else 2.0)).clamp(min=0)
        torch.testing.assert_close(p.detach(), want)
    assert bool((params[6].detach() == 0).any())


@pytest.mark.parametrize("state", DTYPES, ids=ident)
@pytest.mark.parametrize("name", [n for n in NAMES if n != "SGD"])
def test_state_dtype(name: str, state: torch.dtype) -> None:
    """bf16 parameters with fp32 states and the reverse; load_state_dict keeps the dtype."""
    dtype = torch.bfloat16 if state == torch.float32 else torch.float32
    ours, _, params, _ = pair(name, dtype, state_dtype=state, ema_decay=0.5)
    for step in range(3):
        optim_cases.set_gradients(step, params)
        ours.step()
    if name != "Adagrad":  # whose states torch makes in its constructor
        assert {s.dtype for s in ours.state[params[5]].values() if s.dim()} <= {
            state,
            torch.float32,
        }
    twins = optim_cases.clones(params)
    again = getattr(optim, name)(twins, lr=0.05, state_dtype=state, ema_decay=0.5)
    again.load_state_dict(copy.deepcopy(ours.state_dict()))
    optim_cases.set_gradients(9, params, twins)
    ours.step()
    again.step()
    optim_cases.assert_same(again, ours)


def test_all_at_once_in_one_mixed_model() -> None:
    """fp32, bf16 and fp16 parameters in one call; one norm over all of them."""
    params = [
        *optim_cases.parameters((5000, 3)),
        *optim_cases.parameters((700,), torch.bfloat16),
        *optim_cases.parameters((65,), torch.float16),
    ]
    twins = optim_cases.clones(params)
    ours = optim.AdamW(params, max_grad_norm=1.0, zero_grads=True, ema_decay=0.9)
    theirs = torch.optim.AdamW(twins, fused=True)
    for step in range(5):
        optim_cases.set_gradients(step, params, twins)
        norm = torch.stack([p.grad.double().norm() for p in twins]).norm()
        torch.nn.utils.clip_grad_norm_(twins, 1.0, foreach=False)
        ours.step()
        theirs.step()
        torch.testing.assert_close(ours.grad_norm.double(), norm, rtol=1e-5, atol=0)
    for p, q in zip(params, twins):
        torch.testing.assert_close(p.float(), q.float(), rtol=0.02, atol=0.01)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_clipped_from_memory(isa: str, name: str) -> None:
    """Gradients that are only scaled take a shorter way than those with more folded in: the same bits."""
    params = optim_cases.parameters((1300, 5, 512))
    twins = optim_cases.clones(params)
    copies = optim_cases.clones(params)
    optim_cases.set_gradients(0, params, twins)
    options = {"lr": 0.05, "max_grad_norm": 0.5, "maximize": True}
    ours, theirs = getattr(optim, name)(params, **options), getattr(optim, name)(twins, **options)
    for p, c in zip(twins, copies):
        theirs.set_copy(p, c)
    for scale in (1.0, 3.0):
        ours.grad_scale = theirs.grad_scale = torch.tensor(scale)
        ours.step()
        theirs.step()
        for p, q, c in zip(params, twins, copies):
            assert torch.equal(p, q) and torch.equal(q, c)
