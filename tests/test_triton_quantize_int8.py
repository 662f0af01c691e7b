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
    capability: int, config: tuning.QuantizeConfig, dtype: str, K: int, stride_xk: int = 1
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
        **config.blocks(),
    }
    return compile_kernel(quantize_int8_kernel, capability, arguments, config.options())


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_compiles_to_exact_arithmetic(config: tuning.QuantizeConfig, capability: int) -> None:
    kernel = compiled(capability, config, "bf16", 4096)
    expect_exact(kernel, division=True)
    assert kernel.local_bytes == 0
    # 16 bytes a load; a thread with fewer than 8 elements has less to take.
    assert kernel.count(r"\bld\.global\S*\.v4\.b32") > 0
    assert kernel.registers <= 64


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_compiles_for_every_dtype(dtype: str) -> None:
    expect_exact(compiled(90, CONFIGS[-1], dtype, 4096), division=True)


@pytest.mark.parametrize(("K", "stride_xk"), [(1023, 1), (4096, 3)], ids=["odd", "strided"])
def test_compiles_for_odd_rows(K: int, stride_xk: int) -> None:
    expect_exact(compiled(90, CONFIGS[0], "bf16", K, stride_xk), division=True)


def test_interpreted(in_interpreter: subprocess.Popen[str]) -> None:
    expect_passed(in_interpreter)
