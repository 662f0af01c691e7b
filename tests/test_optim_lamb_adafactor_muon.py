"""LAMB, whose steps depend on norms of whole tensors, and Adafactor and Muon, which see rows and columns."""

from __future__ import annotations

import copy
import pickle

import optim_cases
import pytest
import torch
from optim_cases import COMMON, ident
from torch.testing._internal.common_optimizers import optim_db

from trimtab import ops, optim

LAMB = (*COMMON, {"weight_decay": 0.0, "always_adapt": True}, {"bias_correction": False})


def lamb_step(p, g, m, v, t, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, **flags):
    """One step of the paper's algorithm in float64."""
    g = -g if flags.get("maximize") else g
    m.lerp_(g, 1 - betas[0])
    v.lerp_(g * g, 1 - betas[1])
    corrected = flags.get("bias_correction", True)
    first, second = (1 - b**t if corrected else 1.0 for b in betas)
    u = m / first / ((v / second).sqrt() + eps) + weight_decay * p
    adapts = weight_decay != 0 or flags.get("always_adapt")
    norms = float(p.norm()), float(u.norm())
    ratio = norms[0] / norms[1] if adapts and all(norms) else 1.0
    p.sub_(lr * ratio * u)


@pytest.mark.parametrize("options", LAMB, ids=ident)
def test_lamb(options: dict) -> None:
    params = optim_cases.parameters()
    want = [p.detach().double() for p in params]
    states = [(torch.zeros_like(w), torch.zeros_like(w)) for w in want]
    ours = optim.LAMB(params, **options)
    for step in range(20):
        optim_cases.set_gradients(step, params)
        ours.step()
        for p, w, (m, v) in zip(params, want, states):
            lamb_step(w, p.grad.double(), m, v, step + 1, **options)
    for p, w, (m, v) in zip(params, want, states):
        torch.testing.assert_close(p.double(), w, rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(ours.state[p]["exp_avg"].double(), m, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.state[p]["exp_avg_sq"].double(), v, rtol=1e-5, atol=1e-6)


def test_lamb_with_norms_of_zero() -> None:
    """A parameter or a direction of norm 0 steps with ratio 1; nothing becomes NaN."""
    p, q = torch.nn.Parameter(torch.zeros(5)), torch.nn.Parameter(torch.zeros(5))
    p.grad, q.grad = torch.ones(5), torch.zeros(5)
    optim.LAMB([p, q], lr=0.1).step()
    torch.testing.assert_close(p.detach(), torch.full((5,), -0.1))
    assert torch.equal(q, torch.zeros(5))


def test_lamb_has_the_same_bits_on_any_number_of_threads() -> None:
    def run(threads: int) -> optim.LAMB:
        torch.set_num_threads(threads)
        params = optim_cases.parameters((300_001, 5, 40_000))
        ours = optim.LAMB(params, lr=0.1, max_grad_norm=1.0)
        for step in range(3):
            optim_cases.set_gradients(step, params)
            ours.step()
        return ours

    before = torch.get_num_threads()
    try:
        optim_cases.assert_same(run(1), run(2))
    finally:
        torch.set_num_threads(before)


def test_lamb_steps_by_the_norm_of_what_is_left() -> None:
    """Pruned weights count neither for the norm of the tensor nor for that of its direction."""
    (p,) = optim_cases.parameters((1000,))
    keep = torch.arange(1000) < 600
    (q,) = [torch.nn.Parameter(p.detach()[:600].clone())]
    p.grad = torch.randn(1000)
    q.grad = p.grad[:600].clone()
    with torch.no_grad():
        p.mul_(keep)
    ours, plain = optim.LAMB([p], lr=0.1), optim.LAMB([q], lr=0.1)
    ours.set_mask(p, keep)
    ours.step()
    plain.step()
    torch.testing.assert_close(p.detach()[:600], q.detach(), rtol=1e-6, atol=1e-7)
    assert not p.detach()[600:].any()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=ident)
