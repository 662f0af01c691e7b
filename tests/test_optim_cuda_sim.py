"""The fused step on CUDA, on the SIMT machine, against the CPU's: the same bits."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import cuda_sim
import numpy as np
import pytest
import sim_call
import simt_build
import torch
from torch import Tensor

from trimtab.optim import library

pytestmark = pytest.mark.skipif(
    shutil.which(simt_build.compiler()) is None, reason="no C++ compiler"
)

# One tile is 1024 elements, a partial sum of the norm 4096.
SIZES = (1, 7, 8, 33, 0, 1000, 1024, 1025, 5000)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUMBERS = {
    "lr": 0.01,
    "beta1": 0.9,
    "beta2": 0.99,
    "eps": 1e-8,
    "momentum_decay": 0.004,
    "alpha": 0.95,
}
# (rule, states, numbers, flags): every variant of every rule.
L2 = {"weight_decay": 0.1}
ADAM = ("exp_avg", "exp_avg_sq")
RULES: tuple[tuple[str, int, dict[str, float], tuple[str, ...]], ...] = (
    ("SGD", 0, {}, ()),
    ("SGD", 0, L2, ("maximize",)),
    ("SGD", 1, {"momentum": 0.9, "dampening": 0.2}, ()),
    ("SGD", 1, {"momentum": 0.9, **L2}, ("nesterov",)),
    ("Adam", 2, {}, ()),
    ("Adam", 2, L2, ("maximize",)),
    ("Adam", 3, L2, ("amsgrad", "decoupled_weight_decay")),
    ("Adam", 3, {**L2, "beta1": 0.3}, ("amsgrad",)),
    ("Adagrad", 1, {"lr_decay": 0.1, "eps": 1e-3}, ()),
    ("Adagrad", 1, L2, ("maximize",)),
    ("RMSprop", 1, {}, ()),
    ("RMSprop", 2, {"momentum": 0.9, **L2}, ()),
    ("RMSprop", 2, {}, ("centered",)),
    ("RMSprop", 3, {"momentum": 0.5, **L2}, ("centered", "maximize")),
    ("NAdam", 2, L2, ()),
    ("NAdam", 2, L2, ("decoupled_weight_decay",)),
    ("RAdam", 2, L2, ()),
    ("RAdam", 2, L2, ("decoupled_weight_decay",)),
    ("Adamax", 2, {}, ()),
    ("Adamax", 2, L2, ("maximize",)),
    ("Lion", 1, L2, ()),
    ("LAMB", 2, L2, ("bias_correction",)),
    ("LAMB", 2, {}, ("always_adapt", "maximize")),
)
FOLDED = tuple(RULES[i] for i in (0, 3, 6, 13, 20, 21))


def empty_at(n: int, dtype: torch.dtype, offset: int) -> Tensor:
    """n elements that begin `offset` elements after a multiple of 64 bytes."""
    whole = sim_call.garbage(n + 64 + offset, dtype=dtype)
    start = -whole.data_ptr() % 64 // whole.element_size() + offset
    return whole[start : start + n]


@dataclass
class Model:
    """The arrays of a call, and the call."""

    rule: str
    states: int
    numbers: dict[str, float]
    flags: Sequence[str]
    sizes: Sequence[int] = SIZES
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (
        torch.float32,
    ) * 3  # param, grad, state
    extras: bool = False  # mask, ema, copy
    offsets: Sequence[int] = (0,)  # of each tensor's arrays
    apart: bool = False  # the state begins an element later than the parameter: never aligned
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        param, grad, state = self.dtypes
        generator = torch.Generator().manual_seed(0)

        def random(n: int, dtype: torch.dtype, offset: int, positive: bool = False) -> Tensor:
            x = torch.randn(n, generator=generator)
            return empty_at(n, dtype, offset).copy_(x.abs() if positive else x)

        self.writes: list[Tensor] = []
        self.reads: list[Tensor] = []
        self.grads: list[Tensor] = []
        table = self.table = np.zeros(len(self.sizes), library.TENSOR)
        for i, n in enumerate(self.sizes):
            row, offset = table[i], self.offsets[i % len(self.offsets)]
            arrays = {"param": random(n, param, offset)}
            self.grads.append(empty_at(n, grad, offset))
            for k in range(self.states):
                later = offset + self.apart
                arrays[f"state{k}"] = random(
                    n, state, later, positive=k > 0 or self.rule == "Adagrad"
                )
            if self.extras:
                arrays["ema"] = random(n, torch.float32, offset)
                arrays["copy"] = empty_at(n, torch.bfloat16, offset).zero_()
                mask = torch.randint(0, 4, (n,), generator=generator).to(torch.uint8)
                self.reads.append(mask)
                row["mask"], row["copy_dtype"] = mask.data_ptr(), library.DTYPES[torch.bfloat16]
            if self.rule not in ("SGD", "Lion"):
                arrays["step"] = torch.tensor([float(i * i)])
            if self.rule == "NAdam":
                arrays["product"] = torch.tensor([0.9**i])
            for name, x in arrays.items():
                self.writes.append(x)
                # Not a NULL for an empty array.
                pointer = x.data_ptr() or 64
                if name.startswith("state"):
                    row["state"][int(name[5:])] = pointer
                else:
                    row[name] = pointer
            row["grad"], row["numel"], row["group"] = self.grads[-1].data_ptr() or 64, n, i % 2
            row["fresh"] = self.rule == "SGD" and i % 3 == 1
            for name, dtype in zip(("param", "grad", "state"), self.dtypes, strict=True):
                row[f"{name}_dtype"] = library.DTYPES[dtype]
        self.groups = np.zeros(2, library.GROUP)
        for group, lr in zip(self.groups, (0.01, 0.3), strict=True):
            for key, value in {**NUMBERS, **self.numbers}.items():
                group[key] = value
            group["lr"] = lr
            group["l1"] = 0.02 if self.extras else 0.0
            group["flags"] = sum(library.FLAGS[name] for name in self.flags)
        self.norm, self.skipped = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
        self.writes += [self.norm, self.skipped]

    def call(self) -> library.Call:
        o = dict(self.options)
        scale, found = o.pop("grad_scale", None), o.pop("found_inf", None)
        max_norm = o.pop("max_norm", None)
        call = library.Call(
            rule=library.RULES.index(self.rule),
            torch_tails=1,
            tensors=self.table.ctypes.data,
            n_tensors=len(self.table),
            groups=self.groups.ctypes.data,
            n_groups=len(self.groups),
            max_norm=-1.0 if max_norm is None else max_norm,
            ema_decay=0.9,
            norm=None if max_norm is None else self.norm.data_ptr(),
            skipped=self.skipped.data_ptr(),
        )
        for name, value in o.items():
            setattr(call, name, value)
        self.kept = [None if v is None else torch.tensor([v]) for v in (scale, found)]
        for name, tensor in zip(("grad_scale", "found_inf"), self.kept, strict=True):
            setattr(call, name, None if tensor is None else tensor.data_ptr())
        return call

    def set_gradients(self, step: int, bad: float | None = None) -> None:
        generator = torch.Generator().manual_seed(100 + step)
        for grad in self.grads:
            grad.copy_(torch.randn(grad.numel(), generator=generator))
        if bad is not None:
            self.grads[-1][3] = bad


def on_cpu(call: library.Call) -> None:
    library.step(call)


def assert_same(ours: Model, theirs: Model) -> None:
    for a, b in zip(ours.writes + ours.grads, theirs.writes + theirs.grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def compare(
    sim: cuda_sim.Simulator, steps: int = 2, bad: float | None = None, **arguments: Any
) -> tuple[Model, Model]:
    gpu, cpu = Model(**arguments), Model(**arguments)
    for step in range(steps):
        for model in (gpu, cpu):
            model.set_gradients(step, bad)
        call = gpu.call()
        reads = [*gpu.reads, *(t for t in gpu.kept if t is not None)]
        sim.optim_step(call, reads=reads, writes=[*gpu.writes, *gpu.grads])
        on_cpu(cpu.call())
        assert_same(gpu, cpu)
    return gpu, cpu


def named(row: tuple[str, int, dict[str, float], tuple[str, ...]]) -> dict[str, Any]:
    return dict(zip(("rule", "states", "numbers", "flags"), row, strict=True))


def ident(row: tuple[str, int, dict[str, float], tuple[str, ...]]) -> str:
    return ",".join((row[0], *row[2], *row[3]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", RULES, ids=ident)
def test_rules(row: Any, dtype: torch.dtype) -> None:
    compare(cuda_sim.Simulator(seed=1), dtypes=(dtype,) * 3, **named(row))


@pytest.mark.parametrize("row", FOLDED, ids=ident)
def test_everything_folded_in(row: Any) -> None:
    """Unscaling, clipping, shrinkage, masks, averages, copies, zeroing; mixed dtypes."""
    for seed, policy in enumerate(sim_call.POLICIES):
        sim = cuda_sim.Simulator(arch=90, seed=seed, policy=policy)
        options = {"grad_scale": 8.0, "found_inf": 0.0, "max_norm": 1.0, "zero_grad": 1}
        options["skip_nonfinite"] = 1
        mixed = (torch.bfloat16, torch.float32, torch.float32) if seed % 2 else (torch.float32,) * 3
        gpu, _ = compare(sim, dtypes=mixed, extras=True, options=options, **named(row))
        assert gpu.norm.item() > 1.0 and gpu.skipped.item() == 0
        assert all((grad == 0).all() for grad in gpu.grads)
        assert sim.launches <= 2 * 3


@pytest.mark.parametrize("apart", [False, True])
def test_misaligned(apart: bool) -> None:
    """Views into one long array: the same shift in all arrays, or not."""
    for dtype in DTYPES:
        arguments = named(RULES[5]) | {"dtypes": (dtype,) * 3, "apart": apart}
        sizes = (3000, 1031, 2048, 1, 2047)
        compare(cuda_sim.Simulator(seed=3), offsets=(1, 3, 4, 7, 2), sizes=sizes, **arguments)


@pytest.mark.parametrize("torch_tails", [0, 1])
def test_tails(torch_tails: int) -> None:
    compare(cuda_sim.Simulator(), options={"torch_tails": torch_tails}, **named(RULES[4]))


def test_large_pieces() -> None:
    """Several tiles a block."""
    compare(cuda_sim.Simulator(sm_count=1), sizes=(150_001, 40_000), steps=1, **named(RULES[4]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("skip", [0, 1])
def test_not_finite(bad: float, skip: int) -> None:
    options = {"max_norm": 1.0, "skip_nonfinite": skip, "zero_grad": 1}
    sim = cuda_sim.Simulator(seed=5)
    before = Model(**named(RULES[4]))
    gpu, _ = compare(sim, steps=1, bad=bad, options=options, **named(RULES[4]))
    skipped = skip and bad != 3e38
    assert gpu.skipped.item() == skipped
    assert torch.equal(gpu.writes[-5], before.writes[-5]) == bool(skipped)


def test_found_inf() -> None:
    for options in ({"found_inf": 1.0}, {"found_inf": 1.0, "max_norm": 1.0, "zero_grad": 1}):
        gpu, _ = compare(cuda_sim.Simulator(), options=options, **named(RULES[14]))
        assert gpu.skipped.item() == 2


def test_no_gradient_and_one_table_for_many_steps() -> None:
    sim = cuda_sim.Simulator(seed=2)
    gpu, cpu = (Model(**named(RULES[4])) for _ in range(2))
    for model in (gpu, cpu):
        model.table["grad"][2] = 0
    made = sim.optim_step_table(gpu.call())
    for step in range(3):
        for model in (gpu, cpu):
            model.set_gradients(step)
        before = sim.launches
        sim.optim_step(gpu.call(), reads=gpu.reads, writes=[*gpu.writes, *gpu.grads], made=made)
        assert step == 0 or sim.launches - before == 2
        on_cpu(cpu.call())
        assert_same(gpu, cpu)


def test_lr_tensor() -> None:
    """Read when the step is made, not when the table is."""
    sim = cuda_sim.Simulator()
    gpu, cpu = (Model(**named(RULES[4])) for _ in range(2))
    lr = torch.tensor([9.0])
    gpu.groups["lr_tensor"] = lr.data_ptr()
    made = sim.optim_step_table(gpu.call())
    lr.fill_(0.125)
    cpu.groups["lr"] = 0.125
    for model in (gpu, cpu):
        model.set_gradients(0)
    sim.optim_step(gpu.call(), reads=[lr], writes=[*gpu.writes, *gpu.grads], made=made)
    on_cpu(cpu.call())
    assert_same(gpu, cpu)


BAD = {
    "rule": (lambda m, c: setattr(c, "rule", 99), "expected a tt_rule, got 99"),
    "dtype": (lambda m, c: m.table["state_dtype"].fill(7), "tensor 0: expected float32, bfloat16"),
    "group": (lambda m, c: m.table["group"].fill(2), "tensor 0: expected group to be an index"),
    "state": (lambda m, c: m.table["state"].fill(0), "expected all of the rule's states, got NULL"),
    "step": (lambda m, c: m.table["step"].fill(0), "expected step, got NULL"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    spoil, message = BAD[case]
    model = Model(**named(RULES[4]))
    call = model.call()
    spoil(model, call)
    with pytest.raises(RuntimeError, match=message):
        cuda_sim.Simulator().optim_step_table(call)


def test_needs_an_ampere() -> None:
    model = Model(**named(RULES[4]))  # a name of its own: a call holds only pointers into the model
    with pytest.raises(RuntimeError, match="expected a GPU of compute capability 8.0 or later"):
        cuda_sim.Simulator(arch=75).optim_step_table(model.call())
