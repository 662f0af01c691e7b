"""Optimizers on a GPU against the CPU's: the same bits. Runs where there is one (`make gpu`).

Inputs are fresh at every run, as in test_gpu_int8.py; memory that tables, workspaces and states may get is
filled with NaN before.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import optim_cases
import pytest
import torch
from torch import Tensor

from trimtab import optim
from trimtab.ops import backend
from trimtab.optim import device

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16)
# One tile is 1024 elements, a partial sum of the norm 4096; 300_000 is several pieces on any GPU.
SIZES: tuple[Any, ...] = (1, 7, (3, 11), 1024, 1031, 5000, 300_000)


@pytest.fixture
def fresh() -> torch.Generator:
    seed = int(os.environ.get("TRIMTAB_SEED", time.time_ns() % 2**62))
    print(f"TRIMTAB_SEED={seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """What torch's allocator hands out next holds NaN."""
    sizes = [2**k for k in range(9, 26, 2)]
    blocks = [torch.full((size // 4,), float("nan"), device="cuda") for size in sizes * 2]
    del blocks
    yield
    torch.cuda.synchronize()  # a fault belongs to the test that made it


class Twins:
    """An optimizer of parameters on the GPU, and one of the same parameters on the CPU."""

    def __init__(
        self,
        name: str,
        fresh: torch.Generator,
        dtype: torch.dtype = torch.float32,
        sizes: Sequence[Any] = SIZES,
        **options: Any,
    ) -> None:
        self.fresh = fresh
        tensors = [torch.randn(n, generator=fresh).to(dtype) for n in sizes]
        self.params = [torch.nn.Parameter(t.cuda()) for t in tensors]
        self.twins = [torch.nn.Parameter(t.clone()) for t in tensors]
        self.ours = getattr(optim, name)(self.params, **options)
        self.theirs = getattr(optim, name)(self.twins, **options)

    def both(self) -> tuple[Any, Any]:
        return self.ours, self.theirs

    def set_gradients(self, scale: float = 1.0) -> None:
        for p, q in zip(self.params, self.twins, strict=True):
            grad = torch.randn(q.shape, generator=self.fresh).mul(scale).to(q.dtype)
            q.grad = grad
            p.grad = grad.cuda()

    def step(self, scale: float = 1.0, prepare: Callable[[Any], None] | None = None) -> None:
        self.set_gradients(scale)
        for optimizer in self.both():
            if prepare is not None:
                prepare(optimizer)
            optimizer.step()

    def check(self) -> None:
        for i, (p, q) in enumerate(zip(self.params, self.twins, strict=True)):
            assert_same(p, q, f"parameter {i}")
            assert_same(p.grad, q.grad, f"gradient {i}")
            states = self.ours.state[p], self.theirs.state[q]
            assert states[0].keys() == states[1].keys()
            for key, value in states[1].items():
                assert_same(states[0][key], value, f"{key} of parameter {i}")
        assert self.ours.skipped_steps == self.theirs.skipped_steps


def assert_same(a: Tensor, b: Tensor, what: str) -> None:
    assert a.is_cuda, what
    same = torch.isnan(b) & torch.isnan(a.cpu()) if b.is_floating_point() else False
    differ = (a.detach().cpu() != b.detach()) & ~torch.as_tensor(same)
    assert not differ.any(), f"{what} [{b.numel()}]: {int(differ.sum())} differ"


CASES = [(name, options) for name, rows in optim_cases.OPTIONS.items() for options in rows]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "options"), CASES, ids=optim_cases.ident)
def test_step(name: str, options: dict[str, Any], dtype: torch.dtype, fresh: Any) -> None:
    twins = Twins(name, fresh, dtype, **options)
    for _ in range(3):
        twins.step()
    twins.check()


MEMORY: tuple[tuple[str, torch.dtype, dict[str, Any]], ...] = (
    ("AdamW", torch.float32, {"state_dtype": "int8"}),
    ("AdamW", torch.float32, {"state_dtype": "int8", "rounding": "stochastic", "amsgrad": True}),
    ("AdamW", torch.float32, {"state_dtype": "bf16", "rounding": "stochastic"}),
    ("AdamW", torch.bfloat16, {"state_dtype": "fp32", "rounding": "stochastic"}),
    ("AdamW", torch.bfloat16, {"master": "remainder", "state_dtype": "int8", "ema_decay": 0.9}),
    ("AdamW", torch.bfloat16, {"master": "kahan", "state_dtype": "bf16"}),
    ("SGD", torch.float32, {"momentum": 0.9, "state_dtype": "int8"}),
    ("Adagrad", torch.float16, {"state_dtype": "int8"}),
    ("RMSprop", torch.float32, {"centered": True, "momentum": 0.9, "state_dtype": "int8"}),
    ("Lion", torch.bfloat16, {"master": "remainder", "state_dtype": "int8"}),
    ("LAMB", torch.float32, {}),
    ("LAMB", torch.bfloat16, {"max_grad_norm": 0.5, "always_adapt": True}),
    ("LAMB", torch.float32, {"state_dtype": "int8", "rounding": "stochastic"}),
)


@pytest.mark.parametrize(("name", "dtype", "options"), MEMORY, ids=optim_cases.ident)
def test_smaller_formats(
    name: str, dtype: torch.dtype, options: dict[str, Any], fresh: Any
) -> None:
    needs_cuda()
    seed = int(torch.randint(0, 2**31, (1,), generator=fresh))
    twins = Twins(name, fresh, dtype, min_8bit_numel=256, seed=seed, **options)
    for _ in range(3):
        twins.step()
    twins.check()


# Vectors, batches of small matrices, tiles of 64 x 512, several parts of a mean (1024 rows).
SHAPES: tuple[Any, ...] = (
    (1,), (5000,), (3, 11), (50, 40, 3, 3), (64, 8), (70, 520), (2, 300, 700), (2100, 3), (513, 1031), (2048, 4104),
)  # fmt: skip
ADAFACTOR: tuple[tuple[torch.dtype, dict[str, Any]], ...] = (
    (torch.float32, {}),
    (torch.bfloat16, {"max_grad_norm": 0.5, "weight_decay": 0.1, "ema_decay": 0.9}),
    (torch.float16, {"maximize": True, "zero_grads": True, "state_dtype": "float32"}),
    (torch.bfloat16, {"rounding": "stochastic", "skip_nonfinite": True}),
    (torch.bfloat16, {"master": "remainder", "state_dtype": "float32"}),
)


@pytest.mark.parametrize(("dtype", "options"), ADAFACTOR, ids=optim_cases.ident)
def test_adafactor(dtype: torch.dtype, options: dict[str, Any], fresh: Any) -> None:
    needs_cuda()
    twins = Twins("Adafactor", fresh, dtype, SHAPES, **options)
    mask = torch.randint(0, 3, (70, 520), generator=fresh) > 0
    for optimizer in twins.both():
        param = optimizer.param_groups[0]["params"][5]
        optimizer.set_mask(param, mask.to(param.device))
    for _ in range(3):
        twins.step()
    twins.check()


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"weight_decay": 0.1}),
        (torch.bfloat16, {"max_grad_norm": 0.5, "l1": 0.01}),
        ADAFACTOR[2],
    ],
    ids=optim_cases.ident,
)
def test_adafactor_in_triton(
    dtype: torch.dtype, options: dict[str, Any], fresh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which has no masks, averages, masters nor stochastic rounding."""
    if backend.FORCED == "cuda":
        pytest.skip("TRIMTAB_BACKEND=cuda")
    monkeypatch.setattr(device, "why_not_cuda", lambda _: "the test asks for Triton")
    twins = Twins("Adafactor", fresh, dtype, SHAPES, **options)
    for _ in range(3):
        twins.step()
    (run,) = twins.ours._plan.runs
    assert type(run.runner.functions).__module__ == "trimtab.kernels.adafactor"
    twins.check()


def test_adafactor_waits_for_nothing_and_is_captured(fresh: Any) -> None:
    needs_cuda()
    twins = Twins("Adafactor", fresh, sizes=SHAPES, max_grad_norm=1.0)
    twins.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        twins.ours.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    twins.theirs.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        twins.ours.step()
    replay_three(graph, twins)


def replay_three(graph: torch.cuda.CUDAGraph, twins: Twins) -> None:
    """Steps of the graph, whose gradients are written between them, and of the twin on the CPU."""
    static = [p.grad for p in twins.params]
    for _ in range(3):
        twins.set_gradients()
        for p, grad in zip(twins.params, static, strict=True):
            grad.copy_(p.grad)
            p.grad = grad
        graph.replay()
        twins.theirs.step()
    twins.check()


def needs_cuda() -> None:
    if problem := device.why_not_cuda(torch.device("cuda", 0)):
        pytest.skip(f"CUDA C++ alone: {problem}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounding", ["folded", "torch"])
def test_folded_in(rounding: str, dtype: torch.dtype, fresh: Any) -> None:
    """Unscaling, skipping, clipping, l1, masks, averages, copies, zeroed gradients."""
    if rounding == "torch":
        needs_cuda()
    options = {"max_grad_norm": 0.5, "l1": 0.01, "ema_decay": 0.9, "zero_grads": True}
    twins = Twins("AdamW", fresh, dtype, clip_rounding=rounding, **options)
    mask, copies = torch.randint(0, 3, (5000,), generator=fresh) > 0, []
    for optimizer in twins.both():
        param = optimizer.param_groups[0]["params"][5]
        optimizer.set_mask(param, mask.to(param.device))
        copies.append(torch.zeros_like(param, dtype=torch.float16))
        optimizer.set_copy(param, copies[-1])
    for step in range(4):

        def prepare(optimizer: Any, step: int = step) -> None:
            place = optimizer.param_groups[0]["params"][0].device
            optimizer.grad_scale = torch.tensor(1024.0, device=place)
            optimizer.found_inf = torch.tensor(float(step == 2), device=place)

        twins.step(1024.0, prepare)
    twins.check()
    assert twins.ours.skipped_steps == 1
    assert_same(copies[0], copies[1], "copy")
    assert_same(twins.ours.grad_norm, twins.theirs.grad_norm, "norm")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_skip_nonfinite(bad: float, fresh: Any) -> None:
    """On the first step: the momentum buffer holds nothing yet."""
    twins = Twins("SGD", fresh, momentum=0.9, dampening=0.5, skip_nonfinite=True)
    twins.set_gradients()
    for params in (twins.params, twins.twins):
        params[-1].grad[-1] = bad
    for optimizer in twins.both():
        optimizer.step()
    assert twins.ours.skipped_steps == 1
    for _ in range(2):
        twins.step()
    twins.check()


def test_grad_scaler(fresh: Any) -> None:
    """torch's own, its tensors read on the device; an overflow is skipped and the scale halved."""
    twins = Twins("AdamW", fresh)
    scalers = [torch.amp.GradScaler(kind, init_scale=2.0**10) for kind in ("cuda", "cpu")]
    for step in range(3):
        twins.set_gradients(2.0**10)
        if step == 1:
            for params in (twins.params, twins.twins):
                params[2].grad[0] = torch.inf
        for scaler, optimizer in zip(scalers, twins.both(), strict=True):
            scaler.scale(torch.zeros((), device=optimizer.param_groups[0]["params"][0].device))
            scaler.step(optimizer)
            scaler.update()
    twins.check()
    assert twins.ours.skipped_steps == 1 and scalers[0].get_scale() == 2.0**9


def test_many_tensors(fresh: Any) -> None:
    sizes = torch.randint(1, 200, (2000,), generator=fresh).tolist()
    twins = Twins("AdamW", fresh, sizes=sizes, max_grad_norm=1.0)
    for _ in range(2):
        twins.step()
    twins.check()


def test_random_sizes(fresh: Any) -> None:
    """Views into one array, so that each has another alignment."""
    sizes = torch.randint(0, 9000, (40,), generator=fresh).tolist()
    for dtype in DTYPES:
        whole = torch.randn(sum(sizes), generator=fresh).to(dtype)
        lists = [
            [torch.nn.Parameter(part) for part in copy.split(sizes)]
            for copy in (whole.cuda(), whole.clone())
        ]
        twins = Twins("AdamW", fresh, sizes=())
        twins.params, twins.twins = lists
        twins.ours, twins.theirs = (optim.AdamW(p, max_grad_norm=3.0) for p in lists)
        for _ in range(2):
            twins.step()
        twins.check()


def test_more_than_2_to_the_31_elements() -> None:
    n = 2**31 + 12_345
    if torch.cuda.mem_get_info()[0] < 4.5 * n:
        pytest.skip("not enough memory")
    param = torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16, device="cuda"))
    param.grad = torch.full_like(param, 2.0)
    optim.SGD([param], lr=0.25).step()
    assert int((param != 0.5).sum()) == 0


