"""bitmap_linear in Triton: values, interpreted; instructions, compiled for GPUs not here."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("triton")

from triton_aot import compile_kernel
from triton_interpret import expect_passed, interpreted

from trimtab.kernels import tuning

kernel = importlib.import_module("trimtab.kernels.bitmap_linear")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "i8": torch.int8}
in_interpreter = interpreted("interpreted_bitmap_linear.py")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles(capability: int, dtype: str) -> None:
    int8, (block_k, num_warps) = dtype == "i8", kernel.tile_of(DTYPES[dtype])
    arguments = {
        "x_ptr": f"*{dtype}",
        "values_ptr": f"*{dtype}",
        "words_ptr": "*i32",
        "row_start_ptr": "*i64",
        "x_scale_ptr": "*fp32" if int8 else None,
        "w_scale_ptr": "*fp32" if int8 else None,
        "bias_ptr": "*bf16",
        "out_ptr": "*bf16",
        "sums_ptr": "*i32" if int8 else "*fp32",
        "M": 31 if dtype == "bf16" else 15,
        "N": 4096,
        "K": 4096,
        "words": 128,
        "count": 5_000_001,
        "share": 15,
        "stride_xm": 4096,
        "stride_xk": 1,
        "ACTIVATION": "none",
        "BLOCK_M": 32 if dtype == "bf16" else 16,
        "BLOCK_N": kernel.BLOCK_N,
        "BLOCK_K": block_k,
        "COUNTED": kernel.COUNTED,
    }
    options = {"num_warps": num_warps, "num_stages": 3, **tuning.EXACT}
    options |= tuning.registers(kernel.REGISTERS)
    compiled = compile_kernel(kernel.bitmap_linear_kernel, capability, arguments, options)
    products = {"bf16": r"\.f32\.bf16\.bf16", "i8": r"\.s32\.s8\.s8"}
    if dtype in products:
        assert compiled.count(r"\bw?g?mma\S*" + products[dtype]) > 0
    else:
        assert compiled.count(r"tf32") == 0 and compiled.count(r"\bfma\.rn\.f32") > 0
    assert compiled.count(r"\bpopc\.b32") > 0
    assert compiled.local_bytes == 0, f"{compiled.registers} registers spill"
    assert compiled.shared_bytes <= tuning.SHARED_LIMIT["small"]


def test_interpreted(in_interpreter: subprocess.Popen[str]) -> None:
    expect_passed(in_interpreter)
