"""rms_norm_quantize_int8 in Triton: the bits, interpreted; the instructions, compiled for GPUs not here."""

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
from trimtab.kernels.rms_norm_quantize_int8 import NUM_WARPS, rms_norm_quantize_int8_kernel

in_interpreter = interpreted("interpreted_rms_norm_quantize_int8.py")


def compiled(capability: int, dtype: str, weight: str, align: int) -> Compiled:
    arguments = {
        "x_ptr": f"*{dtype}",
        "weight_ptr": f"*{weight}",
        "q_ptr": "*i8",
        "scale_ptr": "*fp32",
        "K": 4096 if align > 1 else 1023,
        "eps": 1e-6,
        "stride_xm": 4096,
        "stride_xk": 1,
        "ALIGN": align,
    }
    options = {"num_warps": NUM_WARPS, **tuning.EXACT}
    kernel = compile_kernel(rms_norm_quantize_int8_kernel, capability, arguments, options)
    expect_exact(kernel, division=True)
    assert kernel.local_bytes == 0
    return kernel


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("weight", ["bf16", "fp32"])
def test_compiles_to_exact_arithmetic(weight: str, capability: int) -> None:
    kernel = compiled(capability, "bf16", weight, 16)
    assert kernel.count(r"\bld\.global\S*\.v4\.b32") > 0  # 16 bytes a load
    assert kernel.count(r"\bsqrt\.rn\.f32") > 0


@pytest.mark.parametrize(("dtype", "align"), [("fp32", 16), ("fp16", 16), ("bf16", 1)])
def test_compiles_for_every_dtype_and_odd_rows(dtype: str, align: int) -> None:
    compiled(90, dtype, dtype, align)


def test_interpreted(in_interpreter: subprocess.Popen[str]) -> None:
    expect_passed(in_interpreter)
