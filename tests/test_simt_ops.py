"""Faults in the kernels of the optimizers and of sparsity are caught, as test_simt.py has it for the INT8 ones:
waits, barriers and commits removed, indices off by one (mutants.py).

The calls are made from Python here. They run on a library that has all faults in it; a fault that is switched
on must show as another result than without, or as a fault that the machine reports.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
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

from trimtab import ops, optim
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
            "at >= params.n_rows": "at + 1 >= params.n_rows",
            "blockIdx.x - norm_grid": "blockIdx.x - norm_grid + 1",
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
            "k + 32 * i < n": "k + 32 * i + 1 < n",
        },
    ),
    "optim_probe.cuh": (
        "optim",
        {
            "uint32_t(blocks - 1)": "uint32_t(blocks - 2)",
            "begin + lane": "begin + lane + 1",
            "block += warps": "block += warps + 1",
            "at += threads": "at += threads - 1",
            "param * param": "param * direction",
            "direction * direction": "direction * param",
        },
    ),
    "adafactor_table.cuh": (
        "adafactor",
        {"stream < 3": "stream < 2", "at >= step.n_rows": "at + 1 >= step.n_rows"},
    ),
    "adafactor_average.cuh": (
        "adafactor",
        {
            "4 * k + chain": "4 * k + (chain & 1)",
            "begin < chunk.first ? kept[c] : 0.0f": "0.0f",
            "unit >= units": "unit + 1 >= units",
            "unit < units": "unit + 1 < units",
            "i / width": "i / (width + 1)",
            "k * columns": "(k ^ 1) * columns",
            "at % s.mean_parts * kMeanRows": "at % s.mean_parts",
            "matrix * s.mean_parts": "matrix",
            "i < p.matrices * p.each": "i < p.matrices * p.each - 1",
            "32 * half": "32 * half - 1",
            "block + k < s.row_blocks": "block + k + 1 < s.row_blocks",
            "own[half]": "own[half - 1]",
            "i % used + kNormSums": "i % used + kNormSums + 1",
            "(block + k) * s.batch": "block * s.batch",
        },
    ),
    "adafactor_update.cuh": (
        "adafactor",
        {
            "p->column >= s.columns": "p->column > s.columns",
            "p->row_of_matrix >= s.rows": "p->row_of_matrix > s.rows",
            "32 / d.s.columns": "32 / (d.s.columns + 1)",
            "ahead + 32 * k >= end": "ahead + 32 * k + 1 >= end",
            "uint32_t(blocks - 1)": "uint32_t(blocks - 2)",
            "tile + kTile <= row.numel": "tile + kTile <= row.numel + kEight",
            "at < ::min(tile + kTile, last)": "at < ::min(tile + kTile, last) - 1",
            "place.columns + place.column": "place.column",
            "at += kDirectionBlock": "at += 2 * kDirectionBlock",
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
            "j * 8 / Tile::kSlabTokens != slab": "j * 8 / Tile::kSlabTokens < slab",
            "first + token < e.M": "first + token < e.M - 1",
            "warp * Tile::kSlabWords": "(warp & ~1) * Tile::kSlabWords",
            "first + within % rows": "first + within % (rows - (rows > 1))",
        },
    ),
    "sparse24_mm_sm90.cuh": (
        "sparse24_sm90",
        {
            "(lane / 4 ^ row16) * 4": "lane / 4 * 4",
            "step * Shared::kMetaBlocks + i < p.blocks64": "true",
            "tile.n / 16 + warp < p.rows16": "true",
            "tile.m + rank * kHalf": "tile.m",
            "wide + 4": "wide + 2",
            "4 * kPieces * c": "4 * kPieces * (c ^ 1)",
            "at.tall + j": "at.tall + (j ^ 1)",
            "m >= out.M": "m > out.M",
        },
    ),
    "sparse24_compress.cuh": (
        "sparse24_compress",
        {
            "high == 3": "high >= 2",
            "i % 2 * 8 * Tile::kCodeRow": "i / 2 * 8 * Tile::kCodeRow",
            "left < 8": "left < 7",
            "left < 2": "left < 1",
            "byte < out.row_bytes": "byte <= out.row_bytes",
            "lane * kColumns + c": "(lane ^ 1) * kColumns + c",
            "warp * Tile::kCodeBytes": "(warp ^ 1) * Tile::kCodeBytes",
        },
    ),
    "bitmap_walk.cuh": (
        "bitmap",
        {
            "left < 16": "left < 0",
            "position < 0": "false",
            "position < p.count": "true",
            "i < own": "i + 1 < own",
            "last ? all - mine : 0": "last ? mine : 0",
        },
    ),
    "bitmap_mm.cuh": (
        "bitmap",
        {
            "first < 32 ? 0 : __popc(low)": "0",
            "bits[half] >> k & 1": "true",
            "at % 4 * 8": "at % 2 * 8",
            "x[j].word[s + 1]": "x[j].word[s]",
            "first_token<C>() + m": "m",
            "t == m % 8 / 2": "t == m % 4 / 2",
        },
    ),
    "block_mm.cuh": (
        "block",
        {
            "ask(step + kStages - 1, free_stage)": "ask(step + kStages - 1, stage)",
            "column < 0": "false",
            "left < 16": "left < 0",
            "first_m + i * Tile::kPassRows < p.epilogue.M": "true",
            "load_column(step + 1)": "load_column(step)",
            "part + 1": "part",
            "part < p.parts": "part + 1 < p.parts",
            "two[j / 4]": "two[0]",
            "m >= p.epilogue.M": "m > p.epilogue.M",
        },
    ),
    "block_fma.cuh": (
        "block_fma",
        {
            "m < p.M && k < p.K": "m <= p.M && k < p.K",
            "k + j < p.bk": "true",
            "k + j >= count": "false",
            "left < p.bk": "false",
            "n % p.bn": "0",
            "column >= 0 && left > 0": "left > 0",
            "4 * lane + t": "4 * lane + (t ^ 1)",
            "b + 1 < range.end": "true",
            "n < p.epilogue.N": "true",
        },
    ),
    "block_grad.cuh": (
        "block_grad",
        {
            "row_start(p, middle) / kEach + middle <= slot": "row_start(p, middle) / kEach + middle < slot",
            "left < 16": "left < 0",
            "m < M && bytes > 0": "m <= M && bytes > 0",
            "4 * warp + 2 * j + lane / 16": "4 * warp + 2 * j + (lane / 16 ^ 1)",
            "16 * half + t": "16 * (half ^ 1) + t",
            "(blockIdx.y + 1)": "blockIdx.y",
            "ask(step + kStages - 1, free_stage)": "ask(step + kStages - 1, stage)",
            "n >= p.N || k >= p.K": "false",
            "block < group.count": "true",
            "n / p.bn + warp": "n / p.bn + warp + 1",
            "row - first_n": "row - n0",
            "part < p.parts": "part + 1 < p.parts",
        },
    ),
}
# What cannot show here, and why.
HARMLESS = {
    "optim_probe.cuh: fence removed: __threadfence();": "all blocks see the machine's memory at once",
    "adafactor_update.cuh: fence removed: __threadfence();": "the same",
    "sparse24_mm_sm90.cuh: barrier removed: __syncwarp();": "the machine brings a warp together itself "
    "where cluster_sync, being .aligned, wants it together",
}
KERNELS = (
    "optim_step.cu",
    "adafactor.cu",
    "quantize_int8.cu",
    "sparse24_compress.cu",
    "sparse24_linear.cu",
    "bitmap_linear.cu",
    "block_linear.cu",
    "block_grad_values.cu",
)


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


def whole(*shape: int, dtype: torch.dtype, most: int = 4) -> torch.Tensor:
    """Small whole numbers: sums are exact, so that their order, which is the seed's, does not show."""
    g = torch.Generator().manual_seed(shape[0])
    return torch.randint(-most, most + 1, shape, generator=g).to(dtype)


