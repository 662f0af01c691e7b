"""The sm_90 half of the SIMT machine: mbarriers, TMA, wgmma and clusters, and what it holds against a kernel.

A warp-specialized product (tests/simt/selftest_sm90.cu) must give the right sums whenever asynchronous work is
done, and must be caught whenever one of its steps is left out. So must every mutant of int8_mm_sm90.cuh.
"""

from __future__ import annotations

import ctypes
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import mutants
import numpy as np
import pytest
import sim_call
import simt_build
import torch
from cuda_sim import Simulator
from torch import Tensor

pytestmark = pytest.mark.skipif(
    shutil.which(simt_build.compiler()) is None, reason=f"no {simt_build.compiler()}"
)
POLICIES = ("late", "random", "early")


def built(folder: Path, objects: list[Path]) -> Path:
    into = folder / "libselftest.so"
    simt_build.link([*objects, *simt_build.build_objects(simt_build.HOST)], into)
    return into


@pytest.fixture(scope="session")
def selftest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    objects = simt_build.build_objects([simt_build.SIMT / "selftest_sm90.cu"])
    return built(tmp_path_factory.mktemp("selftest"), objects)


def random_int8(rows: int, columns: int, seed: int) -> Tensor:
    return torch.from_numpy(
        np.random.default_rng(seed).integers(-128, 128, (rows, columns), np.int8)
    )


# --- a product with every wrapper in it


def product(simulator: Simulator, M: int, N: int, K: int, mutation: int = 0) -> str | None:
    """What went wrong, or None. K a multiple of 16, N of 4."""
    a, b = random_int8(M, K, 1), random_int8(N, K, 2)
    out = sim_call.garbage(M, N, dtype=torch.int32)
    arguments = (a, b, out, M, N, K, mutation)
    try:
        simulator.call("simt_sm90_product", *arguments, reads=[a, b], writes=[out])
    except RuntimeError as error:
        return str(error)
    expected = a.numpy().astype(np.int32) @ b.numpy().astype(np.int32).T
    return None if np.array_equal(out.numpy(), expected) else "wrong bits"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", [(1, 4, 16), (64, 64, 128), (100, 136, 400), (200, 68, 1040)])
def test_product_is_exact(selftest: Path, shape: tuple[int, int, int], policy: str) -> None:
    for seed in range(3):
        simulator = Simulator(90, seed, policy, library=selftest)
        assert product(simulator, *shape) is None


