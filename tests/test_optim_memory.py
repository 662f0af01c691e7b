"""Optimizers with states in 8 bits and 16, stochastic rounding, and masters beside bf16 parameters."""

from __future__ import annotations

import copy
import io
from typing import Any

import cases
import optim_cases
import pytest
import torch
from optim_cases import ident

from trimtab import ops, optim
from trimtab.optim import memory

NAMES = ("AdamW", "SGD", "Lion", "RMSprop", "Adagrad", "NAdam", "RAdam", "Adamax", "LAMB")
SIZES = (1, 255, 256, 4095, 4096, 5003, 70001)


def make(name: str, params: list[torch.nn.Parameter], **options: Any) -> Any:
    if name == "SGD":
        options.setdefault("momentum", 0.9)
    return getattr(optim, name)(params, **{"lr": 0.01, **options})


def run(name: str, steps: int = 4, sizes=SIZES, dtype=torch.float32, **options: Any) -> Any:
    params = optim_cases.parameters(sizes, dtype)
    optimizer = make(name, params, **options)
    for step in range(steps):
        optim_cases.set_gradients(step, params)
        optimizer.step()
    return optimizer


def assert_same(ours: Any, theirs: Any) -> None:
    for p, q in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"]):
        assert torch.equal(p, q), p.numel()
        assert ours.state[p].keys() == theirs.state[q].keys()
        for key, value in theirs.state[q].items():
            assert value.dtype == ours.state[p][key].dtype
            assert torch.equal(ours.state[p][key], value), (key, p.numel())


# --- exactness


@pytest.mark.parametrize(
    "options",
    [
        {"state_dtype": "int8"},
        {"state_dtype": "int8", "rounding": "stochastic", "seed": 7},
        {"state_dtype": "bf16", "rounding": "stochastic"},
        {"state_dtype": "int8", "max_grad_norm": 1.0, "ema_decay": 0.9, "l1": 0.01},
    ],
    ids=ident,
)
@pytest.mark.parametrize("name", NAMES)
def test_instruction_sets_and_threads_agree(name: str, options: dict) -> None:
    try:
        ops.set_isa("scalar")
        want = run(name, 3, **options)
        for isa in ops.available_isas()[1:]:
            ops.set_isa(isa)
            assert_same(run(name, 3, **options), want)
    finally:
        ops.set_isa(None)
    for count in (1, 3):
        with cases.threads(count):
            assert_same(run(name, 3, **options), want)


HALF: tuple[tuple[torch.dtype, dict[str, Any]], ...] = (
    (torch.bfloat16, {}),
    (torch.bfloat16, {"rounding": "stochastic"}),
    (torch.bfloat16, {"rounding": "stochastic", "max_grad_norm": 1.0}),
    (torch.bfloat16, {"master": "kahan"}),
    (torch.bfloat16, {"master": "remainder"}),
    (torch.bfloat16, {"master": "remainder", "max_grad_norm": 1.0}),
    (torch.bfloat16, {"master": "remainder", "state_dtype": "int8", "rounding": "stochastic"}),
    (torch.float16, {}),
    (torch.float16, {"state_dtype": torch.float32, "max_grad_norm": 1.0, "ema_decay": 0.9}),
    (torch.float16, {"state_dtype": "int8", "rounding": "stochastic"}),
)


@pytest.mark.parametrize(("dtype", "options"), HALF, ids=ident)
@pytest.mark.parametrize("name", NAMES)
def test_16_bit_instruction_sets_agree(name: str, dtype: torch.dtype, options: dict) -> None:
    sizes = (1, 255, 4097, 9001)
    try:
        ops.set_isa("scalar")
        want = run(name, 3, sizes, dtype, **options)
        for isa in ops.available_isas()[1:]:
            ops.set_isa(isa)
            assert_same(run(name, 3, sizes, dtype, **options), want)
    finally:
        ops.set_isa(None)


SMALL: tuple[tuple[torch.dtype, dict[str, Any]], ...] = (
    (torch.float32, {"state_dtype": "int8", "rounding": "stochastic", "min_8bit_numel": 0}),
    (torch.bfloat16, {"state_dtype": "int8", "master": "remainder"}),
    (torch.bfloat16, {"state_dtype": "int8", "rounding": "stochastic"}),
    (torch.bfloat16, {"rounding": "stochastic"}),
    (torch.bfloat16, {"master": "kahan"}),
    (torch.bfloat16, {"master": "remainder"}),
)


