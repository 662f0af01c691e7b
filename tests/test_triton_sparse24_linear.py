"""sparse24_linear in Triton: values, interpreted; instructions, compiled for GPUs not here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("triton")

from triton_aot import compile_kernel
from triton_interpret import expect_passed, interpreted

from trimtab.kernels import tuning
from trimtab.kernels.sparse24_linear import config_of, sparse24_linear_kernel

in_interpreter = interpreted("interpreted_sparse24_linear.py")


@pytest.mark.parametrize("M", [1, 512])
@pytest.mark.parametrize("dtype", ["bf16", "i8"])
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_to_tensor_cores(capability: int, dtype: str, M: int) -> None:
    int8, config = dtype == "i8", config_of(M)
    arguments = {
        "x_ptr": f"*{dtype}",
        "values_ptr": f"*{dtype}",
        "metadata_ptr": "*i32",
        "x_scale_ptr": "*fp32" if int8 else None,
        "w_scale_ptr": "*fp32" if int8 else None,
        "bias_ptr": "*fp32",
        "out_ptr": "*bf16",
        **dict.fromkeys(("M", "N", "K", "stride_xm"), 4096),
        "stride_xk": 1,
        "stride_vn": 2048,
        "ACTIVATION": "none",
        "INT8": int8,
        **config.blocks(),
    }
    kernel = compile_kernel(sparse24_linear_kernel, capability, arguments, config.options())
    product = r"\.s32\.s8\.s8" if int8 else r"\.f32\.bf16\.bf16"
    assert kernel.count(r"\bw?g?mma\S*" + product) > 0
    assert kernel.local_bytes == 0, f"{kernel.registers} registers, {kernel.local_bytes} B spilled"
    assert kernel.shared_bytes <= tuning.SHARED_LIMIT["small"]


def test_interpreted(in_interpreter: subprocess.Popen[str]) -> None:
    expect_passed(in_interpreter)
