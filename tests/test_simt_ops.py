"""Faults in the kernels of the optimizers and of the 2:4 product are caught, as test_simt.py has it for the
INT8 ones: waits, barriers and commits removed, indices off by one (mutants.py).

The calls are made from Python here. They run on a library that has all faults in it; a fault that is switched
on must show as another result than without, or as a fault that the machine reports.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cuda_sim
import mutants
import optim_cases
import optim_on_sim
import pytest
import simt_build
import torch
from test_sparse24_linear import random_weight

from trimtab import optim
from trimtab.ops.sparse24_linear import sparse24_metadata, sparse24_rows

pytestmark = pytest.mark.skipif(
    shutil.which(simt_build.compiler()) is None, reason="no C++ compiler"
)

# One index or count off by one; all of these expressions must stand in the sources. By the calls that show it.
SOURCES: dict[str, tuple[str, dict[str, str]]] = {
    "optim_step.cuh": (
        "optim",
        {
            "tile + kTile <= row.body": "tile + kTile <= row.body + kEight",
            "at < ::min(tile + kTile, last)": "at < ::min(tile + kTile, last) - 1",
        },
    ),
    "optim_elements.cuh": ("optim", {"to + 16 * i": "to + 16 * (i ^ 1)"}),
    "optim_compact.cuh": (
        "optim",
        {
            "begin + 32 * j + lane < last": "begin + 32 * j + lane <= last",
            "k * kEight * kUpdateThreads": "k * kEight",
            "at < row.body": "at <= row.body",
        },
    ),
    "optim_memory.cuh": ("optim", {"other > largest": "other < largest"}),
    "optim_prepare.cuh": (
        "optim",
        {
            "at + 32 * k < end": "at + 32 * k < end - 1",
            "k + i * kThreads < params.n_blocks": "k + i * kThreads + 1 < params.n_blocks",
            "threadIdx.x + i * kThreads": "threadIdx.x + (i ^ 1) * kThreads",
            "at >= params.n_rows": "at + 1 >= params.n_rows",
            "blockIdx.x - norm_grid": "blockIdx.x - norm_grid + 1",
        },
    ),
    "optim_probe.cuh": (
        "optim",
        {
            "k + 32 * i < n": "k + 32 * i + 1 < n",
            "uint32_t(blocks - 1)": "uint32_t(blocks - 2)",
            "begin + lane": "begin + lane + 1",
            "block += warps": "block += warps + 1",
            "at += threads": "at += threads - 1",
            "param * param": "param * direction",
            "direction * direction": "direction * param",
        },
    ),
    "sparse24_mm_sm80.cuh": (
        "sparse24",
        {
            "ask(step + kStages - 1, free_stage)": "ask(step + kStages - 1, stage)",
            "stage + 1 < kStages": "stage + 1 < kStages - 1",
            "free_stage = stage": "free_stage = stage + 1 < kStages ? stage + 1 : 0",
            "wanted < p.blocks64": "wanted <= p.blocks64",
            "tile_n * kRows16 + row16 < last16": "tile_n * kRows16 + row16 <= last16 + 1",
            "2 * kHalf + lane / 16": "2 * kHalf + (lane / 16 ^ 1)",
            "4 * kHalf + lane / 8": "4 * kHalf + (lane / 8 ^ 1)",
            "j * 8 / Tile::kSlabTokens != slab": "j * 8 / Tile::kSlabTokens > slab",
            "first + token < e.M": "first + token < e.M - 1",
            "warp * Tile::kSlabWords": "(warp & ~1) * Tile::kSlabWords",
            "first + within % rows": "first + within % (rows - (rows > 1))",
        },
    ),
}
# What cannot show here, and why.
HARMLESS = {
    "optim_probe.cuh: fence removed: __threadfence();": "all blocks see the machine's memory at once",
}
KERNELS = ("optim_step.cu", "sparse24_linear.cu", "quantize_int8.cu")


def spoiled() -> tuple[dict[str, str], list[tuple[str, mutants.Mutant]]]:
    """The sources with all faults in them, and (calls, fault)."""
    texts, found = {}, []
    for name, (calls, edits) in SOURCES.items():
        source = (simt_build.ROOT / "csrc/cuda" / name).read_text()
        texts[name], more = mutants.mutate(name, source, edits, len(found) + 1)
        found += [(calls, mutant) for mutant in more]
    return texts, found


TEXTS, MUTANTS = spoiled()


@pytest.fixture(scope="module")
def library() -> Path:
    name = hashlib.sha256((simt_build.digest("mutants") + repr(TEXTS)).encode()).hexdigest()[:16]
    folder = simt_build.BUILD / f"ops-mutants-{name}"
    with simt_build.locked():
        (folder / "cuda").mkdir(parents=True, exist_ok=True)
        for file, text in TEXTS.items():
            (folder / "cuda" / file).write_text(text)
    sources = [*simt_build.HOST, *(simt_build.ROOT / "csrc/cuda" / name for name in KERNELS)]
    objects = simt_build.build_objects(sources, ("-O1",), folder)
    simt_build.link(objects, folder / "libmutants.so")
    return folder / "libmutants.so"


# --- the calls: each gives the tensors that it computed


FP32 = {"state_dtype": torch.float32}
OPTIM: tuple[tuple[str, torch.dtype, tuple[int, ...], dict[str, Any]], ...] = (
    ("AdamW", torch.bfloat16, (1031, 4101, 9000), {"max_grad_norm": 1.0}),
    ("AdamW", torch.float32, (300, 2044, 2048), {"state_dtype": "int8", "min_8bit_numel": 1}),
    # The first element of torch's tail, which rounds otherwise, many times.
    ("AdamW", torch.bfloat16, (1034, *range(17, 128, 16)), {"master": "kahan", **FP32}),
    ("LAMB", torch.float32, (9000, 4200), {"state_dtype": "int8", "min_8bit_numel": 5000}),
    ("LAMB", torch.float32, (*[1] * 600, 5000), {"max_grad_norm": 1.0}),
)


def optim_calls(sim: cuda_sim.Simulator) -> Iterator[list[torch.Tensor]]:
    for name, dtype, sizes, options in OPTIM:
        params = optim_cases.parameters(sizes, dtype)
        if name == "LAMB":
            params[0].data[0] = 1e22  # its square is no fp32, nor that of the direction
        optimizer = getattr(optim, name)(params, **options)
        with optim_on_sim.as_gpu(sim):
            for step in range(2 if len(sizes) < 9 else 1):
                optim_cases.set_gradients(step, params)
                optimizer.step()
        states = [v for p in params for v in optimizer.state[p].values()]
        yield [p.detach() for p in params] + [v for v in states if isinstance(v, torch.Tensor)]


SPARSE24: tuple[tuple[torch.dtype, int, int, int], ...] = (  # M, N, K
    (torch.bfloat16, 33, 70, 460),
    (torch.float16, 9, 130, 260),
    (torch.int8, 100, 40, 1100),
)


def sparse24_calls(sim: cuda_sim.Simulator) -> Iterator[list[torch.Tensor]]:
    for dtype, M, N, K in SPARSE24:
        g = torch.Generator().manual_seed(M)
        values, indices = random_weight(N, K, dtype, g)
        x = torch.randn(M, K, generator=g).to(torch.bfloat16 if dtype == torch.int8 else dtype)
        scale = torch.rand(N, generator=g) if dtype == torch.int8 else None
        metadata = sparse24_metadata(indices, K, dtype)
        yield [sim.sparse24_linear(x, sparse24_rows(values), metadata, scale)]


CALLS: dict[str, Callable[[cuda_sim.Simulator], Iterator[list[torch.Tensor]]]] = {
    "optim": optim_calls,
    "sparse24": sparse24_calls,
}


@pytest.fixture(scope="module")
def right() -> dict[str, list[list[torch.Tensor]]]:
    """By the sources as they are."""
    return {name: list(calls(cuda_sim.Simulator(sm_count=1))) for name, calls in CALLS.items()}


def differs(library: Path, right: Any, calls: str, number: int, seed: int) -> str | None:
    sim = cuda_sim.Simulator(seed=seed, library=library, sm_count=1)
    sim._library.simt_mutate(number)
    for at, (got, wanted) in enumerate(zip(CALLS[calls](sim), right[calls], strict=True)):
        if not all(map(optim_cases.same_bits, got, wanted)):
            return f"other bits in call {at}"
    return None


@pytest.mark.parametrize("calls", CALLS)
def test_without_a_fault_all_is_right(library: Path, right: Any, calls: str) -> None:
    assert differs(library, right, calls, 0, 0) is None


@pytest.mark.parametrize("calls", CALLS)
def test_faults_are_caught(library: Path, right: Any, calls: str) -> None:
    mine = [mutant for which, mutant in MUTANTS if which == calls]

    harmless = {mutant.number for mutant in mine if str(mutant) in HARMLESS}

    def run(number: int) -> str | None:
        torch.set_num_threads(1)  # this is a fork: the pool's threads are not there
        found = (
            differs(library, right, calls, number, seed)
            for seed in range(1 if number in harmless else 4)
        )
        return next(filter(None, found), None)

    caught, alive = mutants.survivors(mine, run)
    assert {m.kind for m in caught} >= {"barrier removed", "index off by one"}
    assert {str(m) for m in alive} == {text for text in HARMLESS if calls in text}