@pytest.mark.parametrize("scale", [8.0, 3.0])
@pytest.mark.parametrize("extra", [{}, {"max_grad_norm": 1.0}, {"zero_grads": True}], ids=ident)
@pytest.mark.parametrize(("dtype", "options"), SMALL, ids=ident)
def test_folded_in(dtype: torch.dtype, options: dict, extra: dict, scale: float) -> None:
    """Unscaled, clipped, negated, copied, averaged, zeroed: vectors as scalars, whose blocks are windows."""
    sizes = (300, 4109, 9001)
    found = []
    try:
        for isa in ops.available_isas():
            ops.set_isa(isa)
            params = optim_cases.parameters(sizes, dtype)
            ours = make("AdamW", params, maximize=True, **options, **extra)
            copies = [torch.zeros(p.shape) for p in params] if "zero_grads" in extra else []
            for p, copied in zip(params, copies):
                ours.set_copy(p, copied)
            for step in range(3):
                optim_cases.set_gradients(step, params)
                ours.grad_scale = torch.tensor(scale)
                ours.step()
            states = [x for p in params for _, x in sorted(ours.state[p].items())]
            found.append([*params, *states, *copies, *(p.grad for p in params)])
    finally:
        ops.set_isa(None)
    if "zero_grads" in extra:
        assert all(p.grad.eq(0).all() for p in params)
        for p, copied in zip(params, copies):  # of what p was rounded from
            torch.testing.assert_close(p.detach().float(), copied, rtol=2**-7, atol=1e-6)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("name", NAMES)
def test_one_step_is_fp32s_rounded(name: str) -> None:
    """From zero state: the parameters are fp32's to the bit, the states its, rounded to codes."""
    options = {"torch_tails": False}
    ours = run(name, 1, **options, state_dtype="int8")
    theirs = run(name, 1, **options)
    for p, q in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"]):
        assert torch.equal(p, q)
        for key in theirs.all_state_names:
            if key not in theirs.state[q]:
                continue
            if p.numel() < 4096:
                assert torch.equal(ours.state[p][key], theirs.state[q][key])
                continue
            codes, scales = memory.encode(theirs.state[q][key], key in memory.SIGNED)
            assert torch.equal(ours.state[p][f"{key}_codes"], codes)
            assert torch.equal(ours.state[p][f"{key}_scales"], scales)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("NAdam", "LAMB")])
def test_remainder_is_fp32_training(name: str) -> None:
    """200 steps with the same bf16 gradients: parameter and remainder are the fp32 run's bits."""
    sizes = (1, 7, 1003, 4100)
    wide = optim_cases.parameters(sizes)
    narrow = [torch.nn.Parameter(p.detach().bfloat16()) for p in wide]
    ours = make(name, narrow, master="remainder", state_dtype=torch.float32, weight_decay=0.1)
    theirs = make(name, wide, weight_decay=0.1)
    for p, q in zip(narrow, wide):
        ours.set_master_weight(p, q.detach())
    for step in range(200):
        optim_cases.set_gradients(step, narrow)
        for p, q in zip(narrow, wide):
            q.grad = p.grad.float()
        ours.step()
        theirs.step()
    for p, q in zip(narrow, wide):
        assert optim_cases.same_bits(ours.master_weight(p), q.detach())
        assert (p.float() - q).abs().le(q.abs() * 2**-8).all()
        for key, value in theirs.state[q].items():
            assert optim_cases.same_bits(ours.state[p][key], value)


def test_remainder_holds_any_float() -> None:
    """Ties, the largest finite numbers, Inf; a NaN stays one."""
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0x00008000, 0x0000FFFF])
    value = bits.to(torch.int32).view(torch.float32)
    value = torch.cat([value, -value, torch.zeros(1), torch.full((1,), torch.nan)])
    p = torch.nn.Parameter(torch.zeros(len(value), dtype=torch.bfloat16))
    ours = optim.SGD([p], lr=0.0, master="remainder")
    ours.set_master_weight(p, value)
    p.grad = torch.zeros_like(p)
    for isa in ops.available_isas():
        ops.set_isa(isa)
        ours.step()
        got = ours.master_weight(p)
        assert optim_cases.same_bits(got[:-1], value[:-1])
        assert got[-1].isnan() and p[-1].isnan()
    ops.set_isa(None)


