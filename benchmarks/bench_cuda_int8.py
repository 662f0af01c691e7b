"""The int8 ops on a GPU: CUDA C++ and Triton against torch's bf16, int8 and fp8, in one run.

    python benchmarks/bench_cuda_int8.py [--quick] [--device cuda] [--only layers decode scan host]

layers  whole layer and product alone, K and N of an 8B and a 70B Llama, M = 1 ... 8192
decode  weight-only, M = 1 ... 16 at 8192 x 8192, against the copy bandwidth measured in the same rounds
scan    no cliffs: every M = 1 ... 513, also at odd K and N
host    host time of one small call

Writes <device>.csv: every figure, the bars of the project and what came of them, losses too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import Any

import gpu
import gpu_peers
import harness
import torch
from gpu import Gpu, Table
from gpu_peers import DECODE, LAYERS, PRODUCTS, Problem

from trimtab import ops
from trimtab.nn import Int8Linear

# (K, N) of the linear layers of Llama 3, queries, keys and values joined, gate and up too.
LLAMA_8B = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))
LLAMA_70B = ((8192, 10240), (8192, 8192), (8192, 57344), (28672, 8192))
ROWS = (1, 16, 64, 128, 512, 1024, 2048, 4096, 8192)
DECODE_ROWS, DECODE_SIZE = (1, 2, 4, 8, 16), 8192
SCAN = ((4096, 4096), (1001, 4099))
SCAN_ROWS = range(1, 514)
CHECKED_ROWS = 256  # against the float layer; Triton is compared on all
ROUNDS_A_POINT = 8  # of the scan, at least
FAILURES: list[str] = []  # shapes whose result was wrong
OURS, BF16 = "trimtab CUDA", {"layer": "nn.Linear bf16", "product": "cuBLAS bf16"}


def main() -> int:
    parser = harness.parser(__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", help="cpu: only to see whether it works")
    parser.add_argument("--only", nargs="+", choices=tuple(SECTIONS))
    parser.add_argument(
        "--seconds", type=float, default=0.7, help="of rounds a shape (%(default)s)"
    )
    parser.add_argument("--step", type=int, default=1, help="of M in the scan (%(default)s)")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("not measured: torch sees no GPU")
        return 0
    if options.device == "cuda" and (problem := ops.backend.cuda_problem()):
        print(f"bench_cuda_int8: CUDA C++ does not answer here: {problem}", file=sys.stderr)
        return 1
    harness.start(options)
    table, device = Table(options.device, options.out), Gpu(options.device)
    print(", ".join(f"{key} {value}" for key, value in table.stamp.items()), flush=True)
    for name in options.only or SECTIONS:
        SECTIONS[name](device, table, options)
        table.write()  # after each: what was measured survives what follows
    for failure in FAILURES:
        print(f"NOT TIMED: {failure}", file=sys.stderr)
    return 1 if FAILURES else 0


def sizes(
    options: argparse.Namespace, full: Iterable[Any], quick: Iterable[Any]
) -> tuple[Any, ...]:
    return tuple(quick if options.quick else full)


def seconds(options: argparse.Namespace) -> float:
    return 0.02 if options.quick else options.seconds


def is_right(p: Problem, calls: dict[str, gpu.Call]) -> bool:
    """Ours is close to the float layer on some rows, and the same bits as Triton's on all."""
    got, where = calls[OURS](), f"M,K,N={','.join(map(str, p.shape))}"
    few = slice(-min(CHECKED_ROWS, p.shape[0]), None)
    want = torch.nn.functional.linear(p.x[few].float(), p.weight.float(), p.bias.float())
    wrong = ""
    if not (got[few].float() - want).norm() < 0.03 * want.norm():
        wrong = f"not close to the float layer at {where}"
    elif "trimtab Triton" in calls and not torch.equal(calls["trimtab Triton"](), got):
        wrong = f"CUDA and Triton differ at {where}"
    if wrong:
        print(wrong, flush=True)
        FAILURES.append(wrong)
    return not wrong


def note_absent(table: Table, section: str, p: Problem, absent: dict[str, str]) -> None:
    for name, reason in absent.items():
        table.add(section, name, p.shape, 0.0, metric="absent", unit="", reason=reason)


