"""What the compiler made of the CUDA kernels: their SASS and resource use, for sm_80 and sm_90.

Read from libtrimtab_cuda.so itself (sass.py), without a GPU. KERNELS says what every kernel must be made
of; one that no line covers, or a line that covers none, fails.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import sass

ARCHS = ("sm_80", "sm_90")  # sm_90a, where a kernel has wgmma, counts as sm_90
REGISTERS = 65536  # of a multiprocessor; a warp takes them by 256
SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024}  # bytes of one; each block takes 1 KB more

pytestmark = [
    pytest.mark.skipif(
        not sass.LIBRARY.exists(),
        reason="libtrimtab_cuda.so is not built: no nvcc, or TRIMTAB_CUDA=0",
    ),
    pytest.mark.skipif(sass.TOOLS is None, reason="no triton, whose wheel holds cuobjdump"),
]


@dataclass(frozen=True)
class Kernel:
    """What a kernel must be made of. ``pattern`` is matched with its demangled name, template
    arguments and all; the functions get the match.

    ``opcodes``: each regular expression must match an instruction.
    ``block``: threads a block, and how many of its blocks the launcher wants on a multiprocessor.
    ``shared``: dynamic shared memory of a block.
    """

    pattern: str
    block: Callable[[re.Match[str]], tuple[int, int]]
    opcodes: Callable[[re.Match[str]], tuple[str, ...]]
    shared: Callable[[re.Match[str]], int] = field(default=lambda m: 0)
    archs: tuple[str, ...] = ARCHS


IMMA = r"IMMA\.16832\.S8\.S8"
LOAD_16 = r"LDG\.E\.(\w+\.)*128"
COPY_16 = r"LDGSTS\.E\.BYPASS\.\w+\.128"


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(", ")]


def _tile_block(m: re.Match[str]) -> tuple[int, int]:
    """Sm80Tile<BLOCK_M, BLOCK_N, BLOCK_K, warps along M, along N, stages, blocks>; one block less
    where the operands are not aligned, whose loads pass through registers."""
    *_, warps_m, warps_n, _, blocks = _numbers(m["tile"])
    return 32 * warps_m * warps_n, blocks - (m["aligned"] == "false")


def _tile_shared(m: re.Match[str]) -> int:
    M, N, K, _, _, stages, _ = _numbers(m["tile"])
    return stages * (M + N) * K


def _sparse24_block(m: re.Match[str]) -> tuple[int, int]:
    """Sparse24Tile<BLOCK_N, BLOCK_M, warps along N, along M, stages, blocks>"""
    *_, warps_n, warps_m, _, blocks = _numbers(m["tile"])
    return 32 * warps_n * warps_m, blocks


def _sparse24_shared(m: re.Match[str]) -> int:
    """x 128 bytes a token and step, values 64 a row, metadata 256 for 16 rows"""
    N, M, _, _, stages, _ = _numbers(m["tile"])
    return stages * (128 * M + 64 * N + 16 * N)


SPARSE_PRODUCT = {
    "signed char": IMMA,
    "bf16": r"HMMA\.16816\.F32\.BF16",
    "fp16": r"HMMA\.16816\.F32$",
}


def _bitmap_block(m: re.Match[str]) -> tuple[int, int]:
    """BitmapConfig<values, tiles of weight rows, tiles of tokens>: two tiles take a multiprocessor. Of
    16-bit values with one tile an sm_90 holds three, for which the registers are bounded."""
    if m["tiles"] == "2":
        return 512, 1
    return 256, 3 if m["type"] == "signed char" else 2


def _block_shared(m: re.Match[str]) -> int:
    """BlockTile<bn, tokens, warps along n, along m>: three stages of 128 bytes a row and token"""
    N, M, _, _ = _numbers(m["tile"])
    return 3 * 128 * (N + M)


def _block_block(m: re.Match[str]) -> tuple[int, int]:
    """With 128 tokens two fit an sm_80; an sm_90, for which the registers are bounded, holds 3 or 4."""
    _, M, warps_n, warps_m = _numbers(m["tile"])
    return 32 * warps_n * warps_m, 2 if M == 128 else 4


def _bitmap_shared(m: re.Match[str]) -> int:
    """64 words of bits a warp with their 12 bytes, values of so many columns, 12 and a count a row"""
    rows, size = 16 * int(m["tiles"]), {"float": 4, "signed char": 1}.get(m["type"], 2)
    words = (2 if size == 4 else 4) // int(m["tiles"])
    warp = rows * (words * (64 * size + 12) + 16 + 12 + 4)
    return _bitmap_block(m)[0] // 32 * warp + 64


# Most threads a row: kMaxTeam of quantize_rows_kernel's sources.
TEAMS = {"PlainSource": 1024, "SiluMulSource": 512, "RmsNormSource": 256}

KERNELS = (
    # wgmma on what TMA brings; two warpgroups and the producer's
    Kernel(
        r"int8_mm_sm90<(?P<wide>\d+), (true|false), (?P<split>true|false)>",
        block=lambda m: (384, 1),
        opcodes=lambda m: (
            rf"IGMMA\.64x{m['wide']}x32\.S8\.S8",
            r"UTMALDG\.2D",
            *([r"UTMALDG\.2D\.MULTICAST"] if m["split"] == "false" else []),
            *(["USETMAXREG"] if m["wide"] == "256" else []),
            r"STG\.E\.128",
        ),
        archs=("sm_90",),
    ),
    Kernel(
        r"int8_mm_sm80<Sm80Tile<(?P<tile>[\d, ]+)>, (?P<aligned>true|false)>",
        block=_tile_block,
        opcodes=lambda m: (
            IMMA,
            r"LDSM\.16\.M88\.4",
            COPY_16 if m["aligned"] == "true" else LOAD_16,
            r"STG\.E\.128",
        ),
        shared=_tile_shared,
    ),
    Kernel(
        r"sparse24_mm_sm80<Sparse24Tile<(?P<tile>[\d, ]+)>, (?P<type>signed char|bf16|fp16), "
        r"(?P<aligned>true|false)>",
        block=_sparse24_block,
        opcodes=lambda m: (
            {
                "signed char": r"IMMA\.SP\.16864\.S8\.S8",
                "bf16": r"HMMA\.SP\.16832\.F32\.BF16",
                "fp16": r"HMMA\.SP\.16832\.F32$",
            }[m["type"]],
            r"LDSM\.16\.M88\.4",
            COPY_16,  # of the values and the metadata, whatever x is
            *([LOAD_16] if m["aligned"] == "false" else []),
            r"STG\.E\.128",
        ),
        shared=_sparse24_shared,
    ),
    # wgmma.sp on what TMA brings, its metadata too
    Kernel(
        r"sparse24_mm_sm90<(?P<type>signed char|bf16|fp16), (?P<wide>\d+)>",
        block=lambda m: (384, 1),
        opcodes=lambda m: (
            {
                "signed char": rf"IGMMA\.SP\.64x{m['wide']}x64\.S8\.S8",
                "bf16": rf"HGMMA\.SP\.64x{m['wide']}x32\.F32\.BF16",
                "fp16": rf"HGMMA\.SP\.64x{m['wide']}x32\.F32$",
            }[m["type"]],
            r"UTMALDG\.2D",
            r"UTMALDG\.2D\.MULTICAST",
            *(["USETMAXREG"] if m["wide"] == "256" else []),
            r"STG\.E\.128",
        ),
        archs=("sm_90",),
    ),
    # 16 bytes in and out; int8 holds 32 words of a column a thread
    Kernel(
        r"sparse24_compress_kernel<(?P<type>float|unsigned short|signed char), "
        r"(?P<aligned>true|false), (true|false)>",
        block=lambda m: (128, 5 if m["type"] == "signed char" else 6),
        opcodes=lambda m: (COPY_16 if m["aligned"] == "true" else LOAD_16, r"STG\.E\.128"),
        shared=lambda m: {"float": 4352, "unsigned short": 9216, "signed char": 20480}[m["type"]],
    ),
    Kernel(
        r"block_mm_kernel<BlockTile<(?P<tile>[\d, ]+)>, (?P<type>signed char|bf16|fp16)>",
        block=_block_block,
        opcodes=lambda m: (SPARSE_PRODUCT[m["type"]], r"LDSM\.16\.M88\.4", COPY_16, r"STG\.E\.128"),
        shared=_block_shared,
    ),
    Kernel(
        r"block_finish_kernel<(int|float)>",
        block=lambda m: (128, 4),
        opcodes=lambda m: (LOAD_16, r"STG\.E\.128"),
    ),
    # Weights and tokens by 16 bytes; int8 has four tokens in a word
    Kernel(
        r"block_fma_kernel<(?P<type>float|bf16|fp16|signed char), (?P<rows>\d)>",
        block=lambda m: (256, 2),
        opcodes=lambda m: (
            "IMAD" if m["type"] == "signed char" else "FFMA",
            LOAD_16,
            r"LDG\.E$" if m["type"] == "signed char" else r"LDG\.E\.(64|128)$",
            r"STG\.E\.128",
        ),
        shared=lambda m: 128 * (8 * int(m["rows"]) + 1) * 4,
    ),
    Kernel(
        r"block_turn_kernel<unsigned (char|short|int)>",
        block=lambda m: (256, 4),
        opcodes=lambda m: ("LDG", "STG"),
        shared=lambda m: 32 * 33 * {"char": 1, "short": 2, "int": 4}[m[1]],
    ),
    # Fragments of both operands transposed; float32 by fma
    Kernel(
        r"block_grad_(gathered|sampled)_kernel<BlockGradTile<(?P<type>float|bf16|fp16), (?P<n>\d+)> ?>",
        block=lambda m: (128, 2),
        opcodes=lambda m: (
            COPY_16,
            *(
                ["FFMA"]
                if m["type"] == "float"
                else [SPARSE_PRODUCT[m["type"]], r"LDSM\.16\.MT88\.4"]
            ),
        ),
        shared=lambda m: 3 * 128 * (int(m["n"]) + 128) + 16,
    ),
    Kernel(
        r"block_grad_finish_kernel<(float|bf16|fp16)>",
        block=lambda m: (256, 4),
        opcodes=lambda m: ("LDG", "FADD", "STG"),
    ),
    # Values by cp.async; float32 by fma
    Kernel(
        r"bitmap_mm_kernel<BitmapConfig<(?P<type>signed char|bf16|fp16|float), (?P<tiles>\d), \d> ?>",
        block=_bitmap_block,
        opcodes=lambda m: (SPARSE_PRODUCT.get(m["type"], "FFMA"), COPY_16, LOAD_16, "POPC"),
        shared=_bitmap_shared,
    ),
    # 16 warps a multiprocessor
    Kernel(
        r"int8_mm_small<\d+, \d+, (true|false)>",
        block=lambda m: (512, 1),
        opcodes=lambda m: (IMMA, LOAD_16),
    ),
    Kernel(
        r"weight_mm_kernel<Config<(float|fp16|bf16), \d, \d, (true|false), (?P<wide>true|false)> ?>",
        block=lambda m: (512, 1),
        opcodes=lambda m: (r"HMMA\.16816\.F32", *([LOAD_16] if m["wide"] == "true" else [])),
    ),
    # A block a row, of as many threads as the source's registers allow; or a warp a row, four to a block
    Kernel(
        r"quantize_rows_kernel<(?P<source>\w+)<.+>, (?P<block_row>true|false), (?P<wide>true|false)>",
        block=lambda m: (TEAMS[m["source"]], 1) if m["block_row"] == "true" else (128, 3),
        opcodes=lambda m: (LOAD_16, r"STG\.E\.(64|128)") if m["wide"] == "true" else ("LDG",),
    ),
    # Arrays by 16 bytes; four blocks a multiprocessor, three where states are codes or rounded at random,
    # which then take two tables and the values of a tile in shared memory
    Kernel(
        r"optim_update<RuleFamily<\w+, \d+, (?P<states>\d)>, (?P<compact>true|false)>",
        block=lambda m: (128, 3 if m["compact"] == "true" else 4),
        opcodes=lambda m: (LOAD_16, r"STG\.E\.128", "FFMA"),
        shared=lambda m: 4096 + int(m["states"]) * 4096 if m["compact"] == "true" else 0,
    ),
    # LAMB: the last warp of a tensor, by a count, adds up what the others found
    Kernel(
        r"optim_probe",
        block=lambda m: (128, 4),
        opcodes=lambda m: ("LDG", "FFMA", "DADD", "(ATOMG|RED)", "MEMBAR"),
        shared=lambda m: 4096,
    ),
    Kernel(r"optim_norm", block=lambda m: (128, 8), opcodes=lambda m: ("LDG", "FFMA", "DADD")),
    Kernel(r"optim_adapt", block=lambda m: (128, 4), opcodes=lambda m: ("LDG", "STG")),
    # LAMB's first launch, where it clips
    Kernel(
        r"optim_norm_and_constants",
        block=lambda m: (128, 4),
        opcodes=lambda m: ("LDG", "FFMA", "DADD", "DFMA", "DMUL"),
    ),
    # Adafactor: gradients by 16 bytes where aligned, 34 KB of them in shared memory
    Kernel(
        r"adafactor_squares",
        block=lambda m: (128, 4),
        opcodes=lambda m: (LOAD_16, "LDS", "FFMA", "DADD"),
        shared=lambda m: 34816,
    ),
    Kernel(
        r"adafactor_average",
        block=lambda m: (256, 4),
        opcodes=lambda m: ("LDG", "FFMA", "DADD", r"MUFU\.RSQ64H"),
        shared=lambda m: 8192,
    ),
    Kernel(
        r"adafactor_factors",
        block=lambda m: (256, 4),
        opcodes=lambda m: ("LDG", "DADD", r"MUFU\.RSQ64H"),
        shared=lambda m: 8192,
    ),
    Kernel(
        r"adafactor_direction_squares",
        block=lambda m: (128, 4),
        opcodes=lambda m: ("LDG", "FFMA", "DADD", "(ATOMG|RED)", "MEMBAR"),
    ),
    Kernel(
        r"adafactor_apply<(?P<compact>true|false)>",
        block=lambda m: (128, 4 if m["compact"] == "true" else 6),
        opcodes=lambda m: (LOAD_16, r"STG\.E\.128", "FFMA"),
    ),
    Kernel(r"adafactor_norm", block=lambda m: (128, 8), opcodes=lambda m: ("LDG", "FFMA", "DADD")),
    Kernel(r"adafactor_prepare", block=lambda m: (256, 1), opcodes=lambda m: ("DFMA", "DMUL")),
    # Powers in pairs of doubles
    Kernel(r"optim_prepare", block=lambda m: (256, 1), opcodes=lambda m: ("DFMA", "DMUL")),
)


@pytest.fixture(scope="module")
def kernels() -> list[dict[str, Any]]:
    return sass.kernels_of_library()


def line_of(name: str) -> tuple[Kernel, re.Match[str]] | None:
    for kernel in KERNELS:
        if match := re.fullmatch(kernel.pattern, name):
            return kernel, match
    return None


def problems(found: dict[str, Any]) -> list[str]:
    """What is wrong with one kernel on one architecture; empty if nothing is."""
    line = line_of(found["name"])
    if line is None:
        return ["no line of KERNELS covers it"]
    kernel, match = line
    instructions = found["instructions"]
    if found["arch"] not in kernel.archs:
        touching = [op for op in instructions if re.match("LD|ST|U?TMA|ATOM|RED", op)]
        return [f"expected an empty kernel, got {touching}"] if touching else []
    wrong = []
    spills = [op for op in instructions if re.match(r"(LDL|STL)\b", op)]
    if spills or found["STACK"] or found["LOCAL"]:
        wrong.append(f"local memory: STACK {found['STACK']}, LOCAL {found['LOCAL']}, {spills}")
    # Of pointers from a table the compiler knows nothing but what on_global of optim_table.cuh says.
    generic = [op for op in instructions if re.match(r"(LD|ST)(\.|$)", op)]
    if generic and found["name"].startswith(("optim_", "adafactor_")):
        wrong.append(f"addresses of an unknown space: {generic}")
    for wanted in kernel.opcodes(match):
        if not any(re.match(wanted, op) for op in instructions):
            wrong.append(f"no {wanted}")
    threads, blocks = kernel.block(match)
    taken = blocks * (threads // 32) * -(-32 * found["REG"] // 256) * 256
    if taken > REGISTERS:
        wrong.append(f"{found['REG']} registers: {blocks} blocks of {threads} threads do not fit")
    shared = blocks * (kernel.shared(match) + 1024)
    if shared > SHARED[found["arch"]]:
        wrong.append(f"{blocks} blocks take {shared} bytes of shared memory")
    # Where the compiler cannot prove that sums stay untouched, it waits after every wgmma
    # ("instructions are serialized", C7510 of ptxas).
    products = sum(n for op, n in instructions.items() if op.startswith("IGMMA"))
    waits = sum(n for op, n in instructions.items() if op.startswith("WARPGROUP.DEPBAR"))
    if products and waits >= products:
        wrong.append(f"serialized: {waits} waits for {products} wgmma")
    return wrong


# --- the tests


def test_architectures() -> None:
    """Real code for 8.x and 9.0, with wgmma where there is any, and PTX that later ones compile."""
    real = set(re.findall(r"\.(sm_\w+)\.cubin", sass.tool("cuobjdump", "-lelf", sass.LIBRARY)))
    assert real == {*ARCHS, "sm_90a"}
    assert set(re.findall(r"\.(sm_\w+)\.ptx", sass.tool("cuobjdump", "-lptx", sass.LIBRARY))) == {
        "sm_80"
    }


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("line", KERNELS, ids=lambda kernel: kernel.pattern.partition("<")[0])
def test_kernel(kernels: list[dict[str, Any]], line: Kernel, arch: str) -> None:
    mine = [k for k in kernels if k["arch"] == arch and re.fullmatch(line.pattern, k["name"])]
    assert mine, f"{line.pattern}: no such kernel for {arch}; take the line out"
    wrong = {k["name"]: found for k in mine if (found := problems(k))}
    assert not wrong, "\n".join(f"{name}: {'; '.join(what)}" for name, what in wrong.items())


def test_every_kernel_has_a_line(kernels: list[dict[str, Any]]) -> None:
    assert kernels
    assert not [k["name"] for k in kernels if line_of(k["name"]) is None]


def test_faults_are_found() -> None:
    """The checks above on made-up kernels, each with one fault."""
    good: dict[str, Any] = {
        "arch": "sm_90",
        "name": "int8_mm_sm90<256, false, false>",
        "instructions": {
            "IGMMA.64x256x32.S8.S8": 4,
            "WARPGROUP.DEPBAR.LE": 2,
            "UTMALDG.2D": 2,
            "UTMALDG.2D.MULTICAST": 1,
            "USETMAXREG.DEALLOC.CTAPOOL": 1,
            "STG.E.128": 3,
        },
        "REG": 168,
        "STACK": 0,
        "LOCAL": 0,
    }
    assert problems(good) == []
    ops = good["instructions"]
    faults = {
        "no line of KERNELS": {"name": "int8_mm_sm100<256, false, false>"},
        "local memory": {"STACK": 8},
        "local memory: STACK 0, LOCAL 0, ['STL.64']": {"instructions": {**ops, "STL.64": 1}},
        "addresses of an unknown space: ['LD.E.128']": {
            "name": "optim_norm",
            "instructions": {"LD.E.128": 1},
        },
        "serialized": {"instructions": {**ops, "WARPGROUP.DEPBAR.LE": 5}},
        "registers: 1 blocks of 384": {"REG": 172},
        r"no IGMMA\.64x128x32": {"name": "int8_mm_sm90<128, false, false>"},
        "expected an empty kernel": {"arch": "sm_80"},
        "shared memory": {
            "name": "int8_mm_sm80<Sm80Tile<128, 256, 128, 2, 4, 5, 1>, true>",
            "instructions": {"IMMA.16832.S8.S8": 1},
        },
    }
    for message, change in faults.items():
        assert message in "; ".join(problems(good | change)), message