def operands(dtype: torch.dtype, M: int, N: int, K: int) -> tuple[torch.Tensor, Any]:
    """x and, for int8, the weight's scale."""
    if dtype != torch.int8:
        return whole(M, K, dtype=dtype), None
    g = torch.Generator().manual_seed(M)
    return torch.randn(M, K, generator=g).to(torch.bfloat16), torch.rand(N, generator=g)


def sparse24_linear(
    sim: cuda_sim.Simulator, shapes: Iterable[tuple[torch.dtype, int, int, int]]
) -> Iterator[list[torch.Tensor]]:
    for dtype, M, N, K in shapes:
        x, scale = operands(dtype, M, N, K)
        values, indices = random_weight(N, K, dtype, torch.Generator().manual_seed(M))
        values = values.float().mul(4 if dtype != torch.int8 else 1).round().to(dtype)
        metadata = sparse24_metadata(indices, K, dtype)
        yield [sim.sparse24_linear(x, sparse24_rows(values), metadata, scale)]


def sparse24_calls(sim: cuda_sim.Simulator) -> Iterator[list[torch.Tensor]]:
    shapes = ((torch.bfloat16, 33, 70, 460), (torch.float16, 9, 130, 260))
    return sparse24_linear(sim, (*shapes, (torch.int8, 100, 40, 1080)))


