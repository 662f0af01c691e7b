"""As a drop-in: torch's own inputs and error inputs, state dicts both ways, schedulers, pickles, layouts."""

from __future__ import annotations

import copy
import io
import pickle

import optim_cases
import pytest
import torch
from torch.testing._internal.common_optimizers import optim_db

from trimtab import optim

TORCH = ("SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "RAdam", "Adamax")
INFOS = {info.optim_cls.__name__: info for info in optim_db if info.optim_cls.__name__ in TORCH}


def test_the_database_has_all_of_them() -> None:
    assert set(INFOS) == set(TORCH)


def test_classes() -> None:
    for name in TORCH:
        assert issubclass(getattr(optim, name), getattr(torch.optim, name))
    assert issubclass(optim.AdamW, optim.Adam)


@pytest.mark.parametrize("name", TORCH)
def test_groups_are_torchs(name: str) -> None:
    """The same defaults and keys of a param group, in the same order."""
    ours = getattr(optim, name)(optim_cases.parameters())
    theirs = getattr(torch.optim, name)(optim_cases.parameters())
    assert ours.defaults == theirs.defaults
    for a, b in zip(ours.param_groups, theirs.param_groups):
        assert list(a) == list(b)


@pytest.mark.parametrize("name", TORCH)
def test_inputs(name: str) -> None:
    """Every input of the database trains as torch's does, by forloop, foreach and fused."""
    info = INFOS[name]
    for optim_input in info.optim_inputs_func(device="cpu"):
        kwargs = dict(optim_input.kwargs)
        if kwargs.get("differentiable"):
            continue
        if isinstance(kwargs.get("lr"), torch.Tensor):
            kwargs["lr"] = kwargs["lr"].clone()
        params = optim_cases.parameters((10, 5, 5))
        twins = optim_cases.clones(params)
        ours = getattr(optim, name)(params, **kwargs)
        kwargs.pop("capturable", None)  # torch refuses it on the CPU
        kwargs.pop("foreach", None)
        theirs = getattr(torch.optim, name)(twins, **kwargs)
        for step in range(10):
            optim_cases.set_gradients(step, params, twins)
            ours.step()
            theirs.step()
        for p, q in zip(params, twins):
            torch.testing.assert_close(p, q, msg=lambda m, d=optim_input.desc: f"{name} {d}: {m}")


@pytest.mark.parametrize("name", TORCH)
def test_error_inputs(name: str) -> None:
    info = INFOS[name]
    for error_input in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        optim_input = error_input.optimizer_error_input
        kwargs = dict(optim_input.kwargs)
        if str(error_input.error_on) == "OptimizerErrorEnum.CONSTRUCTION_ERROR":
            kind = error_input.error_type
            if issubclass(kind, Warning):  # the same parameter twice: torch warns, ours refuses
                with (
                    pytest.raises(ValueError, match="the same parameter twice"),
                    pytest.warns(kind),
                ):
                    getattr(optim, name)(optim_input.params, **kwargs)
            else:
                with pytest.raises(kind, match=error_input.error_regex):
                    getattr(optim, name)(optim_input.params, **kwargs)
        else:
            optimizer = getattr(optim, name)(optim_input.params, **kwargs)
            with pytest.raises(error_input.error_type, match=error_input.error_regex):
                optimizer.step()


@pytest.mark.parametrize("through_file", [False, True])
@pytest.mark.parametrize("name", TORCH)
def test_state_dicts_swap(name: str, through_file: bool) -> None:
    """Mid-run from torch to ours and back: the continuation is that of a run that never changed."""
    fused = {"fused": True} if name in ("Adam", "AdamW", "Adagrad") else {"foreach": True}
    options = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    ours_class, torch_class = getattr(optim, name), getattr(torch.optim, name)

    def run(classes, params):
        optimizer = None
        for stage, (cls, extra) in enumerate(classes):
            fresh = cls(params, **options, **extra)
            if optimizer is not None:
                saved = optimizer.state_dict()
                if through_file:
                    file = io.BytesIO()
                    torch.save(saved, file)
                    file.seek(0)
                    saved = torch.load(file, weights_only=True)
                fresh.load_state_dict(saved)
            optimizer = fresh
            for step in range(5):
                optim_cases.set_gradients(10 * stage + step, params)
                optimizer.step()
        return optimizer

    params = optim_cases.parameters((64, 9, 1000))
    ours, theirs = (ours_class, {}), (torch_class, fused)
    want = run([theirs, theirs, theirs], optim_cases.clones(params))
    for order in ([theirs, ours, theirs], [ours, theirs, ours], [ours, ours, ours]):
        got = run(order, optim_cases.clones(params))
        for p, q in zip(got.param_groups[0]["params"], want.param_groups[0]["params"]):
            if name in ("Adam", "AdamW", "Adagrad", "SGD", "Adamax"):
                assert optim_cases.same_bits(p, q)
            else:
                torch.testing.assert_close(p, q)


@pytest.mark.parametrize("name", [*TORCH, "Lion"])
def test_pickle_and_deepcopy(name: str) -> None:
    params = optim_cases.parameters()
    ours = getattr(optim, name)(params, max_grad_norm=1.0, l1=0.1, ema_decay=0.9)
    optim_cases.set_gradients(0, params)
    ours.step()
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        theirs = again.param_groups[0]["params"]
        twins = optim_cases.clones(params)
        twin = getattr(optim, name)(twins, max_grad_norm=1.0, l1=0.1, ema_decay=0.9)
        twin.load_state_dict(copy.deepcopy(ours.state_dict()))  # torch would share
        optim_cases.set_gradients(1, theirs, twins)
        again.step()
        twin.step()
        optim_cases.assert_same(again, twin)


def test_closure_scheduler_and_hooks() -> None:
    params, twins = optim_cases.parameters((7, 30)), optim_cases.parameters((7, 30))
    ours, theirs = optim.AdamW(params, lr=0.1), torch.optim.AdamW(twins, lr=0.1, fused=True)
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=12) for o in (ours, theirs)
    ]
    calls: list[str] = []
    ours.register_step_pre_hook(lambda *_: calls.append("pre"))
    ours.register_step_post_hook(lambda *_: calls.append("post"))

    def closure(optimizer, tensors):
        def compute():
            optimizer.zero_grad()
            loss = sum((t**2).sum() for t in tensors)
            loss.backward()
            return loss

        return compute

    for _ in range(10):
        assert ours.step(closure(ours, params)) == theirs.step(closure(theirs, twins))
        for schedule in schedules:
            schedule.step()
    assert calls == ["pre", "post"] * 10
    optim_cases.assert_same(ours, theirs)


