"""Adafactor's Triton kernels, interpreted, against the CPU's scalar path: the same bits.

Run by test_triton_adafactor.py, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import optim_cases
import optim_on_sim
import pytest
import torch
import triton
import triton.language as tl
from triton_interpret import mend_interpreter

from trimtab import ops, optim
from trimtab.kernels.adafactor import adafactor
from trimtab.kernels.adafactor_table import _rows, check
from trimtab.kernels.optim_constants import power_of_count
from trimtab.kernels.optim_table import WIDE
from trimtab.optim import device, library

mend_interpreter()
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, for x / 0 and NaN

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES_OF = library.TENSOR, library.GROUP, library.ADAFACTOR_GROUP, library.ADAFACTOR_SHAPE
FEW: tuple[Any, ...] = ((2,), (260,), (2, 3, 3), (9, 40), (65, 9))


@pytest.fixture(autouse=True)
def scalar() -> Any:
    ops.set_isa("scalar")
    yield
    ops.set_isa(None)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a step runs on: a queue that counts, and kernels."""
    gpu = optim_on_sim.Gpu(None)
    functions = adafactor(library.Call, DTYPES_OF, torch.device("cpu"))
    gpu.runner = lambda *_: device.CudaRunner(gpu, functions)
    return gpu


def compare(
    gpu: Any,
    steps: int,
    sizes: Any = FEW,
    dtype: torch.dtype = torch.float32,
    between: Callable[[Any, int], None] | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    params = optim_cases.parameters(sizes, dtype)
    twins = optim_cases.clones(params)
    ours, theirs = (optim.Adafactor(p, **options) for p in (params, twins))
    for i in range(steps):
        optim_cases.set_gradients(i, params, twins)
        for optimizer in (ours, theirs):
            if between is not None:
                between(optimizer, i)
        step(gpu, ours)
        theirs.step()
        assert all(optim_cases.same_bits(p.grad, q.grad) for p, q in zip(params, twins))
    optim_cases.assert_same(ours, theirs)
    assert ours.skipped_steps == theirs.skipped_steps
    assert isinstance(ours._plan.runs[0].runner, device.CudaRunner)
    assert isinstance(theirs._plan.runs[0].runner, device.HostRunner)
    return ours, theirs


def step(gpu: Any, optimizer: Any) -> None:
    whole, device.runner = device.runner, gpu.runner
    try:
        optimizer.step()
    finally:
        device.runner = whole


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step(gpu: Any, dtype: torch.dtype) -> None:
    # An lr above 1 / sqrt(2), the second step's bound.
    options = {"lr": 0.9, "weight_decay": 0.1, "maximize": True}
    sizes: tuple[Any, ...] = ((7,), (), (1100,), (1, 4), (9, 1), (2, 3, 3), (66, 17))
    if dtype == torch.float32:
        sizes += ((66, 520), (64, 8))
    compare(gpu, 2, sizes, dtype, **(options if dtype == torch.bfloat16 else {}))


@pytest.mark.parametrize(
    "sizes",
    [
        ((2, 4610),),  # tiles of 4096 columns, of eight blocks of 512
        ((2, 1030, 2),),  # several parts of a mean, chains of row tiles
        ((2, 70, 5), (4096,), (4097,)),
    ],
    ids=str,
)
def test_shapes(gpu: Any, sizes: Any) -> None:
    steps = 1 if sizes == ((2, 1030, 2),) else 2  # which takes long here
    compare(gpu, steps, sizes, eps=(1e-5, 1e-2), d=1.5, beta2_decay=-0.5)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_folded_in(gpu: Any, dtype: torch.dtype) -> None:
    """Clipping, l1, zeroed gradients, a GradScaler's tensors; an overflow between."""

    def between(optimizer: Any, step: int) -> None:
        optimizer.grad_scale = torch.tensor([8.0])
        optimizer.found_inf = torch.tensor(float(step == 1))

    options = {"max_grad_norm": 0.05, "l1": 0.01, "zero_grads": True, "state_dtype": "float32"}
    ours, theirs = compare(gpu, 3, dtype=dtype, between=between, **options)
    assert ours.skipped_steps == 1
    assert torch.equal(ours.grad_norm, theirs.grad_norm) and ours.grad_norm > 0.05


@pytest.mark.parametrize("options", [{"skip_nonfinite": True, "zero_grads": True}, {}], ids=str)
def test_not_finite(gpu: Any, options: dict[str, Any]) -> None:
    """A NaN in the second step, which is skipped; without that a square that is no fp32."""

    def between(optimizer: Any, step: int) -> None:
        for param in optimizer.param_groups[0]["params"][1::2]:
            param.grad.view(-1)[step] = torch.nan if step and options else 3e38

    ours, _ = compare(gpu, 2, between=between, **options)
    assert ours.skipped_steps == bool(options)


def test_limit(gpu: Any) -> None:
    """A direction at its limit, a mean below eps1, a row without gradient."""

    def between(optimizer: Any, step: int) -> None:
        for param in optimizer.param_groups[0]["params"]:
            param.grad *= 0.02
            param.grad.view(-1)[::2] = 0.0
            if param.dim() > 1:
                param.grad[1] = 0.0

    compare(gpu, 2, between=between, eps=(1e-2, 1e-3))
    compare(gpu, 1, between=between, eps=(1e-30, 1e-3))


def test_misaligned(gpu: Any) -> None:
    whole = [torch.randn(4000)]
    whole.append(whole[0].clone())
    parts = ((1, (1100,)), (1101, (40, 31)), (2401, (1500,)))
    lists = [
        [torch.nn.Parameter(w[a : a + torch.Size(s).numel()].view(s)) for a, s in parts]
        for w in whole
    ]
    ours, theirs = (optim.Adafactor(params) for params in lists)
    optim_cases.set_gradients(0, *lists)
    step(gpu, ours)
    theirs.step()
    optim_cases.assert_same(ours, theirs)


@pytest.mark.parametrize("array", ["param", "grad", "state"])
def test_what_is_aligned(array: str) -> None:
    """To 16 bytes, or an element at a time; a matrix's states are not its update's."""
    params = optim_cases.parameters(((8,), (4, 4)))
    ours = optim.Adafactor(params)
    optim_cases.set_gradients(0, params)
    ours.step()
    tensors = ours._plan.table.copy()
    assert _rows(tensors, np.array([False, True]), np.zeros(1, library.GROUP))[0][
        :, WIDE.value
    ].all()
    tensors[array] += np.uint64(4)
    rows = _rows(tensors, np.array([False, True]), np.zeros(1, library.GROUP))[0]
    assert rows[:, WIDE.value].tolist() == [0, int(array == "state")]


def test_no_gradient_empty_and_groups(gpu: Any) -> None:
    """An lr in a tensor, which is read when the step is made; one table for steps alike."""
    sizes = ((7,), (5, 6), (0,), (0, 5), (4, 0), (30, 20))
    params = optim_cases.parameters(sizes)
    twins = optim_cases.clones(params)
    other = {"beta2_decay": -0.5, "eps": (1e-4, 1e-1), "d": 2.0}
    ours, theirs = (
        optim.Adafactor([{"params": p[:5]}, {"params": p[5:], "lr": 0.5, **other}])
        for p in (params, twins)
    )
    for i in range(3):
        optim_cases.set_gradients(i, params, twins)
        for optimizer, list_ in ((ours, params), (theirs, twins)):
            optimizer.param_groups[1]["lr"] = 0.5 / (i + 1)
            if i < 2:
                list_[i].grad = None
        step(gpu, ours)
        theirs.step()
    optim_cases.assert_same(ours, theirs)


def test_one_model_of_many_dtypes(gpu: Any) -> None:
    """A kind each, one launch for all."""
    params = [p for dtype in DTYPES for p in optim_cases.parameters(((40,), (9, 30)), dtype)]
    twins = optim_cases.clones(params)
    ours, theirs = (optim.Adafactor(p, max_grad_norm=0.5) for p in (params, twins))
    for i in range(2):
        optim_cases.set_gradients(i, params, twins)
        step(gpu, ours)
        theirs.step()
    optim_cases.assert_same(ours, theirs)
    assert torch.equal(ours.grad_norm, theirs.grad_norm)


@triton.jit
def powers(n, y, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, power_of_count(tl.load(n + at), tl.load(y + at)))


def test_power_of_count() -> None:
    n = torch.cat([torch.arange(1.0, 257.0), torch.logspace(2, 7, 256).round()]).double()
    y = -torch.rand(512, dtype=torch.float64)
    y[::2] = -0.8
    out = torch.zeros_like(n)
    powers[(1,)](n, y, out, BLOCK=512)
    exact = np.power(n.numpy().astype(np.longdouble), y.numpy().astype(np.longdouble))
    assert bool((np.abs(out.numpy() - exact) <= 0.5001 * np.spacing(out.numpy())).all())


BAD: dict[str, tuple[Callable[[Any, Any], None], str]] = {
    "rows": (lambda t, s: s["rows"].fill(3), r"tensor \d: expected batch \* rows \* columns"),
    "piece": (lambda t, s: s["whole_numel"].fill(10**6), "tensor 0: expected a whole tensor"),
    "dtype": (lambda t, s: t["state_dtype"].fill(16), "tensor 0: expected float32, bfloat16"),
    "group": (lambda t, s: t["group"].fill(2), "tensor 0: expected group to be an index"),
    "state": (lambda t, s: t["state"].fill(0), "tensor 0: expected param and its states"),
    "step": (lambda t, s: t["step"].fill(0), "tensor 0: expected step, got NULL"),
    "mask": (lambda t, s: t["mask"].fill(1), "adafactor: CUDA C\\+\\+ and the CPU have a mask"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    params = optim_cases.parameters(FEW)
    ours = optim.Adafactor(params)
    optim_cases.set_gradients(0, params)
    ours.step()
    tensors, shapes = ours._plan.table.copy(), ours._plan.rows.shapes.copy()
    check(library.Call(), tensors, shapes, 1)
    spoil, message = BAD[case]
    spoil(tensors, shapes)
    with pytest.raises(RuntimeError, match=message):
        check(library.Call(), tensors, shapes, 1)


def test_parts_are_refused() -> None:
    functions = adafactor(library.Call, DTYPES_OF, torch.device("cpu"))
    call = library.AdafactorCall(ctypes.addressof(library.Call()), None, None, None, 1)
    with pytest.raises(RuntimeError, match="adafactor: expected a whole step, got one in parts"):
        functions.sizes(call)


def test_launches(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six, seven with a norm, whatever the number of tensors."""
    module = importlib.import_module("trimtab.kernels.adafactor")
    names: list[str] = []

    class Noted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(module, name)

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            names.append(self.name.removeprefix("adafactor_").removesuffix("_kernel"))
            return self.kernel[grid]

    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        monkeypatch.setattr(module, name, Noted(name))
    compare(gpu, 1, ((4,), (3, 5)), max_grad_norm=1.0)
    after = ["squares", "average", "factors", "direction", "apply"]
    assert names == ["optim_norm", "optim_prepare", *after]
    assert gpu.allocations == 2
