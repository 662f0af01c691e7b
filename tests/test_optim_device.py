"""Optimizers on a GPU, as far as there need be none: their steps run on the SIMT machine."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import cuda_sim
import numpy as np
import optim_cases
import optim_on_sim
import pytest
import simt_build
import torch
from torch import Tensor

from trimtab import optim
from trimtab.ops import backend
from trimtab.optim import device, library
from trimtab.optim.plan import Plan, Run

pytestmark = pytest.mark.skipif(
    shutil.which(simt_build.compiler()) is None, reason="no C++ compiler"
)

SIZES: tuple[Any, ...] = (1, 7, (3, 11), 1030, 2500)


@pytest.fixture
def gpu() -> Any:
    with optim_on_sim.as_gpu(cuda_sim.Simulator(seed=1)) as gpu:
        yield gpu


def make(name: str, params: list[Tensor], **options: Any) -> Any:
    return getattr(optim, name)(params, **options)


def compare(
    gpu: optim_on_sim.Gpu,
    name: str = "AdamW",
    steps: int = 3,
    dtype: torch.dtype = torch.float32,
    sizes: Any = SIZES,
    prepare: Callable[[Any], None] | None = None,
    between: Callable[[Any, int], None] | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """The optimizer on the simulator and on the CPU: the same bits after some steps."""
    params = optim_cases.parameters(sizes, dtype)
    twins = optim_cases.clones(params)
    ours, theirs = make(name, params, **options), make(name, twins, **options)
    for optimizer in (ours, theirs):
        if prepare is not None:
            prepare(optimizer)
    for step in range(steps):
        optim_cases.set_gradients(step, params, twins)
        for optimizer in (ours, theirs):
            if between is not None:
                between(optimizer, step)
        ours.step()
        on_cpu(theirs.step)
        for p, q in zip(params, twins, strict=True):
            assert torch.equal(p.grad, q.grad)
    optim_cases.assert_same(ours, theirs)
    assert ours.skipped_steps == theirs.skipped_steps
    assert isinstance(ours._plan.runs[0].runner, device.CudaRunner)
    assert isinstance(theirs._plan.runs[0].runner, device.HostRunner)
    return ours, theirs


def on_cpu(step: Callable[[], Any]) -> None:
    whole = device.runner
    device.runner = lambda name, place: device.HostRunner()
    try:
        step()
    finally:
        device.runner = whole


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"momentum": 0.9, "dampening": 0.3, "lr": 0.1}),
        ("AdamW", {"amsgrad": True}),
        ("NAdam", {"weight_decay": 0.1}),
        ("RMSprop", {"centered": True, "momentum": 0.5}),
        ("Adagrad", {"initial_accumulator_value": 0.1}),
        ("Lion", {}),
    ],
    ids=optim_cases.ident,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_step(gpu: Any, name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    compare(gpu, name, dtype=dtype, **options)


MEMORY: tuple[tuple[str, torch.dtype, dict[str, Any]], ...] = (
    ("AdamW", torch.float32, {"state_dtype": "int8"}),
    ("AdamW", torch.bfloat16, {"state_dtype": "int8", "rounding": "stochastic", "seed": 5}),
    ("AdamW", torch.bfloat16, {"rounding": "stochastic", "amsgrad": True}),
    ("AdamW", torch.bfloat16, {"master": "remainder", "state_dtype": "int8"}),
    ("AdamW", torch.bfloat16, {"master": "remainder", "ema_decay": 0.9, "l1": 0.01}),
    ("AdamW", torch.bfloat16, {"master": "kahan", "state_dtype": "bf16", "rounding": "stochastic"}),
    ("RMSprop", torch.float32, {"centered": True, "momentum": 0.9, "state_dtype": "int8"}),
    ("SGD", torch.float32, {"momentum": 0.9, "dampening": 0.5, "state_dtype": "int8"}),
    ("Adagrad", torch.float16, {"state_dtype": "int8", "initial_accumulator_value": 0.1}),
    ("NAdam", torch.float32, {"state_dtype": "bf16", "rounding": "stochastic"}),
    ("Lion", torch.bfloat16, {"master": "kahan", "state_dtype": "int8", "ema_decay": 0.5}),
)


@pytest.mark.parametrize(
    ("name", "dtype", "options"), MEMORY, ids=lambda value: optim_cases.ident(value)
)
def test_smaller_formats(gpu: Any, name: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    def prepare(optimizer: Any) -> None:
        param = optimizer.param_groups[0]["params"][3]
        optimizer.set_mask(param, torch.arange(param.numel()) % 5 > 0)

    compare(gpu, name, 2, dtype, (1, 300, 1024, 2049), prepare, min_8bit_numel=256, **options)
    assert gpu.sim.launches == 2 * 2


def test_codes_that_begin_anywhere(gpu: Any) -> None:
    """Parameters inside one long array: not aligned, but the codes' blocks start with each."""
    whole = [torch.randn(4000) for _ in range(2)]
    whole[1].copy_(whole[0])
    lists = [[torch.nn.Parameter(w[a:b]) for a, b in ((1, 1100), (1100, 2500))] for w in whole]
    ours, theirs = (optim.AdamW(p, state_dtype="int8", min_8bit_numel=1) for p in lists)
    for step in range(2):
        optim_cases.set_gradients(step, *lists)
        lists[0][1].grad[7] = lists[1][1].grad[7] = 1e30  # of its block all else is coded as 0
        ours.step()
        on_cpu(theirs.step)
    optim_cases.assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"always_adapt": True, "weight_decay": 0.0, "max_grad_norm": 1.0, "zero_grads": True},
        {"state_dtype": "int8", "rounding": "stochastic", "min_8bit_numel": 1000},
    ],
    ids=optim_cases.ident,
)
def test_lamb(gpu: Any, dtype: torch.dtype, options: dict[str, Any]) -> None:
    def prepare(optimizer: Any) -> None:
        param = optimizer.param_groups[0]["params"][2]
        optimizer.set_mask(param, torch.arange(param.numel()) % 3 > 0)

    def between(optimizer: Any, step: int) -> None:
        large = optimizer.param_groups[0]["params"][0].grad
        large[-1] = 3e38 if step == 1 else 1.0  # its square is no fp32

    sizes = (9000, 1, 700, 4096)
    compare(gpu, "LAMB", 2, dtype, sizes, prepare, between, **options)
    assert gpu.sim.launches == 2 * 3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_grad_norm": 1.0},
        {"max_grad_norm": 1.0, "norm_estimate": 8.0},
        {"skip_nonfinite": True},
    ],
    ids=optim_cases.ident,
)
def test_lamb_of_many_tensors(options: dict[str, Any]) -> None:
    """More of them than threads of a block, and more blocks than run at once on one processor."""

    def between(optimizer: Any, step: int) -> None:
        if step == 1 and "skip_nonfinite" in options:
            optimizer.param_groups[0]["params"][3].grad[0] = torch.inf

    sizes = (700, *(1 + i % 5 for i in range(150)), 40_000)
    with optim_on_sim.as_gpu(cuda_sim.Simulator(sm_count=1, seed=4)) as gpu:
        ours, _ = compare(gpu, "LAMB", 2, sizes=sizes, between=between, **options)
    assert gpu.sim.launches == 2 * 3
    assert ours.skipped_steps == ("skip_nonfinite" in options)


