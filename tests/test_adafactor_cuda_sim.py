"""Adafactor on CUDA, on the SIMT machine, against the CPU's: the same bits."""

from __future__ import annotations

import shutil
from typing import Any

import cuda_sim
import optim_cases
import optim_on_sim
import pytest
import sim_call
import simt_build
import torch
from test_optim_device import compare, on_cpu

from trimtab import optim
from trimtab.ops import backend
from trimtab.optim import device

pytestmark = pytest.mark.skipif(
    shutil.which(simt_build.compiler()) is None, reason="no C++ compiler"
)

# Vectors; matrices of a row, a column and a few; batches of small ones; several row tiles (64), column blocks
# (512) and parts of a mean (1024).
SHAPES: tuple[Any, ...] = (
    (1,), (7,), (5000,), (1, 4), (9, 1), (33, 17), (40, 3, 3, 3), (64, 8), (70, 520), (1100, 3),
)  # fmt: skip
FEW: tuple[Any, ...] = ((2,), (1030,), (5, 3, 3), (33, 40), (65, 9))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def gpu() -> Any:
    with optim_on_sim.as_gpu(cuda_sim.Simulator(seed=1)) as gpu:
        yield gpu


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step(gpu: Any, dtype: torch.dtype) -> None:
    options = {"lr": 0.05, "weight_decay": 0.1, "maximize": True}
    compare(gpu, "Adafactor", 2, dtype, SHAPES, **(options if dtype == torch.bfloat16 else {}))
    assert gpu.sim.launches == 2 * 6


@pytest.mark.parametrize(
    "shapes",
    [
        ((3, 4100), (2, 1, 8200)),  # tiles of 4096 columns, of eight blocks of 512
        (
            (1100, 2, 2),
            (3, 300, 2),
            (2, 1030, 2),
        ),  # many matrices a piece of rows; several parts of a mean
        ((600, 24), (1030, 17)),  # chains of row tiles: more than eight, several tiles in a block
        ((130, 512),),  # whole blocks, each in several chunks
        ((5000, 1), (1, 5000)),
    ],
    ids=str,
)
def test_shapes(shapes: Any) -> None:
    for seed, policy in enumerate(("late", "early")):
        sim = cuda_sim.Simulator(arch=90, seed=seed, policy=policy, sm_count=1)
        with optim_on_sim.as_gpu(sim) as gpu:
            compare(gpu, "Adafactor", 1 + seed, sizes=shapes, eps=(1e-5, 1e-2), d=1.5)


def prepare(optimizer: Any) -> None:
    params = optimizer.param_groups[0]["params"]
    for at in (1, 3):
        mask = (torch.arange(params[at].numel()) % 5 > 0).reshape(params[at].shape)
        optimizer.set_mask(params[at], mask)


MEMORY: tuple[tuple[torch.dtype, dict[str, Any]], ...] = (
    (torch.float32, {"state_dtype": "bf16", "rounding": "stochastic", "seed": 5}),
    (torch.bfloat16, {"rounding": "stochastic", "ema_decay": 0.9}),
    (torch.bfloat16, {"master": "remainder", "state_dtype": "float32", "ema_decay": 0.5}),
    (torch.bfloat16, {"master": "kahan", "rounding": "stochastic", "zero_grads": True}),
    (torch.float16, {"state_dtype": "float32", "l1": 0.01}),
)


@pytest.mark.parametrize(("dtype", "options"), MEMORY, ids=optim_cases.ident)
def test_smaller_formats(gpu: Any, dtype: torch.dtype, options: dict[str, Any]) -> None:
    compare(gpu, "Adafactor", 2, dtype, FEW, prepare, **options)


def test_folded_in() -> None:
    """Clipping, EMA, masks, copies, l1, zeroed gradients, a GradScaler's tensors; an overflow between."""
    copies: dict[int, list[torch.Tensor]] = {}

    def begin(optimizer: Any) -> None:
        prepare(optimizer)
        params = optimizer.param_groups[0]["params"]
        copies[id(optimizer)] = [torch.zeros_like(p, dtype=torch.bfloat16) for p in params]
        for param, copy in zip(params, copies[id(optimizer)], strict=True):
            optimizer.set_copy(param, copy)

    def between(optimizer: Any, step: int) -> None:
        optimizer.grad_scale = torch.tensor([8.0])
        optimizer.found_inf = torch.tensor(float(step == 1))

    options = {"max_grad_norm": 0.5, "ema_decay": 0.9, "l1": 0.01, "zero_grads": True}
    for seed, policy in enumerate(sim_call.POLICIES):
        sim = cuda_sim.Simulator(seed=seed, policy=policy)
        with optim_on_sim.as_gpu(sim) as gpu:
            ours, theirs = compare(
                gpu, "Adafactor", 3, torch.float32, FEW, begin, between, **options
            )
        assert ours.skipped_steps == 1
        assert torch.equal(ours.grad_norm, theirs.grad_norm)
        for a, b in zip(copies[id(ours)], copies[id(theirs)], strict=True):
            assert torch.equal(a, b)
        assert sim.launches == 3 * 7