# What selftest_sm90.cu leaves out, in the order of its Mutation, and what is said about it.
MUTATIONS = {
    "no wait for a full stage": "wrong bits|more arrivals in a phase",
    "no wait for an empty stage": "more arrivals in a phase",
    "parity of full flipped": "deadlock|more arrivals in a phase",
    "parity of empty flipped": "deadlock: .* waits for mbarrier_wait",
    "no fence_mbarrier_init": "without fence_mbarrier_init",
    "no barrier after mbarrier_init": "is not initialised|without fence_mbarrier_init",
    "no arrival in the other block": "deadlock",
    "too few bytes expected": "4096 bytes more came than were expected",
    "too many bytes expected": "deadlock",
    "multicast to one block": "deadlock",
    "both blocks load the same half": "wrong bits",
    "no wgmma_fence": "without wgmma_fence since",
    "no wgmma_commit": "sums written between|without a wgmma_wait before its thread exits",
    "no wgmma_wait": "sums written between|without a wgmma_wait before its thread exits",
    "a stage released at the issue": "wrong bits|deadlock",
    "sums not started at 0": "wrong bits",
    "a chunk of K twice": "wrong bits",
    "no fence_proxy_async": "wrong bits",
    "fence_proxy_async before the writes": "wrong bits",
    "no barrier before tma_store": "wrong bits",
    "outputs not swizzled": "wrong bits",
    "no tma_store_commit": "without tma_store_commit",
    "no wait before the buffer's next use": "wrong bits",
    "no wait after the last store": "without tma_store_wait_read",
    "no cluster_sync at the end": "after that block has exited",
}
# No engine that is fast enough shows these: they are races that only a late one loses.
ONLY_LATE = {
    "a stage released at the issue",
    "no wait before the buffer's next use",
    "no cluster_sync at the end",
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_caught(selftest: Path, name: str) -> None:
    mutation = list(MUTATIONS).index(name) + 1
    for policy in POLICIES:
        caught = [
            product(Simulator(90, seed, policy, library=selftest), 100, 136, 400, mutation)
            for seed in range(3)
        ]
        if policy == "late" or name not in ONLY_LATE:
            assert any(caught), policy
        if policy == "late":
            assert any(re.search(MUTATIONS[name], answer or "") for answer in caught), caught


# --- one misuse each

MISUSES = {
    0: "mbarrier at shared address 8200 is not initialised",
    1: "more arrivals in a phase than its count of 1",
    2: "mbarrier_init of a barrier in use",
    3: "was written over",
    4: "mbarrier_wait for parity 2",
    5: r"deadlock: .* waits for mbarrier_wait\(shared address 8192, parity 0\) at selftest_sm90.cu:\d+",
    6: "arrival at block rank 2 of a cluster of 2",
    7: "without fence_mbarrier_init",
    8: "mbarrier_init with a count of 0",
    10: "512 bytes more came than were expected|512 bytes are missing",
    11: "box in shared memory 128 bytes off its alignment of 1024",
    12: "load to blocks 0x4 of a cluster of 2",
    13: "load of 128 bytes at offset 1024 of a tensor of 1024 bytes",
    14: "1024 bytes are missing at the end of the block",
    15: "not a tensor map",
    16: "without fence_mbarrier_init",
    17: "tma_store without tma_store_wait_read",
    18: "tma_store without tma_store_commit",
    20: "wgmma without wgmma_fence",
    21: "divergent: wgmma with other operands",
    22: "operand of 64 rows at shared address 1024 ends at 9216",
    23: "swizzle mode 2: not modelled but for 1, 128 bytes",
    24: "sums written between a wgmma and the wgmma_wait",
    25: "wgmma without a wgmma_wait before its thread exits",
    26: "deadlock: .*for the warpgroup's other threads",
    27: "not modelled beyond the first 128 of 1024 bytes",
    28: "operand of 128 rows at shared address 0 ends at 16384",
    30: "to 100 registers: expected a multiple of 8",
    31: "setmaxnreg.dec from 40 to 48 registers",
    32: "to 264 registers: expected",
    33: "setmaxnreg.inc waits for a thread that exits: thread 5",
    34: "the warpgroups ask for .* of 65536",
    35: "cluster_sync (waits for|needs) (a )?thread .*exit",
    36: "without a release and mbarrier_wait_cluster",
    37: "without a release and mbarrier_wait_cluster",
}


@pytest.mark.parametrize("which", MISUSES)
def test_misuse_is_reported(selftest: Path, which: int) -> None:
    tensor = random_int8(8, 128, 0)
    simulator = Simulator(90, which, "late", library=selftest)
    threads = 384 if which == 34 else 256
    with pytest.raises(RuntimeError, match=MISUSES[which]) as error:
        simulator.call("simt_sm90_misuse", which, tensor, threads, reads=[], writes=[tensor])
    assert "selftest_sm90.cu:" in str(error.value)
    assert "block (" in str(error.value)


@pytest.mark.parametrize(
    "offset,rows,columns,stride,box_rows",
    [(8, 4, 32, 32, 8), (0, 0, 32, 32, 8), (0, 4, 0, 32, 8), (0, 4, 32, 40, 8), (0, 4, 32, 16, 8)]
    + [(0, 4, 32, 32, 0), (0, 4, 32, 32, 257)],
)
def test_tensor_map_is_refused(
    selftest: Path, offset: int, rows: int, columns: int, stride: int, box_rows: int
) -> None:
    whole = torch.empty(4096, dtype=torch.int8)
    data = whole[-whole.data_ptr() % 16 + offset :]
    simulator = Simulator(90, library=selftest)
    with pytest.raises(RuntimeError, match="map: the driver refused a tensor map"):
        arguments = (data, rows, columns, stride, box_rows)
        simulator.call("simt_sm90_map", *arguments, reads=[], writes=[])


# --- mutants of int8_mm_sm90.cuh

SOURCES = ("int8_mm_sm90.cuh", "int8_mm_sm90_output.cuh")
# One index or count off by one; all of these expressions must stand in the sources.
OFF_BY_ONE = {
    "int8_mm_sm90.cuh": {
        "step * kSm90Depth": "step * kSm90Depth + 1",
        "tile.wide + rank * kHalf": "tile.wide + rank * kHalf + 1",
        "rank * kHalf * kSm90Depth": "(rank * kHalf + 8) * kSm90Depth",
        "p.steps * (rank + 1) / p.cluster": "p.steps * (rank + 1) / p.cluster - 1",
        "warpgroup * 64 * kSm90Depth": "(warpgroup * 64 - 8 * warpgroup) * kSm90Depth",
        "tall + uint64_t(2 * k)": "tall + uint64_t(2 * k) + 1",
        "wide + uint64_t(2 * k)": "wide + uint64_t(2 * k ^ 2)",
        "step > tile.first_step": "step > tile.first_step + 1",
        "&s.empty[last]": "&s.empty[ring.stage]",
        "kSm90Warps * p.cluster": "kSm90Warps * p.cluster - 1",
        "Shared::kStageBytes": "Shared::kStageBytes - 16",
    },
    "int8_mm_sm90_output.cuh": {
        "++stage == kStages": "++stage == kStages + 1",
        "d[first + 4 * i + j]": "d[first + 4 * i + (j ^ 1)]",
        "m + row >= e.M": "m + row > e.M",
        "factors.a_scale[row]": "factors.a_scale[row ^ 1]",
        "factors.b_scale[column + j]": "factors.b_scale[column + (j ^ 1)]",
        "rank * kSm90Warps + warp": "rank * kSm90Warps + warp + 1",
        "chunk * kPieces * 8": "chunk * kPieces * 8 + 8",
    },
}
# Tiles of each kind, more of them than a block's stages and blocks:
# M, N, K, wide, swapped, split, cluster, multiprocessors
CASES = (
    (140, 200, 400, 64, 0, 1, 1, 2),
    (100, 140, 1040, 64, 0, 1, 2, 2),  # two blocks share out K
    (300, 300, 400, 128, 0, 0, 2, 2),  # two blocks share b
    (40, 300, 520, 32, 1, 1, 2, 2),
)
# What cannot show here, and why.
HARMLESS = {
    "int8_mm_sm90.cuh: barrier removed: named_barrier_sync(barrier, 128); "
    "// the last tile's factors have been read": "the wgmma_wait before it already needs all four "
    "warps, and a warp issues a tile's products after it has read the last one's factors",
    "int8_mm_sm90.cuh: barrier removed: __syncwarp();": "the producer's idle lanes wait in "
    "cluster_sync all the same; on a GPU it keeps the warp together for that",
}


def scaled_product(simulator: Simulator, case: tuple[int, ...]) -> Callable[[], str | None]:
    """Float32 sums times scales that are powers of two: exact."""
    M, N, K = case[:3]
    a, b = sim_call.padded(random_int8(M, K, 1)), sim_call.padded(random_int8(N, K, 2))
    chance = np.random.default_rng(3)
    a_scale, b_scale = (
        torch.from_numpy(np.exp2(chance.integers(-3, 4, n)).astype(np.float32)) for n in (M, N)
    )
    sums = a.numpy().astype(np.int32) @ b.numpy().astype(np.int32).T
    expected = sums.astype(np.float32) * a_scale.numpy()[:, None] * b_scale.numpy()

    def run() -> str | None:  # in a forked process, where torch's own threads are gone
        out = torch.from_numpy(np.full((M, N), np.nan, np.float32))
        try:
            arguments = (a, a_scale, b, b_scale, out, *case)
            reads = [a, a_scale, b, b_scale]
            simulator.call("simt_int8_mm_sm90", *arguments, reads=reads, writes=[out])
        except RuntimeError as error:
            return str(error)
        return None if np.array_equal(out.numpy(), expected) else "wrong bits"

    return run


@pytest.fixture(scope="session")
def mutated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[mutants.Mutant]]:
    folder = tmp_path_factory.mktemp("mutants")
    (folder / "cuda").mkdir()
    found: list[mutants.Mutant] = []
    for name in SOURCES:
        source = (simt_build.ROOT / "csrc/cuda" / name).read_text()
        text, more = mutants.mutate(name, source, OFF_BY_ONE[name], len(found) + 1)
        (folder / "cuda" / name).write_text(text)
        found += more
    into = folder / "mutants.o"
    simt_build.compile_object(simt_build.SIMT / "mutant_sm90.cu", into, folder, ["-O1"])
    return built(folder, [into]), found


