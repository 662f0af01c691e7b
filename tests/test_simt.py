"""The SIMT machine: right where kernels are right, and everything that is wrong in a kernel is seen.

The proof is by mutation (mutants.py): the kernels are copied, and every wait, barrier, fence and commit, and
some indices, get a switch that spoils them. Random calls (simt/driver.cpp) must then end in wrong bits or in a
fault that the machine reports, for every single switch. test_simt_sm90.py does the same for sm_90.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import mutants
import pytest
import sim_call
import simt_build
import torch

pytestmark = pytest.mark.skipif(
    shutil.which(simt_build.compiler()) is None, reason="no compiler for csrc/cuda"
)

POLICIES = ["late", "random", "early"]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(simt_build.build()))
    library.tt_last_error.restype = ctypes.c_char_p
    return library


def register(library: ctypes.CDLL, *tensors: tuple[torch.Tensor, bool]) -> None:
    library.simt_clear()
    for tensor, writable in tensors:
        size = ctypes.c_int64(tensor.numel() * tensor.element_size())
        library.simt_register(ctypes.c_void_p(tensor.data_ptr()), size, int(writable))


def pointers(*tensors: torch.Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


# --- a right kernel


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(4))
def test_right_kernel(library, seed: int, policy: str, generator) -> None:
    """cp.async, ldmatrix, mma, named barriers, shuffles, atomics; edges of the tile."""
    for M, N, K in [(1, 1, 16), (32, 32, 32), (33, 65, 80), (70, 40, 272)]:
        a = torch.randint(-128, 128, (M, K), dtype=torch.int8, generator=generator)
        b = torch.randint(-128, 128, (N, K), dtype=torch.int8, generator=generator)
        out, total = torch.full((M, N), -1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        register(library, (a, False), (b, False), (out, True), (total, True))
        library.simt_configure(ctypes.c_uint64(seed), 80, 4, sim_call.POLICIES[policy])
        status = library.simt_product(*pointers(a, b, out, total), M, N, K)
        assert status == 0, library.tt_last_error().decode()
        want = (a.long() @ b.long().t()).int()
        assert torch.equal(out, want) and total.item() == want.sum().int().item()


def test_a_seed_repeats_and_another_does_not(library) -> None:
    """What differs is the block that a fault is found in."""
    found = []
    for seed in (1, 1, 2, 3, 4, 5):
        out = torch.zeros(64, dtype=torch.int32)
        register(library, (out, True))
        library.simt_configure(ctypes.c_uint64(seed), 80, 4, -1)
        assert library.simt_misuse(3, *pointers(out)) != 0
        found.append(library.tt_last_error().decode())
    assert found[0] == found[1] and len(set(found)) > 2


# --- what kernels may not do: the kernel "misuse" of simt/selftest.cu, in its order

MISUSE = [
    "divergent barrier: __syncthreads waits for a thread that exits: thread 5 ",
    r"named_barrier_sync 1 of (64|32) threads, while selftest.cu:\d+ waits with (32|64)|deadlock",
    "named_barrier_sync 1 of 48 threads: expected a multiple of 32, at most the block's 64",
    "named barrier 16: expected 1 to 15",
    r"deadlock: block \(0, 0, 0\) thread \(0, 0, 0\) waits for named_barrier_sync at selftest.cu:\d+; 32 at",
    "named_barrier_arrive 1: this thread has already arrived in this phase",
    "__syncwarp waits for a thread that exits|__syncwarp needs thread .* which has exited",
    r"divergent: __shfl_sync with mask ffffffff, while others of the group are at __shfl_sync .*selftest.cu:\d+",
    "__shfl_xor_sync: lane .* reads lane .*, not in mask 55555555",
    "__syncwarp with mask 00000001 by lane",
    "store of 4 bytes at offset 256 of a tensor of 256 bytes .*thread \\(63, 0, 0\\)",
    "load16 4 bytes off its alignment of 16",
    "shared memory of 1000 bytes touched at offset 1008, 16 bytes",
    "constant load of what this kernel wrote",
    "shared memory written beyond its 1000 bytes by block",
    "global access to shared memory, 4 bytes",
]


@pytest.mark.parametrize("which", range(len(MISUSE)))
def test_misuse_is_reported(library, which: int) -> None:
    """With the op, the block, the thread and the line, whatever the seed."""
    for seed in range(5):
        out = torch.zeros(64, dtype=torch.int32)
        register(library, (out, True))
        library.simt_configure(ctypes.c_uint64(seed), 80, 4, -1)
        assert library.simt_misuse(which, *pointers(out)) == 4  # TT_CUDA_ERROR
        message = library.tt_last_error().decode()
        assert re.match(r"misuse: ", message) and re.search(MISUSE[which], message), message
        assert re.search(r"block \(0, 0, 0\)", message)


def test_input_is_not_written(library) -> None:
    out = torch.zeros(64, dtype=torch.int32)
    register(library, (out, False))
    assert library.simt_misuse(13, *pointers(out)) == 4
    assert "store of 4 bytes to a tensor that is input" in library.tt_last_error().decode()


# --- mutation

# One index or count off by one; all of these expressions must stand in the sources. By op of the driver.
SOURCES: dict[str, tuple[str, dict[str, str]]] = {
    "selftest.cu": (
        "product",
        {
            "matrix / 2 * 16": "(matrix + 1) / 2 * 16",
            "m >= p.M": "m > p.M",
            "multiply(d, s, step % kStages)": "multiply(d, s, step % kStages ^ 1)",
            "s.sums[threadIdx.x / 32]": "s.sums[0]",
        },
    ),
    "quantize_rows.cuh": (
        "quantize_int8",
        {
            "lane < warps": "lane < warps - 1",
            "first + me + int64_t{v} * team": "first + me + int64_t{v} * team + 1",
            "(first + v * team)": "(first + v * team - (v > 2))",
            "k + j < p.columns": "k + j <= p.columns",
        },
    ),
    "tile_copy.cuh": (
        "int8_mm",
        {
            "first_row + row + i * Shape::kPassRows < rows": "first_row + row + i * Shape::kPassRows <= rows",
            "K - k - chunk_k": "K - k - chunk_k + 1",
        },
    ),
    "int8_mm_sm80.cuh": (
        "int8_mm",
        {
            "ask(step + kStages - 1, free_stage)": "ask(step + kStages - 1, stage)",
            "stage + 1 < kStages": "stage + 1 < kStages - 1",
            "free_stage = stage": "free_stage = stage + 1 < kStages ? stage + 1 : 0",
            "blockIdx.y * kPart": "(blockIdx.y ^ 1) * kPart",
            "uint32_t(p.splits - 1)": "uint32_t(p.splits - 2)",
            "split == int(blockIdx.y)": "split == int(blockIdx.y) + 1",
            "first + row < e.M": "first + row < e.M - 1",
            "warp * Tile::kSlabWords": "(warp & ~1) * Tile::kSlabWords",
        },
    ),
    "int8_mm_small.cuh": (
        "int8_mm_small",
        {
            "w < warps": "w < warps - 1",
            "n < p.epilogue.N": "n <= p.epilogue.N",
            "k + kTurn + 16 <= p.K": "k + kTurn - 16 <= p.K",
            "warps * kTurn": "(warps - 1) * kTurn",
        },
    ),
    "int8_weight_mm.cu": ("int8_weight_mm", {"warp * kSums + i": "warp * kSums + (i ^ 1)"}),
}
# What cannot show here, and why.
SEQUENTIAL = "the machine's memory is seen by all blocks at once; on a GPU the fence orders it"
HARMLESS = {
    "int8_mm_sm80.cuh: fence removed: __threadfence();": SEQUENTIAL,
}


def spoiled() -> tuple[dict[str, str], list[tuple[str, mutants.Mutant]]]:
    """The sources with all faults in them, and (op, fault)."""
    texts, found = {}, []
    for name, (op, edits) in SOURCES.items():
        folder = simt_build.SIMT if name.startswith("selftest") else simt_build.ROOT / "csrc/cuda"
        # What misuses the machine on purpose comes after.
        source, *rest = (folder / name).read_text().partition("// One misuse each")
        text, more = mutants.mutate(name, source, edits, len(found) + 1)
        texts[name] = "".join((text, *rest))
        found += [(op, mutant) for mutant in more]
    return texts, found


TEXTS, MUTANTS = spoiled()


def build_driver(folder: Path, kernels: Path, options: Sequence[str]) -> Path:
    """The program of random calls, with the sources in kernels/cuda, where there are any, for the checkout's."""
    sources = [*simt_build.HOST, simt_build.SIMT / "driver.cpp", simt_build.SIMT / "selftest.cu"]
    sources += [path for path in simt_build.KERNELS if path.stem in DRIVEN]
    changed = {path.name: path for path in kernels.glob("cuda/*.cu")}
    sources = [changed.get(path.name, path) for path in sources]
    objects = simt_build.build_objects(sources, options, kernels)
    into = folder / "driver"
    subprocess.run(
        [simt_build.compiler(), *options, *map(str, objects), "-o", str(into)], check=True
    )
    return into


