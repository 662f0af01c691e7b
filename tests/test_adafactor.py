"""Adafactor's kernel: against float64, against torch, among instruction sets, threads, layouts and masters."""

from __future__ import annotations

import copy
import ctypes
import math

import optim_cases
import pytest
import torch
from optim_cases import ident

from trimtab import ops, optim
from trimtab.optim import library

# Vectors, rows and columns of one, batches, more than one tile of 64 x 4096, odd lengths.
SHAPES = (
    (7,), (), (1, 4), (4, 1), (33, 17), (5, 3, 3, 3), (65, 513), (67, 4099), (5000, 3), (70_001,),
)  # fmt: skip
SMALL = ((7,), (1,), (33, 17), (3, 8, 5), (64, 96), (2, 700))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS: tuple[dict, ...] = (
    {},
    {"lr": 0.05, "weight_decay": 0.1, "maximize": True},
    {"eps": (1e-5, 1e-2), "d": 1.5, "beta2_decay": -0.5},
)


def averages(g, state, t, beta2_decay=-0.8, **_):
    """The states of torch.optim.Adafactor after a step, in float64; ``state``: those before."""
    weight = t**beta2_decay
    squares = {"row_var": -1, "col_var": -2} if g.dim() > 1 else {"variance": None}
    found = {}
    for name, dim in squares.items():
        new = g * g if dim is None else (g * g).mean(dim, keepdim=True)
        found[name] = state[name] + weight * (new - state[name]) if name in state else weight * new
    return found


def moved(p, g, state, t, eps, lr=1e-2, d=1.0, weight_decay=0.0, **_):
    """The parameter after it, from the states after it."""
    row, column = state.get("row_var"), state.get("col_var")
    if p.dim() > 1:
        v = row @ column / row.mean(-2, keepdim=True).clamp(min=eps[0])
    else:
        v = state["variance"]
    u = g / v.clamp(min=eps[0] ** 2).sqrt()
    size, length = (float(x.norm()) / math.sqrt(p.numel()) for x in (p, u))
    rate = max(eps[1], size) * min(lr, 1 / math.sqrt(t)) / max(1.0, length / d)
    return p * (1 - lr * weight_decay) - rate * u


