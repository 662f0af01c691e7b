"""block_linear in Triton: values, interpreted; instructions, compiled for GPUs not here."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("triton")

from triton_aot import Compiled, compile_kernel
from triton_interpret import expect_passed, interpreted

from trimtab.kernels import tuning
from trimtab.kernels.block_groups import STAGES

kernel = importlib.import_module("trimtab.kernels.block_linear")
gradient = importlib.import_module("trimtab.kernels.block_grad_values")
in_interpreter = interpreted("interpreted_block_linear.py")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "i8": torch.int8}
PRODUCTS = {"bf16": r"\.f32\.bf16\.bf16", "i8": r"\.s32\.s8\.s8"}


def expect_fits(compiled: Compiled, capability: int, dtype: str) -> None:
    if dtype in PRODUCTS:
        assert compiled.count(r"\bw?g?mma\S*" + PRODUCTS[dtype]) > 0
    else:
        assert compiled.count(r"tf32") == 0 and compiled.count(r"\bfma\.rn\.f32") > 0
    assert compiled.local_bytes == 0, f"{compiled.registers} registers spill"
    assert compiled.shared_bytes <= tuning.SHARED_LIMIT["sm90" if capability == 90 else "small"]


@pytest.mark.parametrize(
    ("dtype", "M", "block"),
    [("bf16", 8192, (64, 64)), ("i8", 1, (32, 32)), ("i8", 8192, (1, 16)), ("fp32", 512, (1, 16))],
    ids=str,
)
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles(capability: int, dtype: str, M: int, block: tuple[int, int]) -> None:
    int8, (bn, bk) = dtype == "i8", block
    tile = kernel.tile_of(M, bn, DTYPES[dtype])
    arguments = {
        "x_ptr": f"*{dtype}",
        "values_ptr": f"*{dtype}",
        "crow_ptr": "*i32",
        "col_ptr": "*i32",
        "x_scale_ptr": "*fp32" if int8 else None,
        "w_scale_ptr": "*fp32" if int8 else None,
        "bias_ptr": "*bf16",
        "out_ptr": "*bf16",
        "sums_ptr": "*i32" if int8 else "*fp32",
        "M": 999,
        "N": 4096,
        "K": 4096,
        "blocks": 7001,
        "rows": 99,
        "each": 13,
        "programs": 333,
        "stride_xm": 4096,
        "stride_xk": 1,
        "ACTIVATION": "none",
        "BN": bn,
        "BK": bk,
        "ALIGN": 16,
        "LEVELS": 2,
        **tile._asdict(),
    }
    options = {"num_warps": tile.num_warps, "num_stages": STAGES, **tuning.EXACT}
    compiled = compile_kernel(kernel.block_linear_kernel, capability, arguments, options)
    expect_fits(compiled, capability, dtype)
    if tile.BLOCK_N > 1:  # 16 bytes at once, behind the columns' numbers
        assert compiled.count(r"\bcp\.async\.cg\S*.* 0x10\b") > 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("capability", [80, 90])
def test_gradient_compiles(capability: int, dtype: str) -> None:
    arguments = {
        "grad_ptr": f"*{dtype}",
        "x_ptr": f"*{dtype}",
        "out_ptr": f"*{dtype}",
        "crow_ptr": "*i32",
        "col_ptr": "*i32",
        "M": 8191,
        "N": 4096,
        "K": 4096,
        "blocks": 7001,
        "rows": 99,
        "share": 999,
        "size": 2**20 - 1,
        "stride_gm": 4096,
        "stride_gn": 1,
        "stride_xm": 4096,
        "stride_xk": 1,
        "BN": 64,
        "BK": 64,
        "ALIGN": 16,
        "ALIGN_N": 16,
        "LEVELS": 2,
        **gradient.tile_of(64, DTYPES[dtype])._asdict(),
    }
    options = {"num_warps": gradient.NUM_WARPS, "num_stages": STAGES, **tuning.EXACT}
    compiled = compile_kernel(gradient.block_grad_values_kernel, capability, arguments, options)
    expect_fits(compiled, capability, dtype)
    assert compiled.count(r"\bcp\.async\.cg\S*.* 0x10\b") > 0


def test_interpreted(in_interpreter: subprocess.Popen[str]) -> None:
    expect_passed(in_interpreter)