@pytest.mark.parametrize("name", ["LAMB", *optim_cases.OPTIONS])
def test_at_most_three_launches(gpu: Any, name: str) -> None:
    """Whatever is folded in."""
    options = {"max_grad_norm": 1.0, "skip_nonfinite": True, "ema_decay": 0.9, "zero_grads": True}
    compare(gpu, name, 1, sizes=(5, 300), lr=0.01, **options)
    assert gpu.sim.launches <= 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_clipped_as_torch_rounds(gpu: Any, dtype: torch.dtype) -> None:
    options = {"max_grad_norm": 0.7, "clip_rounding": "torch", "maximize": True}
    compare(gpu, "SGD", dtype=dtype, lr=0.1, momentum=0.9, **options)


def test_many_tensors(gpu: Any) -> None:
    sizes = [1 + i % 7 for i in range(2000)]
    ours, _ = compare(gpu, sizes=sizes, steps=2, max_grad_norm=1.0)
    assert gpu.sim.launches == 2 * 3
    assert float(ours.grad_norm) > 1.0


def test_folded_in(gpu: Any) -> None:
    """Clipping, EMA, masks, copies, l1, zeroed gradients, a GradScaler's tensors; an overflow between."""
    copies: dict[int, list[Tensor]] = {}

    def prepare(optimizer: Any) -> None:
        params = optimizer.param_groups[0]["params"]
        optimizer.set_mask(params[3], torch.arange(params[3].numel()) % 3 > 0)
        copies[id(optimizer)] = [torch.zeros_like(p, dtype=torch.bfloat16) for p in params[2:]]
        for param, copy in zip(params[2:], copies[id(optimizer)], strict=True):
            optimizer.set_copy(param, copy)

    def between(optimizer: Any, step: int) -> None:
        optimizer.grad_scale = torch.tensor([8.0])
        optimizer.found_inf = torch.tensor(float(step == 1))

    options = {"max_grad_norm": 0.5, "ema_decay": 0.9, "l1": 0.01, "zero_grads": True}
    ours, theirs = compare(gpu, steps=4, prepare=prepare, between=between, **options)
    assert ours.skipped_steps == 1
    assert torch.equal(ours.grad_norm, theirs.grad_norm)
    for a, b in zip(copies[id(ours)], copies[id(theirs)], strict=True):
        assert torch.equal(a, b)
    assert "ema" in ours.state[ours.param_groups[0]["params"][0]]


