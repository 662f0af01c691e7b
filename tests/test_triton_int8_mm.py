"""int8_mm in Triton: the bits, interpreted; the instructions, compiled for GPUs not here."""

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
from trimtab.kernels.int8_mm import int8_mm_kernel

in_interpreter = interpreted("interpreted_int8_mm.py")

# The chips that each table of tuning.py is compiled for here.
CHIPS = {"sm90": [90], "sm80": [80], "small": [86], "strided": [80, 90]}
CONFIGS = sorted(
    {
        (family, capability, row.config)
        for family, rows in tuning.INT8_MM.items()
        for row in rows
        for capability in CHIPS[family]
    }
)

MMA, WGMMA = r"\bmma\.sync\S*m16n8k32\S*\.s8\.s8\b", r"\bwgmma\.mma_async\S*\.s32\.s8\.s8\b"


def compiled(capability: int, config: tuning.MatmulConfig, **changes: Any) -> Compiled:
    """4096 cubed, with a bias, unless changed."""
    arguments = {
        "a_ptr": "*i8",
        "b_ptr": "*i8",
        "a_scale_ptr": "*fp32",
        "b_scale_ptr": "*fp32",
        "bias_ptr": "*bf16",
        "out_ptr": "*bf16",
        "out_scale_ptr": None,
        **dict.fromkeys(("M", "N", "K", "stride_am", "stride_bn", "stride_om"), 4096),
        **dict.fromkeys(("stride_ak", "stride_bk", "stride_on"), 1),
        "ACTIVATION": "relu",
        "ALIGN": 16,
        **config.blocks(),
        **changes,
    }
    return compile_kernel(int8_mm_kernel, capability, arguments, config.options())


def odd(K: int, align: int) -> dict[str, int]:
    return {"K": K, "stride_am": K, "stride_bn": K, "ALIGN": align}


STRIDED = {
    "odd": odd(1023, 1) | {"M": 1023, "N": 1023, "stride_om": 1023},
    "transposed": {
        "stride_am": 1,
        "stride_ak": 4096,
        "stride_bn": 1,
        "stride_bk": 4096,
        "ALIGN": 1,
    },
}
ALIGNED = {"by_16": {"ACTIVATION": "gelu", "out_ptr": "*fp32"}, "by_4": odd(1020, 4)}


@pytest.mark.parametrize(
    ("family", "capability", "config", "variant"),
    [
        (*config, variant)
        for config in CONFIGS
        for variant in (STRIDED if config[0] == "strided" else ALIGNED)
    ],
    ids=str,
)
def test_every_config_fits(
    family: str, capability: int, config: tuning.MatmulConfig, variant: str
) -> None:
    """Exact, on tensor cores, nothing spilled, within shared memory, loads in the background."""
    changes = (STRIDED | ALIGNED)[variant]
    kernel = compiled(capability, config, **changes)
    expect_exact(kernel, division="ACTIVATION" in changes)
    assert kernel.count(r"\bcvt\.rn\.f32\.s32\b") > 0
    assert kernel.local_bytes == 0, f"{kernel.registers} registers, {kernel.local_bytes} B spilled"
    assert kernel.shared_bytes <= tuning.SHARED_LIMIT[family]
    # wgmma works in 64 rows; smaller tiles take mma.sync.
    wgmma = capability == 90 and config.BLOCK_M >= 64
    assert kernel.count(WGMMA if wgmma else MMA) > 0
    assert kernel.count(MMA if wgmma else WGMMA) == 0
    if family != "strided":
        copied = {"by_16": "0x10", "by_4": "0x4"}[variant]
        assert kernel.count(rf"\bcp\.async\.c\S+ .*, {copied}\b") > 0
        assert kernel.count(r"\bld\.global\S*\.b8\b") == 0


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_output_rounds_to_nearest(dtype: str, capability: int) -> None:
    config = tuning.INT8_MM[f"sm{capability}"][0].config
    kernel = compiled(capability, config, out_ptr="*bf16" if dtype == "bf16" else "*fp16")
    assert kernel.count(rf"\bcvt\.rn\.{dtype}(x2)?\.f32\b") > 0


@pytest.mark.parametrize("capability", [80, 90])
def test_int8_out_is_exact(capability: int) -> None:
    """The reciprocal is a division that rounds once; nothing spills."""
    config = tuning.INT8_MM[f"sm{capability}"][0].config
    kernel = compiled(capability, config, out_ptr="*i8", out_scale_ptr="*fp32")
    expect_exact(kernel, division=True)
    assert kernel.local_bytes == 0
    assert kernel.count(r"\bst\.global\S*\.(b|v)") > 0


def test_interpreted(in_interpreter: subprocess.Popen[str]) -> None:
    expect_passed(in_interpreter)