# --- whole layers and products


def bench_layers(device: Gpu, table: Table, options: argparse.Namespace) -> None:
    shapes = sizes(options, LLAMA_8B + LLAMA_70B, [(64, 48)])
    ratios: dict[tuple[str, str], list[float]] = {}
    best, peak = 0.0, gpu.peak_tops(table.stamp["device"])
    print(f"\n{'M,K,N':<18} {'layer us':>9} {'x bf16':>7} {'product us':>10} {'x bf16':>7} "
          f"{'x _int_mm':>9} {'TOPS':>6}")  # fmt: skip
    for K, N in shapes:
        rows = sizes(options, ROWS, [3, 32])
        whole = gpu_peers.problem(max(rows), K, N, device.device)
        for M in rows:
            p = whole.rows(M)
            times = time_layer(device, table, p, seconds(options))
            if not times:
                continue
            tops = 2e-6 * M * K * N / times["product", OURS].median
            line = f"{f'{M},{K},{N}':<18} {times['layer', OURS].median:9.1f}"
            for kind in ("layer", "product"):
                if kind == "product":
                    line += f" {times[kind, OURS].median:10.1f}"
                ratio = times[kind, BF16[kind]].median / times[kind, OURS].median
                line += f" {ratio:7.2f}"
                if M >= 512 or options.quick:
                    ratios.setdefault((kind, "bf16"), []).append(ratio)
            int_mm = times.get(("product", "_int_mm"))
            ratio = int_mm.median / times["product", OURS].median if int_mm else float("nan")
            if int_mm and (M >= 512 or options.quick):
                ratios.setdefault(("product", "_int_mm"), []).append(ratio)
            print(f"{line} {ratio:9.2f} {tops:6.0f}", flush=True)
            best = max(best, tops)
        del whole, p  # 2 GB of operands at the largest
    for (kind, other), values in ratios.items():
        bar = {("product", "bf16"): 1.6, ("product", "_int_mm"): 1.1}.get((kind, other), 1.4)
        value = min(values) if kind == "layer" else harness.geomean(values)
        what = f"{kind} x {other}, {'worst' if kind == 'layer' else 'geomean'} of M >= 512"
        judge(table, what, value, bar)
    judge(table, "product, best share of the int8 peak", best / peak, 0.65)


def time_layer(device: Gpu, table: Table, p: Problem, budget: float) -> dict[tuple[str, str], Any]:
    """All candidates of both kinds in the same rounds; nothing if the result is wrong."""
    calls: dict[tuple[str, str], gpu.Call] = {}
    for kind, known in (("layer", LAYERS), ("product", PRODUCTS)):
        built, absent = gpu_peers.build(known, p)
        if not is_right(p, built):
            return {}
        note_absent(table, kind, p, absent)
        calls |= {(kind, name): call for name, call in built.items()}
    labels = {f"{kind}: {name}": (kind, name) for kind, name in calls}
    times = device.interleave({label: calls[key] for label, key in labels.items()}, budget)
    M, K, N = p.shape
    for label, (kind, name) in labels.items():
        tops = 2e-6 * M * K * N / times[label].median
        table.add(kind, name, p.shape, times[label], tops=float(f"{tops:.4g}"))
    return {labels[label]: value for label, value in times.items()}


def judge(table: Table, what: str, value: float, bar: float, *, most: bool = False) -> None:
    """A bar of the project: at least so much, or with ``most`` at most."""
    met = value <= bar if most else value >= bar
    print(f"{'met ' if met else 'MISSED'} {what}: {value:.3g}, bar {bar}", flush=True)
    table.add("bars", OURS, ("", "", ""), value, metric=what, unit="", bar=bar, met=met)


# --- decode