def sparse24_sm90_calls(sim: cuda_sim.Simulator) -> Iterator[list[torch.Tensor]]:
    """A block of its own, whose ring of stages comes round; then pairs that share tokens, which takes longer."""
    return sparse24_linear(sim, ((torch.int8, 40, 100, 1600), (torch.bfloat16, 70, 300, 264)))


def sparse24_compress_calls(sim: cuda_sim.Simulator) -> Iterator[list[torch.Tensor]]:
    for dtype, K in ((torch.float32, 90), (torch.bfloat16, 96), (torch.int8, 90)):
        parts = sim.sparse24_compress(whole(66, K, dtype=dtype, most=9), both=True)
        yield [part for part in parts if part is not None]


BITMAP: tuple[tuple[torch.dtype, int, int, int], ...] = (  # M, N, K
    (torch.float32, 9, 17, 1100),
    (torch.bfloat16, 18, 20, 2100),
    (torch.int8, 5, 17, 2100),
)


def bitmap_calls(sim: cuda_sim.Simulator) -> Iterator[list[torch.Tensor]]:
    for dtype, M, N, K in BITMAP:
        x, scale = operands(dtype, M, N, K)
        x[M - 1, 70] = float("inf") if dtype != torch.int8 else 1
        kept = torch.rand(N, K, generator=torch.Generator().manual_seed(K)) < 0.3
        values, bits, start = ops.bitmap_pack(whole(N, K, dtype=dtype) * kept)
        yield [sim.bitmap_linear(x, values, bits, start, scale)]
        # Bytes of the third overflow into a place before the values.
        past = 3 * 2**62 // max(values.element_size(), 2)
        for outside in (start + 2**40, start + past, start - 2**40):  # any result, no fault
            sim.bitmap_linear(x[:1, :64], values, bits[:, :8].contiguous(), outside, scale)


BLOCK: tuple[tuple[torch.dtype, int, int, int, int], ...] = (  # side of a block, M, N, K
    (torch.bfloat16, 32, 33, 70, 100),
    (torch.float16, 16, 5, 20, 6000),
    (torch.int8, 64, 7, 70, 600),
)


