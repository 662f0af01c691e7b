"""swap_(model, Sparse(...)) over many layers, and sparse layers against the peers.

    python benchmarks/bench_sparse.py [--quick] [--only dispatcher peers] [--match REGEX]

dispatcher  a pruned Linear a point (M, K, N, dtype, pattern, sparsity, int8 allowed or not): what
            swap_ made of it against the best dense choice: torch's or, where int8 is allowed, our
            Int8Linear. None may be more than 3 % slower, or larger than the dense weight. A point
            beyond that is timed once more, for longer, and the second figure counts. What stayed dense
            is that choice.
peers       decode and batched rows against torch dense fp32 and bf16, our Int8Linear, torch.sparse CSR
            and BSR, OpenVINO int8 with and without CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE. Weights
            rotate, so that together they are larger than the caches; a peer that fails is named.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import harness
import torch
from harness import Table, Timing
from torch import Tensor, nn
from torch.nn import functional as F

import trimtab
from trimtab.nn import Int8Linear, SparseLinear

LIMIT = 1.03
BLOCK = (32, 32)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = (
    (1, 1024, 1024),
    (1, 4096, 4096),
    (4, 2048, 1024),
    (16, 1024, 4096),
    (33, 1001, 771),
    (64, 384, 1536),
    (128, 1024, 1024),
    (256, 768, 3072),
    (512, 512, 2048),
)
FORMS = (
    ("bitmap", 0.5),
    ("bitmap", 0.8),
    ("bitmap", 0.95),
    ("2:4", 0.5),
    ("block", 0.7),
    ("block", 0.9),
)
QUICK_SHAPES = ((3, 96, 64),)


def main() -> int:
    parser = harness.parser(__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=("dispatcher", "peers"))
    parser.add_argument("--match", default="", help="only points whose line has this in it")
    options = parser.parse_args()
    harness.start(options)
    for name in options.only or ("dispatcher", "peers"):
        {"dispatcher": bench_dispatcher, "peers": bench_peers}[name](options)
    return 0


# --- pruned layers


def mask_of(N: int, K: int, pattern: str, sparsity: float) -> Tensor:
    if pattern == "2:4":
        order = torch.rand(N, -(-K // 4), 4).argsort(-1)
        return (order < 2).flatten(1)[:, :K]
    if pattern == "block":
        bn, bk = BLOCK
        kept = torch.rand(-(-N // bn), -(-K // bk)) >= sparsity
        return kept.repeat_interleave(bn, 0).repeat_interleave(bk, 1)[:N, :K]
    return torch.rand(N, K) >= sparsity


def pruned(K: int, N: int, dtype: torch.dtype, pattern: str, sparsity: float) -> nn.Linear:
    layer = nn.Linear(K, N)
    layer.weight.copy_(torch.randn(N, K) / K**0.5 * mask_of(N, K, pattern, sparsity))
    return layer.to(dtype).eval()


def copies(layer: nn.Linear, count: int) -> list[nn.Linear]:
    """The layer and others with its rows moved, by whole blocks."""
    layers = [layer]
    for i in range(1, count):
        other = copy.deepcopy(layer)
        other.weight.copy_(layer.weight.roll(i * BLOCK[0], 0))
        layers.append(other)
    return layers


def held(layer: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*layer.parameters(), *layer.buffers()])


# --- the dispatcher


@dataclass
class Point:
    shape: tuple[int, int, int]
    dtype: str
    pattern: str
    sparsity: float
    int8: bool

    def __str__(self) -> str:
        allowed = " int8" if self.int8 else ""
        at = ",".join(map(str, self.shape))
        return f"{at} {self.dtype} {self.pattern} {self.sparsity:.0%}{allowed}"


def points(options: argparse.Namespace) -> list[Point]:
    shapes = QUICK_SHAPES if options.quick else SHAPES
    every = [
        Point(shape, dtype, pattern, sparsity, int8)
        for shape, dtype, (pattern, sparsity), int8 in itertools.product(
            shapes, DTYPES, FORMS, (False, True)
        )
    ]
    return [point for point in every if re.search(options.match, str(point))]


def bench_dispatcher(options: argparse.Namespace) -> None:
    table = Table("sparse_dispatcher", options.out)
    ratios: dict[str, float] = {}
    larger: list[str] = []
    chosen: dict[str, int] = {}
    for point in points(options):
        label, ratio, fits = bench_point(table, point, options.quick)
        ratios[str(point)] = ratio
        larger += [] if fits else [str(point)]
        chosen[label] = chosen.get(label, 0) + 1
    slow = [f"{at} ({ratio:.3f})" for at, ratio in ratios.items() if ratio > LIMIT]
    print(f"\n{len(ratios)} points: " + ", ".join(f"{n} {label}" for label, n in chosen.items()))
    print(f"more than 3 % slower than the best dense choice: {len(slow)}  {'; '.join(slow)}")
    print(f"larger than the dense weight: {len(larger)}  {'; '.join(larger)}")
    gains = [1 / ratio for ratio in ratios.values() if ratio != 1]
    if gains:
        print(
            f"geomean over the best dense choice where it was not that: {harness.geomean(gains):.2f}x"
        )
    for metric, value in (
        ("points", len(ratios)), ("slower", len(slow)), ("larger", len(larger)),
        ("worst ratio", max(ratios.values(), default=1.0)),
    ):  # fmt: skip
        table.add(
            "trimtab swap_", "summary", ("case", "all"), float(value), metric=metric, unit="1"
        )
    table.write()


def bench_point(table: Table, point: Point, quick: bool) -> tuple[str, float, bool]:
    """(what swap_ chose, its time over that of the best dense choice, no larger than dense?)"""
    M, K, N = point.shape
    dense = pruned(K, N, DTYPES[point.dtype], point.pattern, point.sparsity)
    x = torch.randn(M, K).to(DTYPES[point.dtype])
    model = nn.Sequential(dense)
    block = BLOCK if point.pattern == "block" else None
    config = trimtab.Sparse(point.pattern, block=block, int8=point.int8)
    row = trimtab.swap_(model, config, example_inputs=x)["0"]
    layer, fits = model[0], held(model[0]) <= held(dense)
    check(str(point), layer(x), dense(x))
    label = {nn.Linear: "dense", Int8Linear: "int8"}.get(type(layer), "sparse")
    label += " int8" if label == "sparse" and layer.int8 else ""
    against: dict[str, nn.Module] = {"dense": dense}
    if point.int8:
        against["int8"] = Int8Linear.from_float(dense)
    if label in against and len(against) == 1:
        ratio, times = 1.0, {}  # the very same module
    else:
        seconds = 0.05 if quick else 0.25
        ratio, times = time_point(layer, label, against, x, seconds)
        if ratio > LIMIT and not quick:
            ratio, times = time_point(layer, label, against, x, 8 * seconds)
    extra = {
        "sparsity": point.sparsity,
        "int8": point.int8,
        "bytes": held(layer),
        "dense": held(dense),
    }
    mode, at = f"{point.dtype} {point.pattern}", ("M,K,N", ",".join(map(str, point.shape)))
    for name, value in times.items():
        table.add(
            "trimtab swap_" if name == "chosen" else name, mode, at, value, chosen=label, **extra
        )
    table.add("trimtab swap_", mode, at, ratio, metric="ratio", unit="1", chosen=label, **extra)
    print(f"{point!s:<42} {label:<12} {ratio:6.3f}  {row.reason}"[:170], flush=True)
    return label, ratio, fits


def time_point(
    layer: nn.Module, label: str, against: dict[str, nn.Module], x: Tensor, seconds: float
) -> tuple[float, dict[str, Timing]]:
    """Interleaved; where the choice is itself one of the dense ones, it is timed once."""
    calls: dict[str, Callable[[], object]] = {"chosen": lambda: layer(x)}
    for name, other in against.items():
        if name != label:
            calls[name] = lambda other=other: other(x)
    times = harness.interleave(calls, seconds, keep=list(calls), min_rounds=9)
    own = times["chosen"].median
    best = min(time.median for time in times.values()) if label in against else min(
        time.median for name, time in times.items() if name != "chosen"
    )  # fmt: skip
    return own / best, times


def check(name: str, got: Tensor, want: Tensor) -> None:
    error = float((got.double() - want.double()).norm() / want.double().norm())
    if not error < 0.03:
        raise SystemExit(f"bench_sparse: {name} is off by {error:.1e}: not timed")


# --- peers

ROTATED_BYTES = 1 << 28  # of dense bf16 weights together: more than the L2 caches, and most L3
# M, K, N, what: each with its sparsities
CASES: tuple[tuple[str, tuple[tuple[int, int, int], ...], tuple[float, ...]], ...] = (
    ("bf16 bitmap", ((1, 4096, 4096), (16, 4096, 4096)), (0.5, 0.8, 0.9)),
    ("int8 bitmap", ((1, 4096, 4096), (16, 4096, 4096)), (0.5, 0.8)),
    ("fp32 bitmap", ((128, 1024, 4096),), (0.7, 0.8, 0.9)),
    ("bf16 block", ((1, 4096, 4096), (128, 1024, 4096)), (0.9,)),
    ("int8 2:4", ((16, 4096, 4096),), (0.5,)),
)
Layers = Sequence[nn.Linear]


def rotate(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def modules(layers: Sequence[nn.Module], x: Tensor) -> Callable[[], object]:
    return rotate([lambda layer=layer: layer(x) for layer in layers])


def torch_csr(layers: Layers, x: Tensor, sparsity: float) -> Callable[[], object]:
    """fp32 weights in CSR; torch has no bf16 product of them on a CPU."""
    weights = [layer.weight.float().to_sparse_csr() for layer in layers]
    columns = x.float().t()
    return rotate([lambda w=w: w @ columns for w in weights])


def torch_bsr(layers: Layers, x: Tensor, sparsity: float) -> Callable[[], object]:
    weights = [layer.weight.float().to_sparse_bsr(BLOCK) for layer in layers]
    rows = x.float()
    return rotate([lambda w=w: F.linear(rows, w) for w in weights])


def openvino(rate: float | None) -> Callable[[Layers, Tensor, float], Callable[[], object]]:
    """A quantized MatMul, x by a FakeQuantize; ``rate``: of zeros from which weights decompress."""

    def build(layers: Layers, x: Tensor, sparsity: float) -> Callable[[], object]:
        import numpy as np
        import openvino as ov
        from openvino import opset13 as op

        data = x.float().numpy()
        top = float(np.abs(data).max())
        config = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        if rate is not None:
            config["CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"] = min(rate, sparsity - 0.05)
        core, calls = ov.Core(), []
        for layer in layers:
            weight = layer.weight.float().numpy()
            scale = np.abs(weight).max(1, keepdims=True) / 127
            scale = np.where(scale == 0, 1, scale).astype(np.float32)
            node = op.parameter(list(x.shape), ov.Type.f32)
            low, high = np.float32(-top), np.float32(top)
            quantized = op.fake_quantize(node, low, high, low, high, 255)
            codes = op.convert(op.constant(np.rint(weight / scale).astype(np.int8)), "f32")
            product = op.matmul(quantized, op.multiply(codes, op.constant(scale)), False, True)
            y = op.add(product, op.constant(layer.bias.float().numpy()[None]))
            request = core.compile_model(
                ov.Model([y], [node]), "CPU", config
            ).create_infer_request()
            calls.append(
                lambda r=request: r.infer([data], share_inputs=True, share_outputs=True)[0]
            )
        return rotate(calls)

    return build


def bench_peers(options: argparse.Namespace) -> None:
    table = Table("sparse_peers", options.out)
    absent: dict[str, str] = {}
    for what, shapes, sparsities in CASES:
        shapes = QUICK_SHAPES if options.quick else shapes
        for shape, sparsity in itertools.product(
            shapes, sparsities[:1] if options.quick else sparsities
        ):
            if re.search(options.match, f"{what} {','.join(map(str, shape))} {sparsity:.0%}"):
                bench_case(table, what, shape, sparsity, absent, options.quick)
    for name, reason in absent.items():
        print(f"not timed: {name}: {reason}")
    table.write()


def bench_case(
    table: Table, what: str, shape: tuple[int, int, int], sparsity: float, absent: dict[str, str],
    quick: bool,
) -> None:  # fmt: skip
    M, K, N = shape
    kind, pattern = what.split()
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    count = 2 if quick else max(2, ROTATED_BYTES // (2 * K * N))
    layers = copies(pruned(K, N, dtype, pattern, sparsity), count)
    x = torch.randn(M, K).to(dtype)
    form = {"pattern": pattern, "block": BLOCK, "int8": kind == "int8"}
    ours = f"trimtab {what}"
    calls = {ours: modules([SparseLinear.from_float(layer, **form) for layer in layers], x)}
    calls[f"torch {'fp32' if kind == 'fp32' else 'bf16'}"] = modules(layers, x)
    if kind == "fp32":
        half = copies(pruned(K, N, torch.bfloat16, pattern, sparsity), count)
        calls["torch bf16 (other precision)"] = modules(half, x.bfloat16())
    if kind == "int8":
        calls["trimtab int8"] = modules([Int8Linear.from_float(layer) for layer in layers], x)
    want = layers[0](x).float()
    peers = {} if kind == "int8" else {"torch CSR fp32": torch_csr}
    if pattern == "block":
        peers["torch BSR fp32"] = torch_bsr
    if kind == "int8":
        peers["OpenVINO int8"] = openvino(None)
        peers["OpenVINO int8, sparse weights"] = openvino(0.5)
    for name, build in peers.items():
        try:
            call = build(layers, x, sparsity)
            got = torch.as_tensor(call())  # the first layer's answer
            got = got.t() if got.shape != want.shape else got
            bias = layers[0].bias.float() if "CSR" in name or "BSR" in name else 0
            check(name, got + bias, want)
            for _ in layers[1:]:
                call()
            calls[name] = call
        except (Exception, SystemExit) as problem:
            absent[name] = f"{type(problem).__name__}: {str(problem).splitlines()[0][:120]}"
    times = harness.interleave(calls, 0.1 if quick else 1.5)
    mine = times[ours].median
    line = f"{what} {','.join(map(str, shape))} {sparsity:.0%}: {mine:9.1f} us"
    for name, value in times.items():
        table.add(name, what, ("M,K,N", ",".join(map(str, shape))), value, sparsity=sparsity)
        line += f"   {name} {value.median / mine:.2f}x" if name != ours else ""
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