def bench_decode(device: Gpu, table: Table, options: argparse.Namespace) -> None:
    (size,) = sizes(options, [DECODE_SIZE], [64])
    whole = gpu_peers.problem(max(DECODE_ROWS), size, size, device.device)
    source = torch.empty(4 * size * size, dtype=torch.int8, device=device.device)
    target = torch.empty_like(source)
    worst_ratio, worst_share = float("inf"), float("inf")
    print(f"\n{'M':<4} {'us':>8} {'x bf16':>7} {'GB/s':>7} {'% of copy':>9}")
    for M in DECODE_ROWS:
        p = whole.rows(M)
        calls, absent = gpu_peers.build(DECODE, p)
        note_absent(table, "decode", p, absent)
        want = torch.nn.functional.linear(
            p.x.float(), p.q.float() * p.scale[:, None], p.bias.float()
        )
        if not (calls[OURS]().float() - want).norm() < 0.01 * want.norm():
            FAILURES.append(f"weight-only product is wrong at M={M}")
            continue
        calls["copy"] = lambda: target.copy_(source)
        times = device.interleave(calls, seconds(options))
        for name, value in times.items():
            table.add("decode", name, p.shape, value)
        mine = times[OURS].median
        copy_rate = 2 * source.numel() / times["copy"].median * 1e-3  # read and written, GB/s
        rate = (p.q.numel() + 2 * p.x.numel() + 2 * M * size) / mine * 1e-3
        ratio = times["nn.Linear bf16"].median / mine
        worst_ratio, worst_share = min(worst_ratio, ratio), min(worst_share, rate / copy_rate)
        print(
            f"{M:<4} {mine:8.1f} {ratio:7.2f} {rate:7.0f} {100 * rate / copy_rate:9.1f}", flush=True
        )
    judge(table, "decode x bf16, worst", worst_ratio, 1.7)
    judge(table, "decode, worst share of the copy bandwidth", worst_share, 0.8)


# --- no cliffs


def bench_scan(device: Gpu, table: Table, options: argparse.Namespace) -> None:
    for K, N in sizes(options, SCAN, [(33, 35)]):
        rows = sizes(options, SCAN_ROWS[:: options.step], [1, 2, 17])
        whole = gpu_peers.problem(max(rows), K, N, device.device)
        ratios = {}
        for M in rows:
            p = whole.rows(M)
            chosen = {name: LAYERS[name](p) for name in (OURS, BF16["layer"])}
            times = device.interleave(chosen, 0.01, min_rounds=ROUNDS_A_POINT, max_rounds=24)
            for name, value in times.items():
                table.add("scan", name, p.shape, value)
            ratios[M] = times[BF16["layer"]].median / times[OURS].median
        worst = min(ratios, key=lambda M: ratios[M])
        low = [M for M, ratio in ratios.items() if ratio < 0.9]
        print(
            f"\nscan K={K} N={N}: worst at M={worst}; below 0.9 x bf16 at {len(low)} of {len(rows)}"
        )
        judge(table, f"scan {K}x{N}, worst x bf16", ratios[worst], 0.9)


# --- the host


def bench_host(device: Gpu, table: Table, options: argparse.Namespace) -> None:
    """A 1 x 64 x 64 layer: nothing but the way there."""
    p = gpu_peers.problem(1, 64, 64, device.device)
    float_layer = torch.nn.Linear(64, 64, device=device.device, dtype=torch.bfloat16)
    module = Int8Linear.from_float(float_layer)
    calls = {
        OURS: LAYERS[OURS](p),
        "trimtab CUDA, Int8Linear": lambda: module(p.x),
        "trimtab CUDA, ops.int8_linear": lambda: ops.int8_linear(p.x, p.q, p.scale, p.bias),
        "trimtab CUDA, product": PRODUCTS[OURS](p),
        "trimtab CUDA, weight-only": DECODE[OURS](p),
        "nn.Linear bf16": lambda: float_layer(p.x),
    }
    triton, _ = gpu_peers.build({OURS: LAYERS[OURS], "trimtab Triton": LAYERS["trimtab Triton"]}, p)
    print("\nhost time of a 1 x 64 x 64 call")
    batches = 2 if options.quick else 20
    times = {name: device.host(call, batches) for name, call in (calls | triton).items()}
    for name, value in times.items():
        table.add("host", name, p.shape, value)
        print(f"{name:<32} {value.median:7.1f} us")
    judge(table, "host time of a layer, us", times[OURS].median, 12, most=True)


SECTIONS = {
    "layers": bench_layers,
    "decode": bench_decode,
    "scan": bench_scan,
    "host": bench_host,
}

if __name__ == "__main__":
    sys.exit(main())
