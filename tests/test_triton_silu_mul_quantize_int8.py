"""silu_mul_quantize_int8 in Triton: the bits, interpreted; the instructions, compiled for GPUs not here."""

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
from trimtab.kernels.silu_mul_quantize_int8 import silu_mul_quantize_int8_kernel

in_interpreter = interpreted("interpreted_silu_mul_quantize_int8.py")

CONFIGS = sorted({row.config for rows in tuning.QUANTIZE_INT8.values() for row in rows})


def compiled(capability: int, config: tuning.QuantizeConfig, dtype: str, align: int) -> Compiled:
    arguments = {
        "gate_ptr": f"*{dtype}",
        "up_ptr": f"*{dtype}",
        "q_ptr": "*i8",
        "scale_ptr": "*fp32",
        "M": 4096,
        "K": 4096 if align > 1 else 1023,
        "stride_gm": 4096,
        "stride_gk": 1,
        "stride_um": 4096,
        "stride_uk": 1,
        "ALIGN": align,
        **config.blocks(),
    }
    kernel = compile_kernel(silu_mul_quantize_int8_kernel, capability, arguments, config.options())
    expect_exact(kernel, division=True)
    assert kernel.local_bytes == 0
    return kernel


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_compiles_to_exact_arithmetic(config: tuning.QuantizeConfig, capability: int) -> None:
    kernel = compiled(capability, config, "bf16", 16)
    assert kernel.count(r"\bld\.global\S*\.v4\.b32") > 0  # 16 bytes a load


@pytest.mark.parametrize(("dtype", "align"), [("fp32", 16), ("fp16", 16), ("bf16", 1)])
def test_compiles_for_every_dtype_and_odd_rows(dtype: str, align: int) -> None:
    compiled(90, CONFIGS[0], dtype, align)


def test_interpreted(in_interpreter: subprocess.Popen[str]) -> None:
    expect_passed(in_interpreter)
