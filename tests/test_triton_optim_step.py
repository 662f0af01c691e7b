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

from trimtab.kernels import tuning

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
}


def kind(
    variant: int, param: int = 0, grad: int = 0, state: int = 0, copy: int = 0, more: int = 0
) -> int:
    """As optim_table.kinds_of packs it; dtypes: 0 fp32, 1 bf16, 2 fp16; copy: 1 more."""
    return variant | param << 5 | grad << 7 | state << 9 | copy << 11 | more


MASK, EMA, TAILS = 1 << 13, 1 << 14, 1 << 15


def compiled(name: str, capability: int, **arguments: object) -> Compiled:
    given = {"num_warps": optim_step.NUM_WARPS, **tuning.EXACT}
    kernel = compile_kernel(
        getattr(optim_step, f"optim_{name}_kernel"), capability, arguments, given
    )
    # The formulas' own fma, and nothing that rounds otherwise or flushes.
    assert (
        kernel.count(r"\bdiv\.(full|approx)|\b(rcp|sqrt|rsqrt|ex2|lg2|tanh)\.approx|\.ftz\b") == 0
    )
    assert kernel.count(r"\bfma\.(?!rn\.f(32|64))") == 0
    assert kernel.local_bytes == 0  # no spills
    return kernel


def update(capability: int, rule: str, *kinds: int, zero_grad: bool = False) -> Compiled:
    return compiled(
        "update",
        capability,
        table_ptr="*i64",
        pieces_ptr="*i64",
        facts_ptr="*fp32",
        constants_ptr="*fp32",
        tiles=3,
        ema_rest=0.1,
        RULE=rule,
        KINDS=kinds,
        ZERO_GRAD=zero_grad,
        BLOCK=optim_step.TILE,
    )


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("rule", VARIANTS)
def test_update(rule: str, capability: int) -> None:
    kernel = update(capability, rule, kind(VARIANTS[rule]))
    loads = 2 * (2 + optim_step.states_of(rule, VARIANTS[rule]))
    assert (
        kernel.count(r"\bld\.global\S*\.v4\.b32") == loads
    )  # 16 bytes each, eight elements a thread


def test_norm() -> None:
    compiled(
        "norm",
        80,
        table_ptr="*i64",
        blocks_ptr="*i64",
        sums_ptr="*fp64",
        n_blocks=1000,
        DTYPES=(0, 1),
        MASKED=True,
        ROWS=optim_step.NORM_ROWS,
    )


@pytest.mark.parametrize("rule", ["Adagrad", "NAdam", "RAdam"])
def test_prepare(rule: str) -> None:
    compiled(
        "prepare",
        80,
        table_ptr="*i64",
        groups_ptr="*i64",
        facts_ptr="*fp32",
        constants_ptr="*fp32",
        sums_ptr="*fp64",
        grad_scale=2**40,
        found_inf=2**40,
        given_norm=2**40,
        norm_at=2**40,
        skipped_at=2**40,
        max_norm_bits=2**62,
        n_rows=33,
        n_blocks=99,
        RULE=rule,
        WANTS_NORM=True,
        SUMS_SQUARES=True,
        SKIP_NONFINITE=True,
        ROWS=optim_step.PREPARE_ROWS,
    )


def test_interpreted(in_interpreter: subprocess.Popen[str]) -> None:
    expect_passed(in_interpreter)