@pytest.mark.parametrize("options", [{"skip_nonfinite": True, "zero_grads": True}, {}], ids=str)
def test_not_finite(gpu: Any, options: dict[str, Any]) -> None:
    """A NaN in the second step, which is skipped; without that a square that is no fp32."""

    def between(optimizer: Any, step: int) -> None:
        for param in optimizer.param_groups[0]["params"][1::2]:
            param.grad.view(-1)[step] = torch.nan if step and options else 3e38

    ours, _ = compare(gpu, "Adafactor", 2, sizes=FEW, between=between, **options)
    assert ours.skipped_steps == bool(options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_clipped_as_torch_rounds(gpu: Any, dtype: torch.dtype) -> None:
    options = {"max_grad_norm": 0.7, "clip_rounding": "torch", "maximize": True}
    compare(gpu, "Adafactor", 2, dtype, FEW, **options)


def test_misaligned(gpu: Any) -> None:
    """Views into one long array: a shift common to all arrays, and rows that begin anywhere."""
    for dtype in DTYPES[:2]:
        whole = [torch.randn(9000).to(dtype)]
        whole.append(whole[0].clone())
        parts = ((1, (1100,)), (1101, (40, 16)), (2001, (70, 31)), (5000, (4000,)))
        lists = [
            [torch.nn.Parameter(w[a : a + torch.Size(s).numel()].view(s)) for a, s in parts]
            for w in whole
        ]
        grads = [torch.randn(9000).to(dtype) for _ in range(2)]
        ours, theirs = (optim.Adafactor(params) for params in lists)
        for grad in grads:
            for params in lists:
                for p, (a, s) in zip(params, parts, strict=True):
                    p.grad = grad[a : a + p.numel()].view(s)
            ours.step()
            on_cpu(theirs.step)
        optim_cases.assert_same(ours, theirs)


def test_no_gradient_empty_and_groups(gpu: Any) -> None:
    sizes = ((7,), (5, 6), (0,), (0, 5), (4, 0), (30, 20))
    params = optim_cases.parameters(sizes)
    twins = optim_cases.clones(params)
    other = {"lr": 0.5, "beta2_decay": -0.5, "eps": (1e-4, 1e-1), "d": 2.0}
    ours, theirs = (
        optim.Adafactor([{"params": list_[:5]}, {"params": list_[5:], **other}])
        for list_ in (params, twins)
    )
    for step in range(3):
        optim_cases.set_gradients(step, params, twins)
        for optimizer, list_ in ((ours, params), (theirs, twins)):
            optimizer.param_groups[1]["lr"] = 0.5 / (step + 1)
            if step < 2:
                list_[step].grad = None
        ours.step()
        on_cpu(theirs.step)
    optim_cases.assert_same(ours, theirs)
    assert gpu.uploads == 3


def test_a_table_serves_until_something_changes(gpu: Any) -> None:
    params = optim_cases.parameters(FEW)
    ours = optim.Adafactor(params)
    optim_cases.set_gradients(0, params)
    for _ in range(3):
        ours.step()
    assert (gpu.uploads, gpu.allocations) == (1, 2)
    ours.param_groups[0]["beta2_decay"] = -0.7
    ours.step()
    assert (gpu.uploads, gpu.allocations) == (2, 2)


def test_capture(gpu: Any) -> None:
    params = optim_cases.parameters(FEW)
    ours = optim.Adafactor(params)
    optim_cases.set_gradients(0, params)
    gpu.captures = True
    with pytest.raises(RuntimeError, match="Adafactor|a CUDA graph is being captured"):
        ours.step()
    gpu.captures = False
    ours.step()
    kept = len(device._captured)
    gpu.captures = True
    ours.step()
    assert len(device._captured) == kept + 1


LACKING: tuple[dict[str, Any], ...] = (
    {"ema_decay": 0.9},
    {"master": "kahan"},
    {"rounding": "stochastic"},
    {"max_grad_norm": 1.0, "clip_rounding": "torch"},
)


def test_who_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton where there is no CUDA C++, or it is forced; torch's operations for what Triton lacks."""
    place = torch.device("cuda", 0)
    (param,) = optim_cases.parameters(((3, 4),), torch.bfloat16)

    def takes_torchs(where: torch.device = place, **options: Any) -> bool:
        return optim.Adafactor([param], **options)._takes_torchs(where)

    monkeypatch.setattr(backend, "cuda_problem", lambda: "none here")
    plain = {"max_grad_norm": 1.0, "skip_nonfinite": True, "l1": 0.1, "zero_grads": True}
    for forced, may_be_torchs in (("", True), ("triton", True), ("cuda", False), ("cpu", False)):
        monkeypatch.setattr(backend, "FORCED", forced)
        assert not takes_torchs() and not takes_torchs(**plain)
        assert all(takes_torchs(**options) == may_be_torchs for options in LACKING)
        assert takes_torchs(torch.device("mps")) == may_be_torchs
        assert not takes_torchs(torch.device("cpu"), ema_decay=0.9)
    with pytest.raises(RuntimeError, match="Adafactor: expected tensors on the CPU, as TRIMTAB"):
        device.runner("Adafactor", place)
    monkeypatch.setattr(backend, "FORCED", "triton")
    functions = device.runner("Adafactor", place).functions
    assert type(functions).__module__ == "trimtab.kernels.adafactor"
    assert type(device.runner("LAMB", place).functions).__name__ == "OptimStep"
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    assert takes_torchs()


def test_what_triton_lacks() -> None:
    place = torch.device("cuda", 0)
    params = optim_cases.parameters(((3, 4),))
    ours = optim.Adafactor(params)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "FORCED", "triton")
        assert not ours._takes_torchs(place)
        ours.set_mask(params[0], torch.ones(3, 4))
        assert ours._takes_torchs(place)
        ours.set_mask(params[0], None)
        ours.set_copy(params[0], torch.zeros(3, 4))
        assert ours._takes_torchs(place)


def test_needs_an_ampere() -> None:
    with optim_on_sim.as_gpu(cuda_sim.Simulator(arch=75)):
        (param,) = optim_cases.parameters(((3, 4),))
        param.grad = torch.ones(3, 4)
        with pytest.raises(RuntimeError, match="adafactor: expected a GPU of compute capability"):
            optim.Adafactor([param]).step()