def test_small_gradients() -> None:
    """Where the mean of row_var is below eps1, and the direction partly at its limit of 1 / eps1."""
    test_against_float64({"eps": (1e-2, 1e-3)}, torch.float32, scale=0.07)
    test_against_float64({"eps": (1e-2, 1e-3)}, torch.float32, scale=0.02)


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("options", OPTIONS, ids=ident)
def test_against_float64(options: dict, dtype: torch.dtype, scale: float = 1.0) -> None:
    """Each step from where ours stands: one rounding to the dtype, and a few of float32 before it."""
    params = optim_cases.parameters(SHAPES, dtype)
    options = {"eps": (torch.finfo(dtype).eps, 1e-3), **options}
    ours = optim.Adafactor(params, **options)
    few = torch.finfo(dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
    for step in range(4):
        optim_cases.set_gradients(step, params, scale=scale)
        before = [p.detach().double() for p in params]
        states = [{k: v.double() for k, v in ours.state[p].items()} for p in params]
        ours.step()
        for p, old, state in zip(params, before, states):
            g = -p.grad.double() if options.get("maximize") else p.grad.double()
            want = averages(g, state, step + 1, **options)
            now = {key: ours.state[p][key].double() for key in want}
            for key, value in want.items():
                tiny = float(torch.finfo(dtype).tiny)
                torch.testing.assert_close(now[key], value, rtol=few, atol=tiny * few)
            new = moved(old, g, now, step + 1, **options)
            error, size = (p.detach().double() - new).abs(), new.abs() + (new - old).abs()
            assert bool((error <= few * size).all()), (list(p.shape), float((error / size).max()))


@pytest.mark.parametrize("foreach", [True, False])
def test_a_step_of_torchs(foreach: bool) -> None:
    """From the same state one step of each: at most 2 units in the last place of the parameter apart.

    Where a parameter is smaller than its step, in those of the step; and then torch's sums in float32, each
    element after the other, weigh in: a hundredth may be further apart. (Ours are float64's, as
    test_against_float64 shows.)
    """
    params = optim_cases.parameters((*SHAPES[:7], (4096,)))
    ours = optim.Adafactor(params)
    for step in range(6):
        optim_cases.set_gradients(step, params)
        twins = optim_cases.clones(params)
        theirs = torch.optim.Adafactor(twins, foreach=foreach)
        if step:
            theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
        for p, q in zip(params, twins):
            q.grad = p.grad.clone()
        before = [p.detach().clone() for p in params]
        ours.step()
        theirs.step()
        for p, q, old in zip(params, twins, before):
            p, q = p.detach(), q.detach()
            size = torch.maximum(q.abs(), (q - old).abs())
            unit = 2.0 ** (torch.frexp(size).exponent - 24).double()
            apart = (p.double() - q.double()).abs() / unit
            far = float((apart > 2).double().mean())
            assert far < 0.015 and float(apart.max()) < 16, (list(p.shape), step, far)


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("options", OPTIONS[1:], ids=ident)
def test_instruction_sets_agree(options: dict, dtype: torch.dtype) -> None:
    def run() -> optim.Adafactor:
        params = optim_cases.parameters((*SMALL, (65, 4100)), dtype)
        ours = optim.Adafactor(params, **options, max_grad_norm=1.0, ema_decay=0.9, l1=0.01)
        for step in range(3):
            optim_cases.set_gradients(step, params)
            ours.step()
        return ours

    try:
        ops.set_isa("scalar")
        want = run()
        for isa in ops.available_isas()[1:]:
            ops.set_isa(isa)
            assert_same(run(), want)
    finally:
        ops.set_isa(None)


def assert_same(ours, theirs) -> None:
    for a, b in zip(ours.param_groups, theirs.param_groups):
        for p, q in zip(a["params"], b["params"]):
            assert optim_cases.same_bits(p.reshape(-1), q.reshape(-1)), list(p.shape)
            assert list(ours.state[p]) == list(theirs.state[q])
            for key, value in theirs.state[q].items():
                mine = ours.state[p][key]
                assert optim_cases.same_bits(mine.reshape(-1), value.reshape(-1)), key


def test_any_number_of_threads_and_any_company() -> None:
    """The same bits from one thread and two, and for a tensor that is stepped alone."""
    shapes = ((150, 4200), (5,), (700, 100), (40_000,), (64, 64), (3, 200, 500), (200_001,))

    def run(threads: int, only: int | None = None) -> optim.Adafactor:
        torch.set_num_threads(threads)
        params = optim_cases.parameters(shapes)
        ours = optim.Adafactor(params if only is None else [params[only]])
        for step in range(3):
            optim_cases.set_gradients(step, params)
            ours.step()
        return ours

    before = torch.get_num_threads()
    try:
        want = run(1)
        assert_same(run(2), want)
        for only in (0, 4, 5):
            (alone,) = run(2, only).param_groups[0]["params"]
            assert torch.equal(alone, want.param_groups[0]["params"][only])
    finally:
        torch.set_num_threads(before)


def test_layouts() -> None:
    """Channels last, transposed, with gaps: rows and columns are those of the shape, not of memory."""
    values = [torch.randn(4, 6, 3, 5), torch.randn(40, 70), torch.randn(30, 50)]
    strange = [
        values[0].to(memory_format=torch.channels_last),
        values[1].T.contiguous().T,
        torch.stack([values[2], values[2]], -1)[..., 0],
    ]
    params = [torch.nn.Parameter(v.clone()) for v in values]
    others = [torch.nn.Parameter(v) for v in strange]
    assert not any(p.is_contiguous() for p in others)
    ours, theirs = optim.Adafactor(params), optim.Adafactor(others)
    copied = torch.empty_like(others[1], dtype=torch.bfloat16)
    theirs.set_copy(others[1], copied)
    for step in range(3):
        optim_cases.set_gradients(step, params, others)
        ours.step()
        theirs.step()
        assert all(torch.equal(p, q) for p, q in zip(params, others))
        assert torch.equal(copied, others[1].to(torch.bfloat16))
    for p, q in zip(params, others):
        assert all(torch.equal(v, theirs.state[q][k]) for k, v in ours.state[p].items())


def test_a_row_without_gradient() -> None:
    """An eps1 whose square is no float32: torch's step is NaN there, ours leaves the row alone."""
    p, q = torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(5))
    p.grad, q.grad = torch.ones(3, 4), torch.ones(5)
    p.grad[1], q.grad[1] = 0.0, 0.0
    optim.Adafactor([p, q], eps=(1e-30, 1e-3)).step()
    assert p[1].eq(1.0).all() and q[1] == 1.0
    assert p[0].lt(1.0).all() and q[0] < 1.0