# --- rounding


def test_stochastic_rounding_is_right_in_the_mean() -> None:
    """Small updates, which nearest would lose: the mean of many parameters moves by their sum."""
    n, steps, lr = 40_000, 64, 2.0**-12
    p = torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16))
    lost = torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16))
    kahan = torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16))
    ours = optim.SGD([p], lr=lr, rounding="stochastic", seed=3)
    others = [optim.SGD([lost], lr=lr), optim.SGD([kahan], lr=lr, master="kahan")]
    for _ in range(steps):
        for q in (p, lost, kahan):
            q.grad = -torch.ones_like(q)
        for optimizer in (ours, *others):
            optimizer.step()
    moved = (p.detach().double() - 1).mean()
    assert float(moved) == pytest.approx(steps * lr, rel=0.01)
    assert lost.detach().eq(1).all()
    assert kahan.detach().eq(1 + steps * lr).all()


def test_random_bits_do_not_repeat() -> None:
    """Another seed, step, tensor or element rounds differently; the same ones alike."""

    def rounded(seed: int, steps: int) -> list[torch.Tensor]:
        params = [torch.nn.Parameter(torch.full((4096,), 1.0).bfloat16()) for _ in range(2)]
        ours = optim.SGD(params, lr=2.0**-9, rounding="stochastic", seed=seed)
        for _ in range(steps):
            for p in params:
                p.detach().fill_(1.0)
                p.grad = -torch.ones_like(p)
            ours.step()
        return [p.detach().float() - 1 for p in params]

    a, b = rounded(1, 1)
    again = rounded(1, 1)
    assert torch.equal(a, again[0]) and torch.equal(b, again[1])
    for other in (b, rounded(2, 1)[0], rounded(1, 2)[0], a.roll(1)):
        apart = float((a != other).float().mean())
        share = float((a != 0).float().mean())
        assert apart == pytest.approx(2 * share * (1 - share), abs=0.05)


# --- training


def losses(seed: int, steps: int = 150, dtype=torch.float32, **options: Any) -> float:
    """Mean loss at the end of training a small network on a fixed teacher."""
    torch.manual_seed(seed)
    teacher = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 1))
    model.to(dtype)
    optimizer = optim.AdamW(model.parameters(), lr=3e-3, **options)
    late = []
    for step in range(steps):
        x = torch.randn(128, 64)
        with torch.no_grad():
            y = teacher(x) * 3
        loss = torch.nn.functional.mse_loss(model(x.to(dtype)).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= steps - 50:
            late.append(loss.item())
    return sum(late) / len(late)


def test_8_bit_training_loses_nothing() -> None:
    seeds = range(4)
    want = torch.tensor([losses(s) for s in seeds])
    for rounding in ("nearest", "stochastic"):
        options = {"state_dtype": "int8", "min_8bit_numel": 0, "rounding": rounding}
        got = torch.tensor([losses(s, **options) for s in seeds])
        assert abs(float((got - want).mean())) < float(want.std()), rounding


def test_bf16_training() -> None:
    want = torch.tensor([losses(s) for s in range(3)])
    for options in ({"master": "remainder"}, {"master": "kahan"}, {"rounding": "stochastic"}):
        got = torch.tensor([losses(s, dtype=torch.bfloat16, **options) for s in range(3)])
        assert abs(float((got - want).mean())) < 2 * float(want.std()), options


# --- bytes and checkpoints


@pytest.mark.parametrize(
    ("dtype", "options", "want"),
    [
        (torch.float32, {}, 8),
        (torch.float32, {"state_dtype": "bf16"}, 4),
        (torch.float32, {"state_dtype": "int8"}, 2 + 2 * 4 / 256),
        (torch.bfloat16, {"state_dtype": "int8", "master": "remainder"}, 4 + 2 * 4 / 256),
        (torch.bfloat16, {"master": "kahan"}, 6),
    ],
    ids=ident,
)
def test_bytes_of_state(dtype: torch.dtype, options: dict, want: float) -> None:
    n = 1 << 16
    p = torch.nn.Parameter(torch.zeros(n, dtype=dtype))
    p.grad = torch.ones_like(p)
    ours = optim.AdamW([p], **options)
    ours.step()
    held = [v for k, v in ours.state[p].items() if k != "step"]
    assert sum(v.untyped_storage().nbytes() for v in held) == want * n


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"state_dtype": "int8"}),
        (torch.float32, {"state_dtype": "int8", "rounding": "stochastic", "ema_decay": 0.9}),
        (torch.bfloat16, {"state_dtype": "int8", "master": "remainder"}),
        (torch.bfloat16, {"master": "kahan", "rounding": "stochastic"}),
    ],
    ids=ident,
)
@pytest.mark.parametrize("name", ["AdamW", "SGD", "RMSprop"])
def test_checkpoint_goes_on_with_the_same_bits(name: str, dtype, options: dict) -> None:
    ours = run(name, 3, dtype=dtype, **options)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    params = ours.param_groups[0]["params"]
    twins = optim_cases.clones(params)
    other = make(name, twins, **options)
    other.load_state_dict(torch.load(file, weights_only=True))
    clone = copy.deepcopy(ours)
    for step in range(3, 6):
        optim_cases.set_gradients(step, params, twins, clone.param_groups[0]["params"])
        for optimizer in (ours, other, clone):
            optimizer.step()
    assert_same(other, ours)
    assert_same(clone, ours)