# --- how a step is made


def test_nothing_waits_and_three_launches(fresh: Any) -> None:
    twins = Twins("AdamW", fresh, max_grad_norm=1.0, skip_nonfinite=True)
    twins.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        twins.ours.step()  # the same gradients: the same table
        for param in twins.params:
            param.grad = param.grad.clone()
        twins.ours.step()  # another table, copied without waiting
    finally:
        torch.cuda.set_sync_debug_mode("default")
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        twins.ours.step()
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert 1 <= len([name for name in kernels if "optim_" in name]) <= 3, kernels


def test_rate_on_the_device(fresh: Any) -> None:
    lr = torch.tensor(0.1, device="cuda")
    twins = Twins("AdamW", fresh)
    twins.ours = optim.AdamW(twins.params, lr=lr)
    for rate in (0.5, 0.0625, 0.25):
        lr.fill_(rate)
        twins.theirs.param_groups[0]["lr"] = rate
        twins.step()
    twins.check()


def test_captured_step(fresh: Any) -> None:
    """A graph of step() alone: gradients are written between replays."""
    needs_cuda()
    twins = Twins("AdamW", fresh, max_grad_norm=1.0)
    twins.step()
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=side):
        twins.ours.step()
    replay_three(graph, twins)


def test_captured_training(fresh: Any) -> None:
    """Forward, backward and step in one graph, whose gradients lie in the graph's own memory."""
    needs_cuda()
    torch.manual_seed(int(torch.randint(0, 2**31, (1,), generator=fresh)))
    model = torch.nn.Linear(64, 64).cuda()
    twin = torch.nn.Linear(64, 64).cuda()
    twin.load_state_dict(model.state_dict())
    ours, theirs = optim.AdamW(model.parameters()), optim.AdamW(twin.parameters())
    x = torch.randn(32, 64, generator=fresh).cuda()

    def train(module: Any, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=True)
        module(x).square().mean().backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            train(model, ours)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train(model, ours)
    for _ in range(3):
        graph.replay()
    for _ in range(6):
        train(twin, theirs)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_first_step_under_capture_is_refused(fresh: Any) -> None:
    twins = Twins("AdamW", fresh, sizes=(8,))
    twins.set_gradients()
    with (
        pytest.raises(RuntimeError, match="a CUDA graph is being captured; expected a step"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        twins.ours.step()


def test_parameters_on_the_gpu_and_the_cpu(fresh: Any) -> None:
    """A call a device, one norm."""
    tensors = [torch.randn(100, generator=fresh) for _ in range(4)]
    mixed = [torch.nn.Parameter(t.cuda() if i % 2 else t.clone()) for i, t in enumerate(tensors)]
    plain = [torch.nn.Parameter(t.clone()) for t in tensors]
    ours, theirs = (optim.AdamW(p, max_grad_norm=1.0) for p in (mixed, plain))
    for _ in range(3):
        for p, q in zip(mixed, plain, strict=True):
            q.grad = torch.randn(100, generator=fresh)
            p.grad = q.grad.to(p.device)
        ours.step()
        theirs.step()
    for p, q in zip(mixed, plain, strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=1e-5, atol=1e-6)


def test_state_dicts_swap_with_torch(fresh: Any) -> None:
    twins = Twins("AdamW", fresh)
    torchs = torch.optim.AdamW(optim_cases.clones(twins.params), fused=True)
    for step in range(4):
        twins.step()
        if step == 1:
            torchs.load_state_dict(twins.ours.state_dict())
            saved = torchs.state_dict()
            twins.ours = optim.AdamW(twins.params)
            twins.ours.load_state_dict(saved)
    twins.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_distance_to_torch(dtype: torch.dtype, fresh: Any) -> None:
    """torch's CUDA kernel rounds otherwise than its CPU kernel, whose bits are ours: a few ulp."""
    twins = Twins("AdamW", fresh, dtype)
    params = optim_cases.clones(twins.params)
    torchs = torch.optim.AdamW(params, fused=True)
    twins.set_gradients()
    for p, q in zip(params, twins.params, strict=True):
        p.grad = q.grad.clone()
    twins.ours.step()
    torchs.step()
    if dtype == torch.float32:
        most = max(
            optim_cases.ulps(p.cpu(), q.cpu()) for p, q in zip(params, twins.params, strict=True)
        )
        print(f"most ulps from torch.optim.AdamW(fused=True) on CUDA after a step: {most}")
    for p, q in zip(params, twins.params, strict=True):
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {}
        torch.testing.assert_close(p, q, **tolerance)


def test_released_gradients(fresh: Any) -> None:
    twins = Twins("AdamW", fresh, sizes=(30, 50))
    optim.release_gradients(twins.ours)
    for _ in range(3):
        weights = [torch.randn(q.shape, generator=fresh) for q in twins.twins]
        sum((p * w.cuda()).sum() for p, w in zip(twins.params, weights, strict=True)).backward()
        twins.ours.step()
        for q, w in zip(twins.twins, weights, strict=True):
            q.grad = w
        twins.theirs.step()
    for p, q in zip(twins.params, twins.twins, strict=True):
        assert_same(p, q, "parameter")


def test_who_answers() -> None:
    runner = device.runner("AdamW", torch.device("cuda", 0))
    if not backend.FORCED and not backend.cuda_problem():
        assert torch.cuda.get_device_capability() < (8, 0) or isinstance(runner, device.CudaRunner)