def test_pruned_weights_count_for_no_sum() -> None:
    (p,) = optim_cases.parameters(((40, 30),))
    keep = torch.arange(30).expand(40, 30) < 18
    with torch.no_grad():
        p.mul_(keep)
    q = torch.nn.Parameter(torch.randn(30))
    ours = optim.Adafactor([p, q], lr=0.1)
    ours.set_mask(p, keep)
    p.grad, q.grad = torch.randn(40, 30), torch.randn(30)
    ours.step()
    ours.set_mask(q, keep[0])  # pruned after its first step: the state goes too
    p.grad = None
    ours.step()
    assert not q.detach()[18:].any() and not ours.state[q]["variance"][18:].any()
    assert q.detach()[:18].all()
    p.grad = torch.randn(40, 30)
    ours.state.pop(p)
    ours.step()
    assert not p.detach()[:, 18:].any()
    state = ours.state[p]
    assert not state["col_var"][:, 18:].any()
    want = (p.grad * keep).square().mean(-1, keepdim=True)
    torch.testing.assert_close(state["row_var"], want)


def test_masters_and_wide_states() -> None:
    """bfloat16 with a 16-bit remainder is float32; Kahan is near it; stochastic rounding repeats itself."""
    shapes = ((64, 96), (300,), (2, 700))
    plain = [torch.nn.Parameter(p.bfloat16().float()) for p in optim_cases.parameters(shapes)]

    def run(**options) -> tuple[list, optim.Adafactor]:
        params = [torch.nn.Parameter(p.detach().bfloat16()) for p in plain]
        return params, optim.Adafactor(params, lr=1e-3, eps=(1e-6, 1e-3), **options)

    runs = {
        "remainder": run(master="remainder", state_dtype="float32"),
        "kahan": run(master="kahan", state_dtype="float32"),
        "stochastic": run(rounding="stochastic", seed=5),
        "again": run(rounding="stochastic", seed=5),
    }
    wide = [torch.nn.Parameter(p.detach().clone()) for p in plain]
    exact = optim.Adafactor(wide, lr=1e-3, eps=(1e-6, 1e-3))
    for step in range(6):
        optim_cases.set_gradients(step, *(params for params, _ in runs.values()))
        for p, q in zip(wide, runs["kahan"][0]):
            p.grad = q.grad.float()
        exact.step()
        for _, optimizer in runs.values():
            optimizer.step()
    params, optimizer = runs["remainder"]
    for p, q in zip(params, wide):
        assert torch.equal(optimizer.master_weight(p), q)
        assert all(torch.equal(optimizer.state[p][k], v) for k, v in exact.state[q].items())
    for p, q in zip(runs["kahan"][0], wide):
        torch.testing.assert_close(p.float(), q.detach(), rtol=2**-8, atol=1e-5)
    assert_same(runs["stochastic"][1], runs["again"][1])
    for p, q in zip(runs["stochastic"][0], wide):
        torch.testing.assert_close(p.float(), q.detach(), rtol=0.05, atol=0.02)
    with pytest.raises(ValueError, match="hardly shrink; expected state_dtype float32"):
        run(state_dtype="int8")


def test_c_function_refuses_before_it_writes() -> None:
    (p,) = optim_cases.parameters(((4, 6),))
    p.grad = torch.ones(4, 6)
    ours = optim.Adafactor([p])
    ours.step()
    before = p.detach().clone()
    shapes = ours._plan.rows.shapes

    def refused(match: str) -> None:
        p.grad = torch.ones(4, 6)
        with pytest.raises(RuntimeError, match=match):
            ours.step()
        assert torch.equal(p, before) and ours.state[p]["step"] == 1

    shapes["rows"] = 3
    refused(r"adafactor: tensor 0: expected batch \* rows \* columns to be numel")
    shapes["rows"], shapes["whole_rows"] = 4, 3
    refused("expected a whole that is no smaller than its piece")
    shapes["whole_rows"] = 4
    state = ours._plan.table["state_dtype"].copy()
    ours._plan.table["state_dtype"] = library.DYNAMIC8
    refused("adafactor: tensor 0: expected float32, bfloat16 or float16")
    ours._plan.table["state_dtype"] = state
    call = library.AdafactorCall(None, None, None, None, 0)
    with pytest.raises(RuntimeError, match="adafactor: call is NULL"):
        library.adafactor_step(call)
    inner = library.Call()
    inner.max_norm = -1.0
    for part, match in (
        (9, "a tt_adafactor_part"),
        (library.SQUARES, "sums, and neither clipping"),
    ):
        call = library.AdafactorCall(ctypes.addressof(inner), None, None, None, part)
        with pytest.raises(RuntimeError, match=match):
            library.adafactor_step(call)