def test_torchs_state_dict_is_rounded_and_ours_exported() -> None:
    params = optim_cases.parameters(SIZES)
    twins = optim_cases.clones(params)
    theirs = torch.optim.AdamW(params, lr=0.01)
    optim_cases.set_gradients(0, params, twins)
    theirs.step()
    ours = optim.AdamW(twins, lr=0.01, state_dtype="int8")
    ours.load_state_dict(theirs.state_dict())
    for p, q in zip(params, twins):
        small = p.numel() < 4096
        assert ("exp_avg" in ours.state[q]) == small
        assert ("exp_avg_codes" in ours.state[q]) != small
    ours.step()
    back = torch.optim.AdamW(optim_cases.clones(twins), lr=0.01)
    exported = ours.float_state_dict()
    assert "state_format" not in exported["param_groups"][0]
    back.load_state_dict(copy.deepcopy(exported))  # shares tensors with what it is given
    for p, q in zip(back.param_groups[0]["params"], twins):
        p.grad = q.grad.clone()
        assert back.state[p]["exp_avg"].dtype == torch.float32
    back.step()
    wide = optim.AdamW(optim_cases.clones(twins), lr=0.01)
    wide.load_state_dict(ours.state_dict())
    for p, q in zip(wide.param_groups[0]["params"], exported["state"].values()):
        assert torch.equal(wide.state[p]["exp_avg_sq"], q["exp_avg_sq"])
    assert "state_format" not in wide.param_groups[0]


def test_nan_gradient() -> None:
    """As torch, loud: the block reads NaN; nothing is zeroed. Skipped, the states stay to the bit."""
    for skip in (True, False):
        ours = run("AdamW", 3, (8192,), state_dtype="int8", skip_nonfinite=skip)
        (p,) = ours.param_groups[0]["params"]
        before = {k: v.clone() for k, v in ours.state[p].items()}
        weights = p.detach().clone()
        p.grad[300] = torch.nan
        ours.step()
        if skip:
            assert torch.equal(p, weights)
            assert all(torch.equal(before[k], v) for k, v in ours.state[p].items())
            continue
        assert p.isnan().nonzero().flatten().tolist() == [300]
        exported = ours.float_state_dict()["state"][0]["exp_avg"]
        assert exported.isnan().nonzero().flatten().tolist() == list(range(256, 512))
        assert exported[:256].ne(0).any() and exported[512:].ne(0).any()


def test_strided_and_masked_parameters() -> None:
    base = torch.randn(80, 70, generator=torch.Generator().manual_seed(0))
    p = torch.nn.Parameter(base.t())  # dense, but not in rows
    q = torch.nn.Parameter(base.t().contiguous())
    for x in (p, q):
        x.grad = base.t() * 2
    ours = make("AdamW", [p], state_dtype="int8")
    mask = base.t() > 0
    ours.set_mask(p, mask)
    ours.step()
    ours.step()
    assert p[~mask].eq(0).all()
    assert ours.state[p]["exp_avg_codes"][~mask].eq(127).all()
    twin = make("AdamW", [q], state_dtype="int8")
    twin.load_state_dict(ours.state_dict())
    twin.step()
    assert torch.isfinite(q).all()


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_dtype": "int4"}, "expected state_dtype .* got 'int4'"),
        ({"state_dtype": torch.float64}, "expected state_dtype"),
        ({"rounding": "up"}, "expected rounding in .* got 'up'"),
        ({"master": True}, "expected master in .* got True"),
        ({"seed": -1}, "expected seed to be an integer from 0"),
        ({"min_8bit_numel": 1.5}, "expected min_8bit_numel to be an integer"),
    ],
    ids=ident,
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.AdamW(optim_cases.parameters((3,)), **options)