def test_tensor_lr_changes_in_place() -> None:
    params, twins = optim_cases.parameters(), optim_cases.parameters()
    lr, other = torch.tensor(0.1), torch.tensor(0.1)
    ours, theirs = optim.Adam(params, lr=lr), torch.optim.Adam(twins, lr=other, fused=True)
    for step in range(5):
        optim_cases.set_gradients(step, params, twins)
        lr *= 0.5
        other *= 0.5
        ours.step()
        theirs.step()
    optim_cases.assert_same(ours, theirs)


def test_groups_come_and_hyper_parameters_change() -> None:
    params, twins = optim_cases.parameters(), optim_cases.parameters()
    ours, theirs = optim.AdamW(params[:3]), torch.optim.AdamW(twins[:3], fused=True)
    for step in range(8):
        if step == 2:
            ours.add_param_group({"params": params[3:], "betas": (0.8, 0.9)})
            theirs.add_param_group({"params": twins[3:], "betas": (0.8, 0.9)})
        if step == 4:
            for o in (ours, theirs):
                o.param_groups[1].update(lr=0.2, weight_decay=0.5, maximize=True)
        if step == 6:  # states and parameters replaced behind the optimizer's back
            for o, ps in ((ours, params), (theirs, twins)):
                o.state[ps[0]]["exp_avg"] = o.state[ps[0]]["exp_avg"].clone() * 2
                o.state[ps[1]] = copy.deepcopy(o.state[ps[1]])
                ps[2].data = ps[2].data.clone() + 1
                o.state[ps[2]]["exp_avg_sq"].data = o.state[ps[2]]["exp_avg_sq"].clone() * 3
        optim_cases.set_gradients(step, params, twins)
        ours.step()
        theirs.step()
    optim_cases.assert_same(ours, theirs)


LAYOUTS = {
    "channels_last": lambda x: x.reshape(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "transposed": lambda x: x.reshape(10, 12).t(),
    "every other column": lambda x: x.reshape(10, 12)[:, ::2],
    "scalar": lambda x: x[0],
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("gradient", ["like the parameter", "contiguous", "strided"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, gradient: str) -> None:
    make = LAYOUTS[layout]
    p = torch.nn.Parameter(make(torch.randn(120, generator=torch.Generator().manual_seed(0))))
    q = torch.nn.Parameter(p.detach().contiguous())
    ours = optim.AdamW([p], zero_grads=True, max_grad_norm=1.0)
    plain = optim.AdamW([q], max_grad_norm=1.0, torch_tails=False)
    ours.torch_tails = False
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        q.grad = torch.randn(p.shape, generator=generator)
        if gradient == "like the parameter":
            p.grad = torch.empty_like(p).copy_(q.grad)
        elif gradient == "contiguous":
            p.grad = q.grad.clone()
        else:
            p.grad = torch.stack([q.grad, q.grad], -1)[..., 0]
        ours.step()
        plain.step()
        assert not p.grad.any()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_many_views_of_one_buffer() -> None:
    """Neighbours in one allocation do not overlap."""
    flat = torch.zeros(100)
    params = [torch.nn.Parameter(x) for x in flat.split(7)]
    for p in params:
        p.grad = torch.ones_like(p)
    optim.SGD(params, lr=1.0).step()
    assert torch.equal(flat, -torch.ones(100))


def test_step_is_seen_by_autograd() -> None:
    """A parameter that a graph saved and a step changed is an error in backward, as with torch's."""
    p = torch.nn.Parameter(torch.ones(3))
    loss = (p * p).sum()
    p.grad = torch.ones(3)
    optim.SGD([p], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_versions_of_what_was_stepped() -> None:
    """Counted up where there is a gradient, by either way to do so; an inference tensor has none."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(4)]
    ours = optim.SGD(params, lr=0.1)
    for p in params[1::2]:
        p.grad = torch.ones(3)
    before = [p._version for p in params]
    ours.step()
    assert [p._version - v for p, v in zip(params, before)] == [0, 1, 0, 1]
    with torch.inference_mode():
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        optim.SGD([p], lr=0.1).step()
    assert torch.equal(p, torch.full((3,), 0.9))


def test_a_state_of_the_users_own() -> None:
    """An entry that is no parameter's stays, and a replaced state is found at the next step."""
    p = torch.nn.Parameter(torch.ones(3))
    ours = optim.SGD([p], lr=1.0, momentum=0.5)
    ours.state["note"] = "mine"
    p.grad = torch.ones(3)
    ours.step()
    plan = ours._plan
    ours.step()
    assert ours._plan is plan
    ours.state[p]["momentum_buffer"] = torch.zeros(3)
    before = p.detach().clone()
    ours.step()
    assert torch.equal(before - p, p.grad)
    assert ours.state["note"] == "mine"
