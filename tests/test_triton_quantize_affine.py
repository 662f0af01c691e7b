"""quantize_affine in Triton: the bits, interpreted; the instructions, compiled for GPUs not here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("triton")

from triton_aot import compile_kernel, expect_exact
from triton_interpret import expect_passed, interpreted

from trimtab.kernels import tuning
from trimtab.kernels.quantize_affine import quantize_affine_kernel

in_interpreter = interpreted("interpreted_quantize_affine.py")

CONFIGS = sorted({row.config for rows in tuning.QUANTIZE_INT8.values() for row in rows})


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_compiles_to_exact_arithmetic(config: tuning.QuantizeConfig, capability: int) -> None:
    """IEEE arithmetic only: the divisions round, nothing is fused, no subnormal is flushed."""
    arguments = {
        "x_ptr": "*bf16",
        "q_ptr": "*u8",
        "scale_ptr": "*fp32",
        "zero_ptr": "*u8",
        "count": 4096,
        "K": 4096,
        "groups": 32,
        "group": 128,
        "stride_xm": 4096,
        "stride_xk": 1,
        "LEVELS": 255.0,
        **config.blocks(),
    }
    kernel = compile_kernel(quantize_affine_kernel, capability, arguments, config.options())
    expect_exact(kernel, division=True)
    assert kernel.local_bytes == 0


def test_interpreted(in_interpreter: subprocess.Popen[str]) -> None:
    expect_passed(in_interpreter)