def test_skip_nonfinite_on_the_first_step(gpu: Any) -> None:
    """A momentum buffer that was never filled is not taken for a filled one."""

    def between(optimizer: Any, step: int) -> None:
        if step == 0:
            optimizer.param_groups[0]["params"][1].grad[0] = torch.inf

    options = {"momentum": 0.9, "dampening": 0.5, "skip_nonfinite": True, "zero_grads": True}
    ours, _ = compare(gpu, "SGD", lr=0.1, between=between, **options)
    assert ours.skipped_steps == 1


def test_groups_and_changing_rates(gpu: Any) -> None:
    def prepare(optimizer: Any) -> None:
        whole = optimizer.param_groups[0]
        last = whole["params"].pop()
        optimizer.add_param_group({"params": [last], "lr": 0.5, "weight_decay": 0.0})

    def between(optimizer: Any, step: int) -> None:
        optimizer.param_groups[1]["lr"] = 0.5 / (step + 1)

    compare(gpu, prepare=prepare, between=between)


def test_rate_on_the_device(gpu: Any) -> None:
    """A tensor lr is read by the kernel: no table is made anew for it."""
    params, lr = optim_cases.parameters(SIZES), torch.tensor(0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    ours = optim.SGD(params, lr=lr)
    rates = []
    for rate in (0.5, 0.25):
        lr.fill_(rate)
        before = params[0].detach().clone()
        # A CPU's tensor is read on the host; the simulator's has no other.
        ours.param_groups[0]["lr"] = Elsewhere(lr)
        ours.step()
        rates.append(float(before - params[0].detach()))
    assert rates == pytest.approx([0.5, 0.25])
    assert gpu.uploads == 1


class Elsewhere(torch.Tensor):
    """A tensor that says it is on a GPU."""

    @staticmethod
    def __new__(cls, data: Tensor) -> Elsewhere:
        return data.as_subclass(cls)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")


def test_a_table_serves_until_a_pointer_changes(gpu: Any) -> None:
    params = optim_cases.parameters(SIZES)
    ours = optim.AdamW(params)
    optim_cases.set_gradients(0, params)
    for _ in range(3):
        ours.step()
    assert (gpu.uploads, gpu.allocations) == (1, 2)
    params[0].grad = params[0].grad.clone()
    ours.step()
    assert (gpu.uploads, gpu.allocations) == (2, 2)  # into the same memory
    params[1].grad = None
    ours.step()
    assert gpu.uploads == 3
    gpu.current = 8  # another stream: steps on the first may still read theirs
    ours.step()
    assert (gpu.uploads, gpu.allocations) == (4, 4)


def test_capture(gpu: Any) -> None:
    """Under capture: a table from a pinned buffer that was there before, kept for the replays."""
    params = optim_cases.parameters(SIZES)
    ours = optim.AdamW(params)
    optim_cases.set_gradients(0, params)
    gpu.captures = True
    with pytest.raises(
        RuntimeError, match="a CUDA graph is being captured; expected a step of the"
    ):
        ours.step()
    gpu.captures = False
    ours.step()
    kept = len(device._captured)
    for _ in range(device.RESERVE):
        optim_cases.set_gradients(1, params)
        gpu.captures = True
        ours.step()
        gpu.captures = False
    assert len(device._captured) == kept + device.RESERVE
    eager = ours._plan.runs[0].runner.buffers
    assert all(host.data_ptr() != eager.table.data_ptr() for host in device._captured[kept:])
    optim_cases.set_gradients(2, params)
    ours.step()
    assert len(ours._plan.runs[0].runner.reserve) == device.RESERVE


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"skip_nonfinite": True}], ids=str)
def test_two_devices(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """A call a device, and one norm; the other one is the CPU."""
    params = optim_cases.parameters(SIZES)
    twins = optim_cases.clones(params)
    ours, theirs = optim.AdamW(params, **options), optim.AdamW(twins, **options)
    sim = optim_on_sim.Gpu(cuda_sim.Simulator(seed=2))

    def runs(plan: Any) -> list[Any]:
        away = np.arange(len(plan.params)) % 2 == 0
        groups = np.zeros(1, library.GROUP)
        return [
            Run(torch.device("cpu"), device.CudaRunner(sim, sim), away, groups, {}),
            Run(torch.device("cpu"), device.HostRunner(), ~away, groups.copy(), {}),
        ]

    for step in range(3):
        optim_cases.set_gradients(step, params, twins)
        if step == 1 and "skip_nonfinite" in options:
            for p in (params, twins):
                p[0].grad[0] = torch.nan
        with monkeypatch.context() as patch:
            patch.setattr(Plan, "_make_runs", runs)
            ours.step()
        theirs.step()
    assert len(ours._plan.runs) == 2 and sim.sim.launches > 0
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert ours.skipped_steps == theirs.skipped_steps == ("skip_nonfinite" in options)


def test_gaps_and_irregular_gradients(gpu: Any) -> None:
    """A parameter with gaps between its elements, a gradient of other strides."""
    wide = torch.randn(8, 6)
    whole = [torch.nn.Parameter(wide.clone()[:, ::2]), torch.nn.Parameter(torch.randn(4, 5))]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in whole]
    ours, theirs = optim.AdamW(whole), optim.AdamW(twins)
    for step in range(2):
        optim_cases.set_gradients(step, whole, twins)
        whole[1].grad = whole[1].grad.t().contiguous().t()
        ours.step()
        on_cpu(theirs.step)
    for p, q in zip(whole, twins, strict=True):
        assert torch.equal(p, q)