@pytest.mark.parametrize("options", LAMB, ids=ident)
def test_lamb_instruction_sets_agree(options: dict, dtype: torch.dtype) -> None:
    def run() -> optim.LAMB:
        params = optim_cases.parameters(dtype=dtype)
        ours = optim.LAMB(params, **options, max_grad_norm=1.0, ema_decay=0.9, l1=0.01)
        for step in range(4):
            optim_cases.set_gradients(step, params)
            ours.step()
        return ours

    try:
        ops.set_isa("scalar")
        want = run()
        for isa in ops.available_isas()[1:]:
            ops.set_isa(isa)
            optim_cases.assert_same(run(), want)
    finally:
        ops.set_isa(None)


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=ident)
def test_lamb_with_all_that_is_folded_in(state: torch.dtype) -> None:
    """Against the plain step after torch's clipping; the norms are those of the clipped direction."""
    params = optim_cases.parameters()
    twins = optim_cases.clones(params)
    options = {"lr": 0.05, "state_dtype": state, "weight_decay": 0.1}
    ours = optim.LAMB(params, **options, max_grad_norm=1.0, ema_decay=0.9, zero_grads=True)
    plain = optim.LAMB(twins, **options)
    ours.grad_scale, ours.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    for step in range(5):
        optim_cases.set_gradients(step, params, twins)
        for p in params:
            p.grad *= 8.0
        torch.nn.utils.clip_grad_norm_(twins, 1.0)
        ours.step()
        plain.step()
        assert not any(p.grad.any() for p in params)
    for p, q in zip(params, twins):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    ours.found_inf.fill_(1.0)
    before = [p.detach().clone() for p in params]
    ours.step()
    assert ours.skipped_steps == 1
    assert all(torch.equal(p, q) for p, q in zip(params, before))


