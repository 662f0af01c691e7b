"""Adafactor in Triton: the bits, interpreted; the instructions, compiled for GPUs not here."""

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

from trimtab.kernels import adafactor_table, optim_table, tuning

adafactor = importlib.import_module("trimtab.kernels.adafactor")
in_interpreter = interpreted("interpreted_adafactor.py")

POINTERS = {
    "table_ptr": "*i64",
    "shapes_ptr": "*i64",
    "list_ptr": "*i64",
    "facts_ptr": "*fp32",
    "constants_ptr": "*fp32",
}
FACTORS = {"row_factor_ptr": "*fp32", "column_factor_ptr": "*fp32"}
SUMS = {"row_parts_ptr": "*fp64", "column_parts_ptr": "*fp32"}
BF16 = 1  # as a kind has it; fp32 is 0


def kind(variant: int, param: int = 0, grad: int = 0, state: int = 0) -> int:
    places = optim_table.PARAM_AT, optim_table.GRAD_KIND_AT, optim_table.STATE_AT
    return variant | sum(n << at.value for n, at in zip((param, grad, state), places))


MATRIX, LARGE = adafactor_table.MATRIX.value, adafactor_table.LARGE.value
# A vector, a matrix, one of more than 2^31 elements.
KINDS = kind(0), kind(MATRIX), kind(MATRIX, BF16, BF16, BF16), kind(MATRIX | LARGE)


def compiled(name: str, capability: int, **arguments: object) -> Compiled:
    given = {"num_warps": adafactor.NUM_WARPS, **tuning.EXACT}
    given |= tuning.registers(adafactor.REGISTERS if name == "direction" else None)
    kernel = compile_kernel(
        getattr(adafactor, f"adafactor_{name}_kernel"), capability, arguments, given
    )
    # The formulas' own fma, and nothing that rounds otherwise or flushes.
    inexact = r"\bdiv\.(full|approx)|\b(rcp|sqrt|rsqrt|ex2|lg2|tanh)\.approx\.f|\.ftz\b"
    assert kernel.count(inexact) == 0
    assert kernel.count(r"\bfma\.(?!rn\.f(32|64))") == 0
    assert kernel.local_bytes == 0  # no spills
    return kernel


@pytest.mark.parametrize("capability", [80, 90])
def test_squares(capability: int) -> None:
    compiled("squares", capability, **POINTERS, **SUMS, KINDS=KINDS[:1] + KINDS[2:3])


@pytest.mark.parametrize("capability", [80, 90])
def test_average_and_factors(capability: int) -> None:
    given = {key: value for key, value in POINTERS.items() if key != "list_ptr"}
    given |= {"rows_ptr": "*i64", "columns_ptr": "*i64", **FACTORS, **SUMS, "means_ptr": "*fp64"}
    compiled("average", capability, **given, n_rows=99, KINDS=KINDS[:1] + KINDS[2:3])
    given = {key: POINTERS[key] for key in ("table_ptr", "shapes_ptr", "list_ptr", "facts_ptr")}
    given |= {"groups_ptr": "*i64", "row_factor_ptr": "*fp32", "means_ptr": "*fp64"}
    compiled("factors", capability, **given)


@pytest.mark.parametrize("capability", [80, 90])
def test_direction(capability: int) -> None:
    kernel = compiled(
        "direction", capability, **POINTERS, **FACTORS, groups_ptr="*i64", sums_ptr="*fp64",
        counts_ptr="*i32", n_blocks=99, KINDS=KINDS,
    )  # fmt: skip
    # The last of a tensor's programs sees what the others stored.
    assert kernel.count(r"\batom\.(global\.)?(gpu\.)?(global\.)?acq_rel") == 1
    assert kernel.count(r"\bld\.global\.cg") > 0


@pytest.mark.parametrize("capability", [80, 90])
def test_apply(capability: int) -> None:
    given = {"tiles": 3, "ZERO_GRAD": True, "BLOCK": adafactor.TILE, "EDGE": adafactor.EDGE}
    kernel = compiled("apply", capability, **POINTERS, **FACTORS, **given, KINDS=KINDS[1:2])
    assert kernel.count(r"\bld\.global\S*\.v4\.b32") == 4  # of p and g, eight elements a thread
    compiled("apply", capability, **POINTERS, **FACTORS, **given, KINDS=KINDS)


def test_interpreted(in_interpreter: subprocess.Popen[str]) -> None:
    expect_passed(in_interpreter)