def test_state_dicts_go_both_ways(gpu: Any) -> None:
    params = optim_cases.parameters(SIZES)
    twins = optim_cases.clones(params)
    ours, theirs = optim.AdamW(params), torch.optim.AdamW(twins, fused=True)
    for step in range(4):
        optim_cases.set_gradients(step, params, twins)
        ours.step()
        theirs.step()
        if step == 1:
            a, b = ours.state_dict(), theirs.state_dict()
            ours, theirs = optim.AdamW(params), torch.optim.AdamW(twins, fused=True)
            ours.load_state_dict(b)
            theirs.load_state_dict({**a, "param_groups": b["param_groups"]})
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p, q)


# --- who answers


CUDA = torch.device("cuda", 0)


def test_a_cpu_is_served_by_cpp() -> None:
    assert isinstance(device.runner("AdamW", torch.device("cpu")), device.HostRunner)


@pytest.mark.parametrize(
    ("forced", "message"),
    [
        ("cpu", "AdamW: expected tensors on the CPU, as TRIMTAB_BACKEND=cpu says, got cuda:0"),
        ("reference", "AdamW: optimizers have no NumPy reference"),
        ("cuda", "AdamW: TRIMTAB_BACKEND=cuda: none here"),
    ],
)
def test_forced_backend(monkeypatch: pytest.MonkeyPatch, forced: str, message: str) -> None:
    monkeypatch.setattr(backend, "FORCED", forced)
    monkeypatch.setattr(backend, "cuda_problem", lambda: "none here")
    with pytest.raises(RuntimeError, match=message):
        device.runner("AdamW", CUDA)


def test_neither_cuda_nor_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "FORCED", "")
    monkeypatch.setattr(backend, "cuda_problem", lambda: "none here")
    with pytest.raises(RuntimeError, match="AdamW: expected tensors on a CPU or a GPU, got meta"):
        device.runner("AdamW", torch.device("meta"))


def test_gradient_on_another_device() -> None:
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = optim.AdamW([param])
    param.grad = torch.ones(3)
    optimizer.step()
    param.grad = None
    main = torch.nn.Parameter(torch.zeros(3))
    main.main_grad = torch.ones(3, device="meta")
    optimizer = optim.AdamW([main], main_grads=True)
    with pytest.raises(
        RuntimeError, match=r"expected a gradient of shape \[3\] on cpu, got \[3\] on"
    ):
        optimizer.step()