def test_lamb_state_dict_and_pickle() -> None:
    params = optim_cases.parameters()
    twins = optim_cases.clones(params)
    ours = optim.LAMB(params, lr=0.1)
    optim_cases.set_gradients(0, params)
    ours.step()
    for p, q in zip(params, twins):
        q.data.copy_(p.data)
    again = optim.LAMB(twins, lr=0.3)
    again.load_state_dict(copy.deepcopy(ours.state_dict()))
    third = pickle.loads(pickle.dumps(ours))
    optim_cases.set_gradients(1, params, twins, third.param_groups[0]["params"])
    for optimizer in (ours, again, third):
        optimizer.step()
    optim_cases.assert_same(again, ours)
    optim_cases.assert_same(third, ours)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lr": -1.0}, "Invalid learning rate"),
        ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0"),
        ({"eps": -1.0}, "Invalid epsilon"),
        ({"weight_decay": -0.1}, "Invalid weight_decay"),
        ({"lr": torch.tensor([0.1, 0.2])}, "Tensor lr must be 1-element"),
    ],
)
def test_lamb_error_inputs(options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        optim.LAMB(optim_cases.parameters(), **options)


MATRIX = ("Adafactor", "Muon")
SHAPES = {
    "Adafactor": ((7,), (1,), (33, 17), (5, 1), (3, 8, 5), (64, 96), (33, 17), (7,), (), (3, 8, 5)),
    "Muon": ((33, 17), (17, 33), (5, 1), (64, 96), (17, 33), (33, 17), (64, 96)),
}
INFOS = {info.optim_cls.__name__: info for info in optim_db if info.optim_cls.__name__ in MATRIX}
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("name", MATRIX)
def test_groups_are_torchs(name: str) -> None:
    params = optim_cases.parameters(SHAPES[name])
    ours, theirs = getattr(optim, name)(params), getattr(torch.optim, name)(params)
    assert ours.defaults == theirs.defaults
    assert [list(g) for g in ours.param_groups] == [list(g) for g in theirs.param_groups]
    assert isinstance(ours, getattr(torch.optim, name))


def inputs(name: str) -> list:
    return [
        pytest.param(o.kwargs, id=o.desc.replace(" ", "_"))
        for o in INFOS[name].optim_inputs_func(device="cpu")
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("options", inputs("Muon"))
def test_muon_has_torchs_bits(options: dict, dtype: torch.dtype) -> None:
    """Every input of torch's database: parameters and states, after 8 steps."""
    ours, theirs = run_beside_torch("Muon", options, dtype)
    assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("options", inputs("Adafactor"))
def test_adafactor_is_as_torchs(options: dict, dtype: torch.dtype) -> None:
    """The same, within the roundings of 8 steps; tests/test_adafactor.py counts those of one."""
    ours, theirs = run_beside_torch("Adafactor", options, dtype)
    eps = torch.finfo(dtype).eps
    for p, q in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"]):
        torch.testing.assert_close(p, q, rtol=16 * eps, atol=8 * eps)
        assert list(ours.state[p]) == list(theirs.state[q])
        for key, value in theirs.state[q].items():
            mine = ours.state[p][key]
            assert (mine.shape, mine.dtype) == (value.shape, value.dtype)
            torch.testing.assert_close(mine, value, rtol=16 * eps, atol=1e-30)


def run_beside_torch(name: str, options: dict, dtype: torch.dtype) -> tuple:
    options = {k: v for k, v in options.items() if k not in ("capturable", "differentiable")}
    params = optim_cases.parameters(SHAPES[name], dtype)
    twins = optim_cases.clones(params)
    ours, theirs = (
        getattr(optim, name)(params, **options),
        getattr(torch.optim, name)(twins, **options),
    )
    for step in range(8):
        optim_cases.set_gradients(step, params, twins)
        ours.step()
        theirs.step()
    return ours, theirs


def assert_same(ours, theirs) -> None:
    """optim_cases.assert_same, for 0-d parameters too."""
    for a, b in zip(ours.param_groups, theirs.param_groups):
        for p, q in zip(a["params"], b["params"]):
            assert optim_cases.same_bits(p.reshape(-1), q.reshape(-1)), list(p.shape)
            assert list(ours.state[p]) == list(theirs.state[q])
            for key, value in theirs.state[q].items():
                mine = ours.state[p][key]
                assert optim_cases.same_bits(mine.reshape(-1), value.reshape(-1)), key


@pytest.mark.parametrize("shape", [(16, 48), (65, 31)], ids=ident)
def test_muon_together_is_muon_alone(shape: tuple[int, int], monkeypatch) -> None:
    """Many matrices of one shape against one at a time: at most roundings of the direction apart."""
    params = optim_cases.parameters([shape] * 40)
    twins = optim_cases.clones(params)
    ours, theirs = optim.Muon(params, lr=0.1), torch.optim.Muon(twins, lr=0.1)
    monkeypatch.setattr("trimtab.optim.matrix.BATCH", 16 * shape[0] * shape[1])
    for step in range(3):
        optim_cases.set_gradients(step, params, twins)
        ours.step()
        theirs.step()
    for p, q in zip(params, twins):
        torch.testing.assert_close(p, q, rtol=0, atol=0.1 * 2**-6)
        assert float((p != q).float().mean()) < 0.05


def test_muon_in_bf16_keeps_its_momentum() -> None:
    """Without Nesterov torch 2.13 divides the buffer itself by its norm, in bfloat16."""
    (p,) = optim_cases.parameters([(8, 6)], torch.bfloat16)
    ours = optim.Muon([p], nesterov=False, momentum=0.5)
    p.grad = torch.ones_like(p)
    ours.step()
    assert ours.state[p]["momentum_buffer"].eq(0.5).all()


@pytest.mark.parametrize("name", MATRIX)
def test_error_inputs(name: str) -> None:
    for error_input in INFOS[name].optim_error_inputs_func(device="cpu", dtype=torch.float32):
        optim_input = error_input.optimizer_error_input
        kwargs = dict(optim_input.kwargs)
        if issubclass(error_input.error_type, Warning):
            with (
                pytest.raises(ValueError, match="the same parameter twice"),
                pytest.warns(error_input.error_type),
            ):
                getattr(optim, name)(optim_input.params, **kwargs)
            continue
        with pytest.raises(error_input.error_type, match=error_input.error_regex):
            optimizer = getattr(optim, name)(optim_input.params, **kwargs)
            optimizer.step()


@pytest.mark.parametrize("name", MATRIX)
def test_state_dicts_swap(name: str) -> None:
    """Mid-run from torch to ours and back, and the refusal of another optimizer's."""
    params = optim_cases.parameters(SHAPES[name])
    twins = optim_cases.clones(params)
    want = getattr(torch.optim, name)(twins)
    got = None
    for stage, module in enumerate((torch.optim, optim, torch.optim, optim)):
        fresh = getattr(module, name)(params)
        if got is not None:
            fresh.load_state_dict(copy.deepcopy(got.state_dict()))
        got = fresh
        for step in range(3):
            optim_cases.set_gradients(10 * stage + step, params, twins)
            got.step()
            want.step()
    if name == "Muon":
        assert_same(got, want)
    for p, q in zip(params, twins):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    other = optim.Lion(optim_cases.clones(params))
    optim_cases.set_gradients(0, other.param_groups[0]["params"])
    other.step()
    with pytest.raises(ValueError, match="a state dict of another optimizer"):
        got.load_state_dict(other.state_dict())


@pytest.mark.parametrize("name", MATRIX)
def test_options_around_torchs_update(name: str) -> None:
    """Clipping, GradScaler's protocol, average, copy, mask, shrinkage and zeroing, all in one step."""
    params = optim_cases.parameters(SHAPES[name])
    twins = optim_cases.clones(params)
    ours = getattr(optim, name)(
        params, lr=0.01, max_grad_norm=1.0, ema_decay=0.9, l1=0.1, zero_grads=True
    )
    theirs = getattr(torch.optim, name)(twins, lr=0.01)
    at = next(i for i, p in enumerate(params) if p.dim() == 2)
    copied = torch.zeros(params[at].shape, dtype=torch.bfloat16)
    ours.set_copy(params[at], copied)
    before = [p.detach().clone() for p in params]
    optim_cases.set_gradients(0, params, twins)
    torch.nn.utils.clip_grad_norm_(twins, 1.0)
    for p in params:
        p.grad *= 8.0
    ours.grad_scale, ours.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    ours.step()
    theirs.step()
    for p, q, old in zip(params, twins, before):
        q = q.detach()
        want = q.sign() * (q.abs() - 0.001).clamp(min=0)
        torch.testing.assert_close(p.detach(), want, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(ours.state[p]["ema"], old + 0.1 * (p.detach() - old))
        assert not p.grad.any()
    assert optim_cases.same_bits(
        copied.reshape(-1), params[at].detach().to(torch.bfloat16).reshape(-1)
    )
    ours.set_mask(params[at], torch.arange(params[at].shape[1]).expand(params[at].shape) % 2 == 0)
    optim_cases.set_gradients(1, params)
    ours.step()
    assert not params[at].detach()[:, 1::2].any() and params[at].detach().any()


@pytest.mark.parametrize("name", MATRIX)
def test_skipped(name: str) -> None:
    """An overflow, told or found, leaves parameters and states as they are, the first step's too."""
    params = optim_cases.parameters(SHAPES[name])
    before = [p.detach().clone() for p in params]
    ours = getattr(optim, name)(params, skip_nonfinite=True)
    optim_cases.set_gradients(0, params)
    ours.found_inf = torch.ones(())
    ours.step()
    del ours.found_inf
    params[0].grad.view(-1)[0] = torch.nan
    ours.step()
    assert ours.skipped_steps == 2
    assert not any(v.any() for state in ours.state.values() for v in state.values())
    assert all(torch.equal(p, q) for p, q in zip(params, before))


def test_split_muon() -> None:
    model = torch.nn.Sequential(
        torch.nn.Embedding(11, 8),
        torch.nn.Linear(8, 6),
        torch.nn.LayerNorm(6),
        torch.nn.Linear(6, 3),
    )
    head = model[3].weight
    matrices, others = optim.split_muon(model, {"lr": 0.02}, {"lr": 0.003}, exclude=[head])
    assert [n for g in matrices.param_groups for n in g["param_names"]] == ["1.weight"]
    names = [n for g in others.param_groups for n in g["param_names"]]
    assert names == ["0.weight", "1.bias", "2.weight", "2.bias", "3.weight", "3.bias"]
    assert isinstance(others, optim.AdamW) and others.param_groups[0]["lr"] == 0.003
    model(torch.tensor([1, 2])).sum().backward()
    matrices.step()
    others.step()
    with pytest.raises(ValueError, match="got 1 and 0; take Muon or AdamW alone"):
        optim.split_muon(torch.nn.Linear(3, 3, bias=False))
