"""int8_weight_mm in Triton: values, interpreted; instructions, compiled for GPUs not here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("triton")

from triton_aot import Compiled, compile_kernel, expect_exact
from triton_interpret import expect_passed, interpreted

from trimtab.kernels import tuning
from trimtab.kernels.int8_weight_mm import fit_group, int8_weight_mm_kernel

in_interpreter = interpreted("interpreted_int8_weight_mm.py")

# The chips that each table of tuning.py is compiled for here.
CHIPS = {"sm90": [90], "sm80": [80], "small": [86], "strided": [80, 90]}
TABLES = {"bf16": tuning.INT8_WEIGHT_MM, "fp32": tuning.INT8_WEIGHT_MM_FP32}
CONFIGS = sorted(
    {
        (family, capability, dtype, row.config)
        for dtype, table in TABLES.items()
        for family, rows in table.items()
        for row in rows
        for capability in CHIPS[family]
    }
)


def compiled(capability: int, config: tuning.MatmulConfig, dtype: str, **changes: Any) -> Compiled:
    """4096 cubed, with a bias, unless changed."""
    arguments = {
        "a_ptr": f"*{dtype}",
        "b_ptr": "*i8",
        "b_scale_ptr": "*fp32",
        "zero_ptr": None,
        "bias_ptr": "*bf16",
        "out_ptr": "*fp32",
        **dict.fromkeys(("M", "N", "K", "group_size"), 4096),
        **dict.fromkeys(("stride_am", "stride_bn", "stride_om"), 4096),
        **dict.fromkeys(("stride_ak", "stride_bk", "stride_on"), 1),
        "ACTIVATION": "gelu",
        "GROUPED": False,
        "ALIGN": 16,
        **config.blocks(),
        **changes,
    }
    return compile_kernel(int8_weight_mm_kernel, capability, arguments, config.options())


@pytest.mark.parametrize(("family", "capability", "dtype", "config"), CONFIGS, ids=str)
def test_every_config_fits(
    family: str, capability: int, dtype: str, config: tuning.MatmulConfig
) -> None:
    odd = {
        "K": 1023,
        "group_size": 1023,
        "stride_am": 1023,
        "stride_bn": 1023,
        "ALIGN": 1,
        "ACTIVATION": "relu",
    }
    kernel = compiled(capability, config, dtype, **(odd if family == "strided" else {}))
    assert kernel.local_bytes == 0, f"{kernel.registers} registers, {kernel.local_bytes} B spilled"
    assert kernel.shared_bytes <= tuning.SHARED_LIMIT[family]
    if dtype == "fp32":  # the sum is fp32 fma, by design: nothing rounded to tf32
        assert kernel.count(r"\bfma\.rn\.f32\b") > 0 and kernel.count(r"\btf32\b") == 0
    else:
        expect_exact(kernel, division=family != "strided")
        wgmma = r"\bwgmma\.mma_async\S*\.f32\.bf16\.bf16\b"
        mma = r"\bmma\.sync\S*\.f32\.bf16\.bf16\.f32\b"
        assert kernel.count(wgmma if capability == 90 else mma) > 0


@pytest.mark.parametrize("capability", [80, 90])
def test_half_precision(capability: int) -> None:
    config = tuning.INT8_WEIGHT_MM[f"sm{capability}"][0].config
    kernel = compiled(capability, config, "fp16", out_ptr="*fp16")
    assert kernel.count(r"\bw?g?mma\.\S*\.f32\.f16\.f16") > 0 and kernel.local_bytes == 0


@pytest.mark.parametrize(
    ("family", "capability", "config"),
    [(family, chip, config) for family, chip, dtype, config in CONFIGS if dtype == "bf16"],
    ids=str,
)
def test_groups_fit(family: str, capability: int, config: tuning.MatmulConfig) -> None:
    """A sum of the group beside the whole one, a zero point taken from every element."""
    changes = {"group_size": 128, "GROUPED": True, "zero_ptr": "*i8", "ACTIVATION": "none"}
    if family == "strided":
        changes |= {"K": 1023, "stride_am": 1023, "stride_bn": 1023, "ALIGN": 1}
    kernel = compiled(capability, fit_group(config, 128), "bf16", **changes)
    assert kernel.local_bytes == 0, f"{kernel.registers} registers, {kernel.local_bytes} B spilled"
    assert kernel.shared_bytes <= tuning.SHARED_LIMIT[family]
    expect_exact(kernel, division=False)
    assert kernel.count(r"\bw?g?mma\S*\.f32\.bf16\.bf16") > 0


def test_interpreted(in_interpreter: subprocess.Popen[str]) -> None:
    expect_passed(in_interpreter)
