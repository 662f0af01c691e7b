"""The activations in Triton: the bits, interpreted; the instructions, compiled for GPUs not here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("triton")

from triton_activation import activation_kernel
from triton_aot import compile_kernel, expect_exact
from triton_interpret import expect_passed, interpreted

from trimtab.kernels import tuning
from trimtab.kernels.activation import ACTIVATIONS

in_interpreter = interpreted("interpreted_activation.py")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_exact_arithmetic(activation: str, capability: int) -> None:
    """Every + - * and / rounds by itself; NUMERICS.md section 4."""
    arguments = {
        "x_ptr": "*fp32",
        "out_ptr": "*fp32",
        "n": 4096,
        "ACTIVATION": activation,
        "BLOCK": 1024,
    }
    kernel = compile_kernel(activation_kernel, capability, arguments, tuning.EXACT)
    expect_exact(kernel, division=activation not in ("none", "relu"))
    assert kernel.local_bytes == 0


def test_interpreted(in_interpreter: subprocess.Popen[str]) -> None:
    expect_passed(in_interpreter)
