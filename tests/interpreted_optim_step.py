"""optim_step's Triton kernels, interpreted, against the CPU's scalar path: the same bits.

Run by test_triton_optim_step.py, with TRITON_INTERPRET=1. The interpreter has the fma of the hardware
(mend_interpreter), so that not one bit may differ.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import optim_cases
import optim_on_sim
import pytest
import torch
import triton
import triton.language as tl
from test_optim_cuda_sim import DTYPES, FOLDED, RULES, Model, assert_same, ident, named, on_cpu
from triton_interpret import mend_interpreter

from trimtab import ops, optim
from trimtab.kernels.optim_memory import decode, dynamic_code, encode
from trimtab.kernels.optim_step import OptimStep, optim_step
from trimtab.optim import device, library

mend_interpreter()
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, for x / 0 and NaN

# A tile is 1024 elements, a partial sum of the norm 4096.
SIZES = (1, 8, 33, 0, 1031)


@pytest.fixture(autouse=True)
def scalar() -> Any:
    ops.set_isa("scalar")
    yield
    ops.set_isa(None)


def functions() -> OptimStep:
    return optim_step(library.TENSOR, library.GROUP, torch.device("cpu"))


Made = tuple[OptimStep, torch.Tensor, torch.Tensor]


def made_of(model: Model) -> Made:
    """The functions, a table, and a workspace as garbage."""
    made, call = functions(), model.call()
    table, workspace = (torch.full((size,), 255, dtype=torch.uint8) for size in made.sizes(call))
    made.table(call, table)
    return made, table, workspace


def step(model: Model, made: Made | None = None) -> None:
    if made is None:
        made = made_of(model)
    made[0].step(model.call(), *made[1:], None)


def compare(steps: int = 1, bad: float | None = None, **arguments: Any) -> tuple[Model, Model]:
    arguments = {"sizes": SIZES, **arguments}
    ours, cpu = Model(**arguments), Model(**arguments)
    for i in range(steps):
        for model in (ours, cpu):
            model.set_gradients(i, bad)
        step(ours)
        on_cpu(cpu.call())
        assert_same(ours, cpu)
    return ours, cpu


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("row", RULES, ids=ident)
def test_rules(row: Any, dtype: torch.dtype) -> None:
    compare(dtypes=(dtype,) * 3, **named(row))


@pytest.mark.parametrize("row", FOLDED, ids=ident)
def test_everything_folded_in(row: Any) -> None:
    """Unscaling, clipping, shrinkage, masks, averages, copies, zeroing; mixed dtypes."""
    for mixed in (DTYPES[:1] * 3, (torch.bfloat16, torch.float16, torch.float32)):
        options = {"grad_scale": 8.0, "found_inf": 0.0, "max_norm": 1.0, "zero_grad": 1}
        options["skip_nonfinite"] = 1
        model, _ = compare(2, dtypes=mixed, extras=True, options=options, **named(row))
        assert model.norm.item() > 1.0 and model.skipped.item() == 0
        assert all((grad == 0).all() for grad in model.grads)


def test_one_model_of_many_dtypes() -> None:
    """A kind each, one launch for all."""
    parts = [Model(dtypes=(dtype,) * 3, sizes=(40, 1030), **named(RULES[4])) for dtype in DTYPES]
    twins = [Model(dtypes=(dtype,) * 3, sizes=(40, 1030), **named(RULES[4])) for dtype in DTYPES]
    for ours, theirs in zip(parts, twins, strict=True):
        ours.set_gradients(0)
        theirs.set_gradients(0)
    both = []
    for models in (parts, twins):
        whole = models[0]
        whole.table = np.concatenate([model.table for model in models])
        whole.options = {"max_norm": 0.5}
        both.append(whole)
    step(both[0])
    on_cpu(both[1].call())
    for ours, theirs in zip(parts, twins, strict=True):
        assert_same(ours, theirs)
    assert both[0].norm.item() > 1.0


@pytest.mark.parametrize("apart", [False, True])
def test_misaligned(apart: bool) -> None:
    """Views into one long array: the same shift in all arrays, or not."""
    for dtype in DTYPES[:2]:
        arguments = named(RULES[5]) | {"dtypes": (dtype,) * 3, "apart": apart}
        compare(offsets=(1, 3, 4, 7, 2), sizes=(2100, 1031, 1024, 1, 1023), **arguments)


@pytest.mark.parametrize("torch_tails", [0, 1])
def test_tails(torch_tails: int) -> None:
    compare(options={"torch_tails": torch_tails}, **named(RULES[4]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("skip", [0, 1])
def test_not_finite(bad: float, skip: int) -> None:
    options = {"max_norm": 1.0, "skip_nonfinite": skip, "zero_grad": 1}
    arguments = named(RULES[4]) | {"sizes": (5, 400)}
    before = Model(**arguments)
    ours, _ = compare(bad=bad, options=options, **arguments)
    skipped = skip and bad != 3e38
    assert ours.skipped.item() == skipped
    assert torch.equal(ours.writes[0], before.writes[0]) == bool(skipped)


def test_found_inf() -> None:
    for options in ({"found_inf": 1.0}, {"found_inf": 1.0, "max_norm": 1.0, "zero_grad": 1}):
        ours, _ = compare(2, options=options, **named(RULES[14]))
        assert ours.skipped.item() == 2


def test_norm_of_many_blocks() -> None:
    """More partial sums than there are running sums; without the update, which takes long here."""
    ours, cpu = (
        Model(sizes=[3] * 300 + [5000], options={"max_norm": 1.0}, **named(RULES[0]))
        for _ in range(2)
    )
    for model in (ours, cpu):
        model.set_gradients(0)
    made = made_of(ours)
    call, known, values = made[0]._made
    made[0]._made = call, known._replace(pieces=0), values
    step(ours, made)
    on_cpu(cpu.call())
    assert ours.norm.item() == cpu.norm.item() > 1.0


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are launched."""
    module = importlib.import_module("trimtab.kernels.optim_step")
    names: list[str] = []

    class Noted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(module, name)

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            names.append(self.name.removeprefix("optim_").removesuffix("_kernel"))
            return self.kernel[grid]

    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        monkeypatch.setattr(module, name, Noted(name))
    return names