def test_master_of_fp16_is_refused() -> None:
    params = optim_cases.parameters((3,), torch.float16)
    params[0].grad = torch.ones_like(params[0])
    ours = optim.SGD(params, lr=1.0, master="kahan")
    with pytest.raises(RuntimeError, match="expected bfloat16 or float32 with master"):
        ours.step()


def test_state_dicts_that_do_not_fit() -> None:
    ours = run("AdamW", 1, (5000,), state_dtype="int8")
    other = copy.deepcopy(ours)
    bad = ours.state_dict()
    bad["param_groups"][0]["state_format"] = "dynamic8/256/2"
    with pytest.raises(ValueError, match="format dynamic8/256/1, got 'dynamic8/256/2'"):
        other.load_state_dict(bad)
    bad = ours.state_dict()
    bad["state"] = {0: {**bad["state"][0], "exp_avg_scales": torch.zeros(3)}}
    with pytest.raises(ValueError, match="exp_avg_scales of float32"):
        other.load_state_dict(bad)
    assert_same(other, ours)
    narrow = run("SGD", 1, (50,), torch.bfloat16, master="remainder")
    plain = make("SGD", optim_cases.parameters((50,), torch.bfloat16))
    with pytest.raises(ValueError, match='with master="remainder"'):
        plain.load_state_dict(narrow.state_dict())
    plain.load_state_dict(narrow.float_state_dict())


FORMATS: tuple[tuple[torch.dtype, dict[str, Any]], ...] = (
    (torch.float32, {"state_dtype": "bf16"}),
    (torch.float32, {"state_dtype": "int8", "rounding": "stochastic"}),
    (torch.bfloat16, {"rounding": "stochastic"}),
    (torch.bfloat16, {"master": "kahan"}),
    (torch.bfloat16, {"master": "remainder", "state_dtype": "int8"}),
)


@pytest.mark.parametrize(("dtype", "options"), FORMATS, ids=ident)
def test_state_dict_of_another_optimizer(dtype: torch.dtype, options: dict) -> None:
    """In the same format: refused by name, and nothing has changed."""
    adam, lion = (run(name, 1, (300, 5000), dtype, **options) for name in ("AdamW", "Lion"))
    before = copy.deepcopy(adam)
    with pytest.raises(ValueError, match=r"AdamW.load_state_dict: expected states .*another optim"):
        adam.load_state_dict(lion.state_dict())
    with pytest.raises(ValueError, match=r"AdamW.load_state_dict: expected the keys 'state'"):
        adam.load_state_dict({"version": 2})
    assert_same(adam, before)


@pytest.mark.parametrize("kind", ["kahan", "remainder"])
def test_masters_of_another_version(kind: str) -> None:
    """The other kind, another width, another size: refused, and nothing has changed."""
    ours = run("AdamW", 1, (300, 5000), torch.bfloat16, master=kind)
    before = copy.deepcopy(ours)
    other = {"kahan": "remainder", "remainder": "kahan"}[kind]
    theirs = run("AdamW", 1, (300, 5000), torch.bfloat16, master=other)
    with pytest.raises(ValueError, match=f'with master="{other}"; this one has master="{kind}"'):
        ours.load_state_dict(theirs.state_dict())
    _, key, dtype = memory.MASTERS[kind]
    for change, got in ((lambda x: x.float(), "torch.float32"), (lambda x: x[1:], str(dtype))):
        bad = ours.state_dict()
        bad["state"] = {i: {**saved, key: change(saved[key])} for i, saved in bad["state"].items()}
        with pytest.raises(ValueError, match=f"expected {key} of {dtype} .*, got {got}"):
            ours.load_state_dict(bad)
    assert_same(ours, before)
