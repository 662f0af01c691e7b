"""optim_step in Triton: the bits, interpreted; the instructions, compiled for GPUs not here."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("triton")

from triton_aot import Compiled, compile_kernel
from triton_interpret import expect_passed, interpreted

from trimtab.kernels import optim_table, tuning
from trimtab.kernels.optim_rules import states_of

optim_step = importlib.import_module("trimtab.kernels.optim_step")
in_interpreter = interpreted("interpreted_optim_step.py")

# The variant of each rule with the most work, without torch's tails.
VARIANTS = {
    "SGD": 7,
    "Adam": 3,
    "Adagrad": 1,
    "RMSprop": 7,
    "NAdam": 1,
    "RAdam": 1,
    "Adamax": 1,
    "Lion": 0,
    "LAMB": 0,
}
BF16, CODES = 1, 3  # as a kind has them; fp32 is 0


def kind(
    variant: int,
    param: int = 0,
    grad: int = 0,
    state: int = 0,
    copy: int = 0,
    master: int = 0,
    flags: int = 0,
) -> int:
    """As optim_table.kinds_of packs it; copy: dtype + 1."""
    return variant | param << 5 | grad << 7 | state << 9 | copy << 11 | master << 16 | flags


EXTRAS = (optim_table.HAS_MASK | optim_table.HAS_EMA | optim_table.TAILS).value
STOCHASTIC = optim_table.STOCHASTIC.value


def compiled(
    name: str, capability: int, most_registers: int | None = None, **arguments: object
) -> Compiled:
    given = {"num_warps": optim_step.NUM_WARPS, **tuning.EXACT}
    given |= tuning.registers(most_registers)
    kernel = compile_kernel(
        getattr(optim_step, f"optim_{name}_kernel"), capability, arguments, given
    )
    # The formulas' own fma, and nothing that rounds otherwise or flushes but a float64 log's first guess,
    # which the formula makes exact.
    inexact = r"\bdiv\.(full|approx)|\b(rcp|sqrt|rsqrt|ex2|lg2|tanh)\.approx|\.ftz\b"
    guesses = 1 if arguments.get("RULE") == "Adafactor" else 0
    assert kernel.count(inexact) == kernel.count(r"\brcp\.approx\.ftz\.f64\b") == guesses
    assert kernel.count(r"\bfma\.(?!rn\.f(32|64))") == 0
    assert kernel.local_bytes == 0  # no spills
    return kernel


def update(capability: int, rule: str, *kinds: int, zero_grad: bool = False) -> Compiled:
    return compiled(
        "update",
        capability,
        optim_step.most_registers(rule, kinds),
        table_ptr="*i64",
        pieces_ptr="*i64",
        facts_ptr="*fp32",
        constants_ptr="*fp32",
        codes_ptr="*fp32",
        keys_ptr="*i32",
        tiles=3,
        ema_rest=0.1,
        RULE=rule,
        KINDS=kinds,
        ZERO_GRAD=zero_grad,
        BLOCK=optim_step.TILE,
        EDGE=optim_step.EDGE,
    )


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("rule", VARIANTS)
def test_update(rule: str, capability: int) -> None:
    kernel = update(capability, rule, kind(VARIANTS[rule]))
    loads = 2 * (2 + states_of(rule, VARIANTS[rule]))
    assert (
        kernel.count(r"\bld\.global\S*\.v4\.b32") == loads
    )  # 16 bytes each, eight elements a thread


FORMATS = {
    "bf16": {"param": BF16, "grad": BF16, "state": BF16},
    "bf16_everything": {"param": BF16, "grad": BF16, "copy": 3, "flags": EXTRAS},
    "codes": {"param": BF16, "grad": BF16, "state": CODES},
    "codes_stochastic": {"param": BF16, "grad": BF16, "state": CODES, "flags": STOCHASTIC},
    "bf16_stochastic": {"param": BF16, "grad": BF16, "state": BF16, "flags": STOCHASTIC},
    "kahan": {"param": BF16, "grad": BF16, "master": 1},
    "remainder": {"param": BF16, "grad": BF16, "master": 2, "flags": EXTRAS},
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str, capability: int) -> None:
    kernel = update(capability, "Adam", kind(VARIANTS["Adam"], **FORMATS[name]), zero_grad=True)
    # Stochastic codes of three states keep a tile's candidates: no spill, but two blocks a processor.
    assert kernel.registers <= {"codes_stochastic": 232, "codes": 168}.get(name, 128)


@pytest.mark.parametrize("flags", [0, STOCHASTIC], ids=["nearest", "stochastic"])
def test_everything_and_codes(flags: int) -> None:
    """Once with 8 bytes of stack on 8.0: without a budget ptxas spills to fit 128 registers."""
    formats = {"param": BF16, "grad": BF16, "state": CODES, "copy": 3, "flags": EXTRAS | flags}
    master = 1 if flags else 2
    given = kind(VARIANTS["SGD"], **formats, master=master)
    kernel = update(80, "SGD", given, zero_grad=True)
    assert kernel.registers <= 128


def test_kinds_in_one_kernel() -> None:
    update(80, "Adam", *(kind(v, param=d, grad=d) for v in (0, 1) for d in (0, BF16)))


NORM = {"table_ptr": "*i64", "blocks_ptr": "*i64", "sums_ptr": "*fp64", "n_blocks": 1000}
NORM_META = {"DTYPES": (0, 1), "MASKED": True, "NORM_ROWS": optim_step.NORM_ROWS}
FACTS = {
    "facts_ptr": "*fp32",
    "sums_ptr": "*fp64",
    "grad_scale": 2**40,
    "found_inf": 2**40,
    "given_norm": 2**40,
    "norm_at": 2**40,
    "skipped_at": 2**40,
    "max_norm_bits": 2**62,
    "n_blocks": 99,
    "WANTS_NORM": True,
    "SUMS_SQUARES": True,
    "SKIP_NONFINITE": True,
}
MAKING = {
    "groups_ptr": "*i64",
    "constants_ptr": "*fp32",
    "keys_ptr": "*i32",
    "counts_ptr": "*i32",
    "seed": 2**40,
    "n_rows": 33,
    "RANDOM": True,
    "ROWS": optim_step.PREPARE_ROWS,
}


def test_norm() -> None:
    compiled("norm", 80, **NORM, **NORM_META)


@pytest.mark.parametrize("rule", ["Adagrad", "NAdam", "RAdam", "Adafactor"])
def test_prepare(rule: str) -> None:
    compiled("prepare", 80, table_ptr="*i64", RULE=rule, **FACTS, **MAKING)


# --- LAMB's


@pytest.mark.parametrize("capability", [80, 90])
def test_norm_and_constants(capability: int) -> None:
    given = {**NORM, **NORM_META, **MAKING}
    compiled("norm_and_constants", capability, norm_grid=9, RULE="LAMB", **given)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["fp32", "bf16_everything", "codes", "remainder"])
def test_probe(name: str, capability: int) -> None:
    kernel = compiled(
        "probe",
        capability,
        optim_step.REGISTERS,
        table_ptr="*i64",
        blocks_ptr="*i64",
        codes_ptr="*fp32",
        constants_ptr="*fp32",
        keys_ptr="*i32",
        probe_sums_ptr="*fp64",
        counts_ptr="*i32",
        n_rows=33,
        PREPARES=True,
        RULE="LAMB",
        KINDS=(kind(0, **FORMATS.get(name, {})),),
        ROWS=optim_step.PREPARE_ROWS,
        **FACTS,
    )
    # The last of a tensor's programs sees what the others stored.
    assert kernel.count(r"\batom\.(global\.)?(gpu\.)?(global\.)?acq_rel") == 1
    assert kernel.count(r"\bld\.global\.cg") > 0
    assert kernel.registers <= 128


def test_interpreted(in_interpreter: subprocess.Popen[str]) -> None:
    expect_passed(in_interpreter)
