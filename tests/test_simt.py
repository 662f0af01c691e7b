"""The SIMT machine: right where kernels are right, and everything that is wrong in a kernel is seen.

The proof is by mutation. The kernels are copied, and each fault below is built into the copy behind a
switch: a wait or a barrier left out, an index off by one, a phase bit flipped. Random calls (simt/driver.cpp)
must then end in wrong bits or in a fault that the machine reports, for every single switch.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cuda_sim
import pytest
import torch

pytestmark = pytest.mark.skipif(
    shutil.which(cuda_sim.compiler()) is None, reason="no compiler for csrc/cuda"
)

POLICIES = ["late", "random", "early"]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(cuda_sim.build()))
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
        library.simt_configure(ctypes.c_uint64(seed), 80, 4, cuda_sim.POLICIES[policy])
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
    r"named_barrier_sync 1 of (64|32) threads, while selftest.cu:\d+ waits with (32|64)",
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


@dataclass(frozen=True)
class Mutant:
    """One fault: `old` in `file`, which must occur there once, becomes `new`."""

    kind: str
    file: str
    old: str  # statements, if it ends in ";", else an expression
    new: str
    op: str
    arch: int

    def __str__(self) -> str:
        name = re.sub(r"\W+", "_", f"{self.old}_to_{self.new}" if self.new else self.old).strip("_")
        return f"{self.op}-sm{self.arch}-{self.kind}-{name[:60]}"


def of(op: str, arch: int, file: str, *faults: tuple[str, str, str]) -> list[Mutant]:
    return [Mutant(kind, file, old, new, op, arch) for kind, old, new in faults]


MUTANTS = [
    *of(
        *("product", 80, "selftest.cu"),
        ("wait", "cp_async_wait<1>();", ""),
        ("wait", "cp_async_wait<1>();", "cp_async_wait<2>();"),
        ("barrier", "named_barrier_sync(1, kThreads);", ""),
        ("barrier", "named_barrier_sync(2, kThreads);", ""),
        ("barrier", "named_barrier_sync(2, kThreads);", "named_barrier_sync(2, kThreads / 2);"),
        ("barrier", "  __syncthreads();\n  if (threadIdx.x == 0) atomicAdd(total, s.sums[0] + s.sums[1]);", "if (threadIdx.x == 0) atomicAdd(total, s.sums[0] + s.sums[1]);"),
        ("index", "matrix / 2 * 16", "(matrix + 1) / 2 * 16"),
        ("index", "m >= p.M || n >= p.N", "m > p.M || n >= p.N"),
        ("phase", "multiply(d, s, step % kStages);", "multiply(d, s, step % kStages ^ 1);"),
    ),
    *of(
        *("quantize_int8", 80, "quantize_rows.cuh"),
        ("barrier", "__syncthreads();", ""),
        ("index", "lane < warps ? words[lane] : 0u", "lane < warps - 1 ? words[lane] : 0u"),
        ("index", "first + me + int64_t{v} * team", "first + me + int64_t{v} * team + 1"),
    ),
    *of(
        *("int8_mm", 80, "int8_mm_sm80.cuh"),
        ("wait", "\n  cp_async_wait<kStages - 2>();\n  __syncthreads();", "__syncthreads();"),
        ("barrier", "\n  cp_async_wait<kStages - 2>();\n  __syncthreads();", "cp_async_wait<kStages - 2>();"),
        ("wait", "\n        cp_async_wait<kStages - 2>();\n        __syncthreads();", "__syncthreads();"),
        ("wait", "\n        cp_async_wait<kStages - 2>();\n        __syncthreads();", "cp_async_wait<kStages - 1>(); __syncthreads();"),
        ("barrier", "\n        cp_async_wait<kStages - 2>();\n        __syncthreads();", "cp_async_wait<kStages - 2>();"),
        ("barrier", "\n    write_slab<Tile>(sums, slab, words);\n    __syncwarp();", "write_slab<Tile>(sums, slab, words);"),
        ("index", "first_row + row + i * Tile::kPassRows < rows", "first_row + row + i * Tile::kPassRows <= rows"),
        ("index", "K - k - chunk_k", "K - k - chunk_k + 1"),
        ("index", "ask(step + kStages - 1, free_stage);", "ask(step + kStages - 1, stage);"),
        ("phase", "stage = stage + 1 < kStages ? stage + 1 : 0;", "stage = stage + 1 < kStages - 1 ? stage + 1 : 0;"),
    ),
    *of(
        *("int8_mm", 90, "int8_mm_sm90.cuh"),
        ("wait", "mbarrier_wait(&s.full[ring.stage], ring.parity);", ""),
        ("wait", "mbarrier_wait(&s.empty[ring.stage], ring.parity ^ 1);", ""),
        ("wait", "wgmma_wait<1>();", ""),
        ("wait", "wgmma_wait<0>();", ""),
        ("barrier", "wgmma_fence();", ""),
        ("barrier", "factors.store(p.epilogue, s.factors[warpgroup], thread);\n    named_barrier_sync(barrier, 128);", "factors.store(p.epilogue, s.factors[warpgroup], thread);"),
        ("barrier", "fence_mbarrier_init();", ""),
        ("index", "tall + uint64_t(2 * k)", "tall + uint64_t(2 * k + 1)"),
        ("index", "mbarrier_arrive_expect(full, Shared::kStageBytes);", "mbarrier_arrive_expect(full, Shared::kStageBytes - 128);"),
        ("phase", "mbarrier_wait(&s.full[ring.stage], ring.parity);", "mbarrier_wait(&s.full[ring.stage], ring.parity ^ 1);"),
        ("phase", "mbarrier_wait(&s.empty[ring.stage], ring.parity ^ 1);", "mbarrier_wait(&s.empty[ring.stage], ring.parity);"),
    ),
    *of(
        *("int8_mm", 90, "int8_mm_sm90_output.cuh"),
        ("phase", "mbarrier_wait_cluster(&s.written, tile_parity);", "mbarrier_wait_cluster(&s.written, tile_parity ^ 1);"),
    ),
    *of(
        *("int8_weight_mm", 80, "int8_weight_mm.cu"),
        ("barrier", "__syncthreads();", ""),
    ),
]  # fmt: skip


def spoiled(text: str, mutants: Sequence[tuple[int, Mutant]]) -> str:
    """Builds faults into a source, each behind its number."""
    for old in dict.fromkeys(mutant.old for _, mutant in mutants):
        assert text.count(old) == 1, f"{text.count(old)} of {old!r}: mend its mutants"
        indent, here = re.match(r"(\s*)(.*)", old, re.DOTALL).groups()
        for number, mutant in mutants:
            if mutant.old != old:
                continue
            if old.endswith(";"):
                here = f"if (simt::machine.mutant == {number}) {{ {mutant.new} }} else {{ {here} }}"
            else:
                here = f"(simt::machine.mutant == {number} ? {mutant.new} : {here})"
        text = text.replace(old, indent + here)
    return text


def build_driver(folder: Path, kernels: Path, options: Sequence[str]) -> Path:
    """The program of random calls with all kernels of that copy of csrc (the folder that holds cuda/)."""
    sources = [*cuda_sim.HOST, cuda_sim.SIMT / "driver.cpp", *sorted(kernels.glob("cuda/*.cu"))]
    if not (kernels / "cuda" / "selftest.cu").exists():
        sources.append(cuda_sim.SIMT / "selftest.cu")
    objects = cuda_sim.build_objects(sources, options, kernels)
    into = folder / "driver"
    subprocess.run([cuda_sim.compiler(), *options, *map(str, objects), "-o", str(into)], check=True)
    return into


@pytest.fixture(scope="module")
def mutants() -> Path:
    """The driver with all faults in it, none switched on."""
    name = hashlib.sha256((cuda_sim.digest("mutants") + repr(MUTANTS)).encode()).hexdigest()[:16]
    folder = cuda_sim.BUILD / f"mutants-{name}"
    kernels = folder / "cuda"
    with cuda_sim.locked():
        kernels.mkdir(parents=True, exist_ok=True)
        numbered = list(enumerate(MUTANTS, 1))
        sources = [
            p for p in (cuda_sim.ROOT / "csrc/cuda").iterdir() if p.suffix in (".cu", ".cuh")
        ]
        for path in [*sources, cuda_sim.SIMT / "selftest.cu"]:
            if path.name in ("launch.cu", "ptx.cuh", "launch.cuh"):
                continue
            mine = [(number, mutant) for number, mutant in numbered if mutant.file == path.name]
            text = spoiled(path.read_text(), mine)
            into = kernels / path.name
            if not into.exists() or into.read_text() != text:
                into.write_text(text)
    return build_driver(folder, folder, ("-O1",))


def drive(driver: Path, *arguments: object, timeout: float = 300) -> subprocess.CompletedProcess:
    command = [str(driver), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def test_without_a_fault_all_is_right(mutants: Path) -> None:
    run = drive(mutants, "all", 0, 100, 1, 0)
    assert run.returncode == 0, run.stdout + run.stderr


def test_all_four_kinds_of_faults() -> None:
    assert {mutant.kind for mutant in MUTANTS} == {"wait", "barrier", "index", "phase"}


@pytest.mark.parametrize("number", range(1, len(MUTANTS) + 1), ids=lambda n: str(MUTANTS[n - 1]))
def test_mutant_is_caught(mutants: Path, number: int) -> None:
    mutant = MUTANTS[number - 1]
    try:
        run = drive(mutants, mutant.op, mutant.arch, 300, number, number, timeout=60)
    except subprocess.TimeoutExpired:
        return  # it hangs, which a test sees too
    assert run.returncode != 0, "all bits are right"


# --- the sanitizers


def test_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    """Exact tensors on the heap with red zones around them, shared memory and stacks poisoned."""
    options = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
    driver = build_driver(tmp_path, cuda_sim.ROOT / "csrc", options)
    run = drive(driver, "all", 0, 60, 0, 0)
    assert run.returncode == 0, run.stdout + run.stderr