def test_every_tile_and_cluster_of_int8_mm(
    mutated: tuple[Path, list[mutants.Mutant]],
) -> None:
    library, fields = mutated[0], (ctypes.c_int32 * 5)()
    number = 0
    while ctypes.CDLL(str(library)).simt_int8_mm_sm90_kind(number, fields):
        wide, swapped, split, cluster, most = fields
        while cluster <= most:
            simulator = Simulator(90, number, library=library)
            for M, N, K in ((1, 1, 1), (129, 140, 300), (40, 70, 2100)):
                if split and cluster > 1 and K < 256 * cluster:
                    continue  # a part of K has two steps or more
                case = (M, N, K, wide, swapped, split, cluster, 2 * cluster)
                assert scaled_product(simulator, case)() is None, case
            cluster *= 2
        number += 1
    assert number > 0


def test_every_mutant_of_int8_mm_is_caught(mutated: tuple[Path, list[mutants.Mutant]]) -> None:
    library, found = mutated
    loaded = ctypes.CDLL(str(library))
    runs = [
        scaled_product(Simulator(90, seed, policy, library=library), case)
        for seed in range(3)
        for case in CASES
        for policy in POLICIES
    ]

    def run(number: int) -> str | None:
        loaded.simt_mutate(number)
        return next(filter(None, (one() for one in runs)), None)

    assert mutants.fate(lambda: run(0)) is None
    caught, alive = mutants.survivors(found, run)
    for mutant, answer in caught.items():
        print(f"{mutant.line:4} {mutant}: {answer}")
    assert {"wait removed", "barrier removed", "phase flipped", "index off by one"} <= {
        mutant.kind for mutant in caught
    }
    assert {str(mutant) for mutant in alive} == set(HARMLESS)