def block_calls(sim: cuda_sim.Simulator) -> Iterator[list[torch.Tensor]]:
    for dtype, side, M, N, K in BLOCK:
        x, scale = operands(dtype, M, N, -(-K // 8) * 8)
        kept = torch.rand(-(-N // side), -(-K // side), generator=torch.Generator().manual_seed(K))
        mask = (kept < 0.7).repeat_interleave(side, 0).repeat_interleave(side, 1)[:N, :K]
        weight = whole(N, K, dtype=dtype) * mask
        values, starts, columns = ops.block_pack(weight, (side, side), refuse_larger=False)
        yield [sim.block_linear(x[:, :K], values, starts, columns, scale, None, 0, N)]
        for shift in (-9, 9):  # any result, no fault
            sim.block_linear(x[:, :K], values, starts, columns + shift, scale, None, 0, N)


BLOCK_FMA: tuple[tuple[torch.dtype, tuple[int, int], int, int, int], ...] = (
    (torch.float32, (8, 12), 33, 70, 100),
    (torch.bfloat16, (1, 16), 9, 11, 700),
    (torch.int8, (3, 5), 3, 10, 64),
)


def kept_blocks(dtype: torch.dtype, block: tuple[int, int], N: int, K: int) -> Any:
    (bn, bk), g = block, torch.Generator().manual_seed(K)
    kept = torch.rand(-(-N // bn), -(-K // bk), generator=g) < 0.7
    kept[0] = len(kept) == 1  # the first of several rows of blocks is empty
    mask = kept.repeat_interleave(bn, 0).repeat_interleave(bk, 1)[:N, :K]
    return ops.block_pack(whole(N, K, dtype=dtype) * mask, block, mask, refuse_larger=False)


def block_fma_calls(sim: cuda_sim.Simulator) -> Iterator[list[torch.Tensor]]:
    for dtype, block, M, N, K in BLOCK_FMA:
        x, scale = operands(dtype, M, N, K)
        values, starts, columns = kept_blocks(dtype, block, N, K)
        yield [sim.block_linear(x, values, starts, columns, scale, None, 0, N)]
        for shift in (-9, 9):  # any result, no fault
            sim.block_linear(x, values, starts, columns + shift, scale, None, 0, N)


BLOCK_GRAD: tuple[tuple[torch.dtype, tuple[int, int], int, int, int], ...] = (
    (torch.float16, (40, 24), 20, 70, 150),
    (torch.bfloat16, (32, 32), 330, 70, 100),
    (torch.float32, (16, 16), 2050, 12, 44),  # so many that a part's stages come round
)


def block_grad_calls(sim: cuda_sim.Simulator) -> Iterator[list[torch.Tensor]]:
    for dtype, block, M, N, K in BLOCK_GRAD:
        grad, x = (whole(M, -(-wide // 8) * 8, dtype=dtype)[:, :wide] for wide in (N, K))
        grad[M - 1, 3], x[0, 5] = float("inf"), float("inf")
        _, starts, columns = kept_blocks(dtype, block, N, K)
        yield [sim.block_grad_values(grad, x, starts, columns, *block)]
        for shift in (-9, 9):  # any result, no fault
            sim.block_grad_values(grad, x, starts, columns + shift, *block)


ADAFACTOR: tuple[tuple[torch.dtype, tuple[tuple[int, ...], ...], dict[str, Any]], ...] = (
    (torch.float32, ((2044,), (40, 3, 3), (66, 516), (4, 40, 16), (2, 4100)), {}),
    (torch.float32, ((1100, 3), (2, 1030, 2), (600, 8)), {}),
    (torch.bfloat16, ((1031,), (33, 17), (4, 5, 16)), {"rounding": "stochastic"}),
    (torch.float32, ((3,),) * 300, {}),
)


def adafactor_calls(sim: cuda_sim.Simulator) -> Iterator[list[torch.Tensor]]:
    for dtype, shapes, options in ADAFACTOR:
        params = optim_cases.parameters(shapes, dtype)
        optimizer = optim.Adafactor(params, **options)
        with optim_on_sim.as_gpu(sim):
            for step in range(2 if len(shapes) < 9 else 1):
                optim_cases.set_gradients(step, params)
                optimizer.step()
        states = [v for p in params for v in optimizer.state[p].values()]
        yield [p.detach() for p in params] + states


CALLS: dict[str, Callable[[cuda_sim.Simulator], Iterator[list[torch.Tensor]]]] = {
    "optim": optim_calls,
    "adafactor": adafactor_calls,
    "sparse24": sparse24_calls,
    "sparse24_sm90": sparse24_sm90_calls,
    "sparse24_compress": sparse24_compress_calls,
    "bitmap": bitmap_calls,
    "block": block_calls,
    "block_fma": block_fma_calls,
    "block_grad": block_grad_calls,
}
SEEDS = 4


def simulator(calls: str, seed: int = 0, library: Path | None = None) -> cuda_sim.Simulator:
    arch, sm_count = (90, 2) if calls == "sparse24_sm90" else (80, 1)
    return cuda_sim.Simulator(arch, seed, sm_count=sm_count, library=library)


@pytest.fixture(scope="module")
def right() -> dict[str, list[list[torch.Tensor]]]:
    """By the sources as they are."""
    return {name: list(calls(simulator(name))) for name, calls in CALLS.items()}


def differs(library: Path, right: Any, calls: str, number: int, seed: int) -> str | None:
    sim = simulator(calls, seed, library)
    sim._library.simt_mutate(number)
    for at, (got, wanted) in enumerate(zip(CALLS[calls](sim), right[calls], strict=True)):
        if not all(map(optim_cases.same_bits, got, wanted)):
            return f"other bits in call {at}"
    return None


@pytest.mark.parametrize("calls", CALLS)
def test_without_a_fault_all_is_right(library: Path, right: Any, calls: str) -> None:
    """With other seeds too: what differs below is the fault's."""
    for seed in (0, 2):
        assert differs(library, right, calls, 0, seed) is None


@pytest.mark.parametrize("calls", CALLS)
def test_faults_are_caught(library: Path, right: Any, calls: str) -> None:
    mine = [mutant for which, mutant in MUTANTS if which == calls]

    harmless = {mutant.number for mutant in mine if str(mutant) in HARMLESS}

    def run(number: int) -> str | None:
        torch.set_num_threads(1)  # this is a fork: the pool's threads are not there
        found = (
            differs(library, right, calls, number, seed)
            for seed in range(1 if number in harmless else SEEDS)
        )
        return next(filter(None, found), None)

    caught, alive = mutants.survivors(mine, run)
    assert {m.kind for m in caught} >= {"barrier removed", "index off by one"}
    assert {str(m) for m in alive} == {text for text in HARMLESS if text in map(str, mine)}