DRIVEN = ("quantize_int8", "int8_mm", "int8_linear", "int8_weight_mm")


@pytest.fixture(scope="module")
def driver() -> Path:
    """The driver with all faults in it, none switched on."""
    name = hashlib.sha256((simt_build.digest("mutants") + repr(TEXTS)).encode()).hexdigest()[:16]
    folder = simt_build.BUILD / f"mutants-{name}"
    with simt_build.locked():
        (folder / "cuda").mkdir(parents=True, exist_ok=True)
        for file, text in TEXTS.items():
            (folder / "cuda" / file).write_text(text)
    return build_driver(folder, folder, ("-O1",))


def drive(driver: Path, *arguments: object, timeout: float = 300) -> subprocess.CompletedProcess:
    command = [str(driver), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def test_without_a_fault_all_is_right(driver: Path) -> None:
    run = drive(driver, "all", 0, 70, 1, 0)
    assert run.returncode == 0, run.stdout + run.stderr


def test_faults_of_every_kind() -> None:
    kinds = {mutant.kind for _, mutant in MUTANTS}
    assert {"wait removed", "barrier removed", "index off by one", "wait for a group less"} <= kinds


@pytest.mark.parametrize("op,mutant", MUTANTS, ids=[f"{m.number}-{m.kind}" for _, m in MUTANTS])
def test_mutant_is_caught(driver: Path, op: str, mutant: mutants.Mutant) -> None:
    calls = 30 if str(mutant) in HARMLESS else 300
    run = drive(driver, op, 80, calls, mutant.number, mutant.number, timeout=60)
    print(f"{mutant}: {run.stdout}{run.stderr}")
    assert (run.returncode == 0) == (str(mutant) in HARMLESS), f"{mutant}: {run.stdout}"


# --- the sanitizers


def test_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    """Exact tensors on the heap with red zones around them, shared memory and stacks poisoned."""
    options = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
    driver = build_driver(tmp_path, simt_build.ROOT / "csrc", options)
    run = drive(driver, "all", 0, 28, 0, 0)
    assert run.returncode == 0, run.stdout + run.stderr
