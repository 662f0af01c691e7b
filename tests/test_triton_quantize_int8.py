"""quantize_int8 in Triton: the bits, interpreted; the instructions, compiled for GPUs not here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("triton")

from triton_aot import Compiled, compile_kernel, expect_exact
from triton_interpret import expect_passed, interpreted

from trimtab.kernels import tuning
from trimtab.kernels.quantize_int8 import quantize_int8_kernel

in_interpreter = interpreted("interpreted_quantize_int8.py")

CONFIGS = sorted({row.config for rows in tuning.QUANTIZE_INT8.values() for row in rows})


def compiled(
    capability: int,
    config: tuning.QuantizeConfig,
    dtype: str = "bf16",
    K: int = 4096,
    align: int = 16,
    stride_xk: int = 1,
) -> Compiled:
    arguments = {
        "x_ptr": f"*{dtype}",
        "q_ptr": "*i8",
        "scale_ptr": "*fp32",
        "M": 4096,
        "K": K,
        "K_Q": K,
        "stride_xm": K * stride_xk,
        "stride_xk": stride_xk,
        "stride_qm": K,
        "stride_qk": 1,
        "stride_sm": 1,
        "ALIGN": align,
        **config.blocks(),
    }
    kernel = compile_kernel(quantize_int8_kernel, capability, arguments, config.options())
    expect_exact(kernel, division=True)
    assert kernel.local_bytes == 0
    return kernel


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_compiles_to_exact_arithmetic(config: tuning.QuantizeConfig, capability: int) -> None:
    kernel = compiled(capability, config)
    assert kernel.count(r"\bld\.global\S*\.v4\.b32") > 0  # 16 bytes a load
    assert kernel.registers <= 64


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_compiles_for_every_dtype(dtype: str) -> None:
    compiled(90, CONFIGS[-1], dtype)


def test_rows_of_8_elements_are_loaded_8_at_a_time() -> None:
    assert compiled(90, CONFIGS[0], K=1000, align=8).count(r"\bld\.global\S*\.v4\.b32") > 0


@pytest.mark.parametrize(("K", "stride_xk"), [(1023, 1), (4096, 3)], ids=["odd", "strided"])
def test_compiles_for_odd_rows(K: int, stride_xk: int) -> None:
    compiled(90, CONFIGS[0], K=K, align=1, stride_xk=stride_xk)


def test_interpreted(in_interpreter: subprocess.Popen[str]) -> None:
    expect_passed(in_interpreter)