LAMB: tuple[tuple[dict[str, Any], float | None], ...] = (
    ({"max_norm": 1.0, "grad_scale": 4.0}, None),
    ({"max_norm": 1.0, "skip_nonfinite": 1, "zero_grad": 1}, torch.nan),
)


@pytest.mark.parametrize(("options", "bad"), LAMB)
def test_lamb(options: dict[str, Any], bad: float | None, launches: list[str]) -> None:
    """More blocks than run at once, and of a tensor too; squares that are no fp32."""
    sizes = (4100, 1, 4097, 30)
    arguments = {"sizes": sizes, "extras": True, "options": options, **named(RULES[21])}
    ours, cpu = Model(**arguments), Model(**arguments)
    for model in (ours, cpu):
        model.writes[0][5] = 1e21  # of the first parameter, and so of its direction
        model.set_gradients(0, bad)
    made = made_of(ours)
    call, known, values = made[0]._made
    made[0]._made = call, known._replace(processors=1), values
    step(ours, made)
    on_cpu(cpu.call())
    assert_same(ours, cpu)
    begin = ["norm_and_constants", "probe"] if "max_norm" in options else ["prepare", "probe"]
    assert launches == [*begin, "update"]


def test_given_norm() -> None:
    ours, cpu = (Model(sizes=SIZES, options={"max_norm": 1.0}, **named(RULES[0])) for _ in range(2))
    given = torch.tensor([7.0])
    for model in (ours, cpu):
        model.set_gradients(0)
    for model in (ours, cpu):
        model.options["given_norm"] = given.data_ptr()
    step(ours)
    on_cpu(cpu.call())
    assert_same(ours, cpu)


def test_no_gradient_and_one_table_for_many_steps() -> None:
    ours, cpu = (Model(**named(RULES[4])) for _ in range(2))
    for model in (ours, cpu):
        model.table["grad"][2] = 0
    made = made_of(ours)
    for i in range(3):
        for model in (ours, cpu):
            model.set_gradients(i)
        step(ours, made)
        on_cpu(cpu.call())
        assert_same(ours, cpu)


def test_lr_tensor() -> None:
    """Read when the step is made, not when the table is."""
    ours, cpu = (Model(sizes=SIZES, **named(RULES[4])) for _ in range(2))
    lr = torch.tensor([9.0])
    ours.groups["lr_tensor"] = lr.data_ptr()
    made = made_of(ours)
    lr.fill_(0.125)
    cpu.groups["lr"] = 0.125
    for model in (ours, cpu):
        model.set_gradients(0)
    step(ours, made)
    on_cpu(cpu.call())
    assert_same(ours, cpu)


def test_nothing_to_do() -> None:
    model = Model(sizes=(), **named(RULES[4]))
    step(model)
    model = Model(sizes=(4, 5), **named(RULES[4]))
    model.table["grad"] = 0
    before = [x.clone() for x in model.writes]
    step(model)
    assert all(map(torch.equal, model.writes, before))


