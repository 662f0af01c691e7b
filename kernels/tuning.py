"""The launch parameters of the Triton kernels: a table an op, for launchers, tests and benchmarks.

A row holds up to its M, N and K (None: no limit); the first row that fits is taken. Each table ends
in a row without limits. tests/test_triton_<op>.py compiles every row for the GPUs it serves and
checks that it fits: no spilled registers, and no more shared memory than the chip has.

NOT YET MEASURED: every row. They are reasoned from register, shared-memory and tile counts, and
from the published choices in the comments. A measured row says where and when it won.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch


class MatmulConfig(NamedTuple):
    """A product's tile and pipeline."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    GROUP_M: int

    def tiles(self, M: int, N: int) -> int:
        return -(-M // self.BLOCK_M) * -(-N // self.BLOCK_N)

    def blocks(self) -> dict[str, int]:
        """The kernel's constexpr arguments."""
        return {
            "BLOCK_M": self.BLOCK_M,
            "BLOCK_N": self.BLOCK_N,
            "BLOCK_K": self.BLOCK_K,
            "GROUP_M": self.GROUP_M,
        }

    def options(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **EXACT}


class QuantizeConfig(NamedTuple):
    """BLOCK_M whole rows a program, read BLOCK_K elements at a time."""

    BLOCK_M: int
    BLOCK_K: int
    num_warps: int

    def blocks(self) -> dict[str, int]:
        return {"BLOCK_M": self.BLOCK_M, "BLOCK_K": self.BLOCK_K}

    def options(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, **EXACT}


class Row(NamedTuple):
    M: int | None
    N: int | None
    K: int | None
    config: Any

    def fits(self, M: int, N: int, K: int) -> bool:
        limits = ((self.M, M), (self.N, N), (self.K, K))
        return all(limit is None or size <= limit for limit, size in limits)


# NUMERICS.md section 1: each + and * rounds once. Triton's default contracts a * b + c to an fma.
EXACT = {"enable_fp_fusion": False}


def registers(most: int | None) -> dict[str, Any]:
    """The launch option for at most so many registers a thread, where it exists (NVIDIA).

    With a budget ptxas fills it. Without one it may aim at a block more on a multiprocessor, and then
    spills a value or two (8 bytes of stack at 96 or 128 registers).
    """
    return {} if torch.version.hip or most is None else {"maxnreg": most}


# The table that serves a compute capability and those above it, highest first. "small" is for chips
# with 99 KB of shared memory a block (8.6, 8.9, 12.x) and for all that is not NVIDIA's (AMD: 64 KB).
# On 10.x Triton 3.7 has no int8 for tcgen05 and takes mma.sync, as on 8.0.
FAMILIES = {(12, 0): "small", (10, 0): "sm80", (9, 0): "sm90", (8, 6): "small", (8, 0): "sm80"}

# Bytes of shared memory that one block may take; the tests hold every row to it.
SHARED_LIMIT = {"sm90": 232448, "sm80": 166912, "small": 65536, "strided": 65536}

# Shared memory: num_stages * (BLOCK_M + BLOCK_N) * BLOCK_K bytes with wgmma, one stage less with
# mma.sync. Triton waits for each int8 wgmma at once (not so for fp16), so the time between two is
# lost unless another warp group fills it: deep BLOCK_K, and two warp groups or blocks an SM.
#
#   Row(M, N, K, MatmulConfig(BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages, GROUP_M))
INT8_MM: dict[str, tuple[Row, ...]] = {
    # H100: 132 SMs, wgmma from BLOCK_M = 64 on (one warp group of 4 warps does 64 rows).
    "sm90": (
        # Decode streams b once. 16 rows are the least for a tensor core (mma.sync; wgmma takes 64).
        # N = 4096 makes 128 tiles for 132 SMs. Each keeps four 8 KB slices of b on their way:
        # 132 * 32 KB is 1.3 us of 3.35 TB/s, more than a trip to memory takes.
        Row(16, 8192, None, MatmulConfig(16, 32, 256, 4, 5, 8)),
        Row(16, None, None, MatmulConfig(16, 64, 256, 4, 5, 8)),
        Row(32, None, None, MatmulConfig(32, 64, 256, 4, 4, 8)),
        # One wgmma high. vLLM takes 64x64x256 here; half as deep leaves room for two blocks an SM.
        Row(64, None, None, MatmulConfig(64, 64, 128, 4, 5, 8)),
        Row(128, 8192, None, MatmulConfig(64, 64, 128, 4, 5, 8)),
        Row(128, None, None, MatmulConfig(64, 128, 128, 4, 4, 8)),
        # Few tiles: a 1024 x 1024 product has 32 of 128 x 256, for 132 SMs.
        Row(1024, 2048, None, MatmulConfig(64, 128, 128, 4, 4, 8)),
        Row(None, 2048, None, MatmulConfig(128, 128, 128, 8, 4, 8)),
        Row(512, None, None, MatmulConfig(128, 128, 128, 8, 4, 8)),
        # Two warp groups, each 128 x 128: 128 registers of sum a thread, about 250 in all; 192 KB.
        Row(None, None, None, MatmulConfig(128, 256, 128, 8, 4, 8)),
    ),
    # A100: 108 SMs, mma.sync m16n8k32, cp.async pipelines.
    "sm80": (
        Row(16, 8192, None, MatmulConfig(16, 32, 256, 4, 5, 8)),
        Row(16, None, None, MatmulConfig(16, 64, 256, 4, 4, 8)),
        Row(32, None, None, MatmulConfig(32, 64, 128, 4, 5, 8)),
        Row(64, None, None, MatmulConfig(64, 64, 128, 4, 4, 8)),
        Row(128, None, None, MatmulConfig(64, 128, 128, 4, 3, 8)),
        Row(1024, 2048, None, MatmulConfig(64, 128, 64, 4, 4, 8)),
        Row(512, None, None, MatmulConfig(128, 128, 64, 8, 4, 8)),
        Row(None, 2048, None, MatmulConfig(128, 128, 64, 8, 4, 8)),
        # The largest tile whose sum fits: 128 registers a thread, about 245 in all.
        Row(None, None, None, MatmulConfig(128, 256, 64, 8, 4, 8)),
    ),
    # At most 64 KB, for any chip.
    "small": (
        Row(16, None, None, MatmulConfig(16, 32, 256, 4, 4, 8)),
        Row(64, None, None, MatmulConfig(64, 64, 128, 4, 3, 8)),
        Row(512, None, None, MatmulConfig(64, 128, 64, 4, 3, 8)),
        Row(None, None, None, MatmulConfig(128, 128, 64, 8, 3, 8)),
    ),
    # Operands that k_alignment gives 1: odd K, or K not adjacent. They are loaded byte by byte
    # through registers (no cp.async), so the tiles must be small or the bytes spill.
    "strided": (
        Row(16, None, None, MatmulConfig(16, 32, 128, 4, 2, 8)),
        Row(None, None, None, MatmulConfig(64, 64, 64, 8, 2, 8)),
    ),
}

# Weight-only, bf16 or fp16 a. The product runs transposed: BLOCK_N is the tensor core's M, so 64 of
# it fill a wgmma, and BLOCK_M may be as small as a batch. A stage holds BLOCK_K * (2 BLOCK_M +
# BLOCK_N) bytes; the sum takes fp32 registers like int8_mm's int32.
INT8_WEIGHT_MM: dict[str, tuple[Row, ...]] = {
    "sm90": (
        # Decode streams b once: 8 KB a stage, as in int8_mm.
        Row(16, 8192, None, MatmulConfig(16, 64, 128, 4, 5, 8)),
        Row(16, None, None, MatmulConfig(16, 128, 128, 4, 4, 8)),
        Row(64, None, None, MatmulConfig(64, 64, 128, 4, 4, 8)),
        Row(256, None, None, MatmulConfig(64, 128, 64, 4, 4, 8)),
        Row(None, None, None, MatmulConfig(128, 128, 64, 8, 4, 8)),
    ),
    "sm80": (
        Row(16, None, None, MatmulConfig(16, 64, 128, 4, 4, 8)),
        Row(64, None, None, MatmulConfig(64, 64, 64, 4, 4, 8)),
        Row(None, None, None, MatmulConfig(128, 128, 32, 8, 4, 8)),
    ),
    "small": (
        Row(16, None, None, MatmulConfig(16, 64, 128, 4, 4, 8)),
        Row(64, None, None, MatmulConfig(64, 64, 64, 4, 3, 8)),
        Row(None, None, None, MatmulConfig(128, 128, 32, 8, 3, 8)),
    ),
    "strided": (
        Row(16, None, None, MatmulConfig(16, 64, 64, 4, 2, 8)),
        Row(None, None, None, MatmulConfig(64, 64, 32, 8, 2, 8)),
    ),
}

# Weight-only, fp32 a: fp32 fma on the ordinary cores, no tensor core keeps 24 bits. 32 sums a thread
# reuse each operand enough to keep the fma units fed from shared memory.
_WEIGHT_FP32_ROWS = (
    Row(16, None, None, MatmulConfig(16, 64, 64, 4, 3, 8)),
    Row(None, None, None, MatmulConfig(64, 64, 32, 4, 3, 8)),
)
INT8_WEIGHT_MM_FP32: dict[str, tuple[Row, ...]] = dict.fromkeys(SHARED_LIMIT, _WEIGHT_FP32_ROWS)

# The quantizer is bound by memory: 16 bytes a thread and load, and enough rows a program that every
# warp has work. N has no meaning here.
_QUANTIZE_ROWS = (
    Row(None, None, 64, QuantizeConfig(16, 64, 4)),
    Row(None, None, 256, QuantizeConfig(4, 256, 4)),
    Row(None, None, 1024, QuantizeConfig(1, 1024, 4)),
    # Longer rows are taken 4096 at a time: 16 elements a thread keep two loads in flight.
    Row(None, None, None, QuantizeConfig(1, 4096, 8)),
)
QUANTIZE_INT8: dict[str, tuple[Row, ...]] = dict.fromkeys(SHARED_LIMIT, _QUANTIZE_ROWS)

TABLES = {
    "quantize_int8": QUANTIZE_INT8,
    "int8_mm": INT8_MM,
    "int8_weight_mm": INT8_WEIGHT_MM,
    "int8_weight_mm_fp32": INT8_WEIGHT_MM_FP32,
}


def family_of(capability: tuple[int, int]) -> str:
    """The table that serves a compute capability."""
    for least, family in FAMILIES.items():
        if capability >= least:
            return family
    return "small"


@functools.cache
def _device_family(device: torch.device) -> str:
    if device.type != "cuda" or torch.version.hip is not None:
        return "small"
    return family_of(torch.cuda.get_device_capability(device))


def choose(op: str, device: torch.device, M: int, N: int, K: int, *, strided: bool = False) -> Any:
    """The config of ``op`` for these sizes on this device.

    ``strided``: the operands are those that k_alignment gives 1.
    """
    rows = TABLES[op]["strided" if strided else _device_family(device)]
    return next(row.config for row in rows if row.fits(M, N, K))