BAD = {
    "rule": (lambda m: m.options.update(rule=99), "expected a rule in .*, got 'rule 99'"),
    "dtype": (lambda m: m.table["state_dtype"].fill(7), "tensor 0: expected float32, bfloat16"),
    "group": (lambda m: m.table["group"].fill(2), "tensor 0: expected group to be an index"),
    "state": (lambda m: m.table["state"].fill(0), "expected all of the rule's states, got NULL"),
    "step": (lambda m: m.table["step"].fill(0), "expected step, got NULL"),
    "round_clipped": (
        lambda m: m.options.update(round_clipped=1),
        "round_clipped is the CPU's only",
    ),
    "master": (lambda m: m.table["master_kind"].fill(1), "0: expected bfloat16 where there is a m"),
    "codes": (lambda m: m.table["state_dtype"].fill(16), "expected all of the rule's states, got"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    spoil, message = BAD[case]
    model = Model(sizes=(4, 5), **named(RULES[4]))
    spoil(model)
    with pytest.raises(RuntimeError, match=message):
        made_of(model)


CODES = {"state_dtype": "int8", "min_8bit_numel": 1}
RANDOM = {"rounding": "stochastic", "seed": 2**63 + 5}
BF16 = torch.bfloat16
OPTIMIZERS: tuple[tuple[str, torch.dtype, dict[str, Any]], ...] = (
    ("AdamW", torch.float32, {"max_grad_norm": 1.0, "ema_decay": 0.9, "zero_grads": True}),
    ("NAdam", torch.float32, {"weight_decay": 0.1, "l1": 0.1}),
    ("SGD", torch.float32, {"momentum": 0.9, "skip_nonfinite": True}),
    # How states and parameters are kept.
    ("AdamW", torch.float32, {"amsgrad": True, **CODES}),
    ("RMSprop", torch.float32, {"momentum": 0.5, "centered": True, **CODES, **RANDOM}),
    ("AdamW", BF16, {**CODES, **RANDOM, "ema_decay": 0.9}),
    ("AdamW", BF16, {"state_dtype": BF16, **RANDOM, "ema_decay": 0.9}),
    ("Adagrad", BF16, {"master": "remainder", "state_dtype": torch.float32, "ema_decay": 0.9}),
    ("LAMB", torch.float32, {"max_grad_norm": 1.0, **CODES, **RANDOM}),
    ("LAMB", BF16, {"master": "remainder", "state_dtype": torch.float32, "always_adapt": True}),
    ("Lion", BF16, {"master": "kahan", "state_dtype": torch.float32, "ema_decay": 0.9, **RANDOM}),
)


@pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda c: ",".join((c[0], *c[2])))
def test_optimizers(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As trimtab.optim steps the parameters of a GPU."""
    name, dtype, options = case
    params = optim_cases.parameters((1, 7, (3, 11), 1300), dtype)
    twins = optim_cases.clones(params)
    ours, theirs = (getattr(optim, name)(p, lr=0.05, **options) for p in (params, twins))
    for optimizer, last in ((ours, params[-1]), (theirs, twins[-1])):
        optimizer.set_mask(last, torch.arange(1300) % 5 != 0)
    for i in range(2):
        optim_cases.set_gradients(i, params, twins)
        theirs.step()
        with monkeypatch.context() as patch:
            gpu = optim_on_sim.Gpu(None)
            patch.setattr(device, "runner", lambda *_, gpu=gpu: device.CudaRunner(gpu, functions()))
            ours.step()
    optim_cases.assert_same(ours, theirs)
    assert isinstance(ours._plan.runs[0].runner, device.CudaRunner)
    assert isinstance(theirs._plan.runs[0].runner, device.HostRunner)


@triton.jit
def there_and_back(
    table, x, codes, scale: tl.int64, back, SIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    scale = scale.to(tl.int64)  # the interpreter makes an int32 of an address that fits
    offs = tl.arange(0, BLOCK)
    c = encode(table, tl.load(x + offs), scale, offs, None, None, SIGNED, False, BLOCK)
    tl.store(codes + offs, c)
    tl.store(back + offs, decode(table, c, scale, offs, None, SIGNED))


@pytest.mark.parametrize("signed", [True, False])
def test_codes(signed: bool) -> None:
    """Values over all decades, zeros, NaN, Inf, tiny and huge blocks: as tt_optim_encode has them."""
    n = 1 << 16
    x = torch.exp(torch.linspace(-18, 0, n))[torch.randperm(n)]
    if signed:
        x[::2] *= -1
    x[::256] = 1.0
    x[256 * 3 + 5], x[256 * 4 + 7] = torch.inf, torch.nan
    for block, factor in ((5, 0.0), (6, 1e-39), (7, 3e38)):
        x[256 * block : 256 * block + 256] *= factor
    ours, theirs = (
        (torch.zeros(n, dtype=torch.uint8), torch.zeros(n // 256), torch.zeros(n)) for _ in range(2)
    )
    codes, scale, back = ours
    table = torch.from_numpy(dynamic_code(signed))
    there_and_back[(1,)](table, x, codes, scale.data_ptr(), back, SIGNED=signed, BLOCK=n)
    codes, scale, back = theirs
    library.encode(x.data_ptr(), n, signed, codes.data_ptr(), scale.data_ptr())
    library.decode(codes.data_ptr(), scale.data_ptr(), n, signed, back.data_ptr())
    assert torch.equal(ours[0], theirs[0])
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
