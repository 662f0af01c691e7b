"""The whole int8 linear layer against every peer that is installed.

    python benchmarks/bench_int8_linear.py [--quick] [--shapes 1,4096,4096 ...] [--peers REGEX]
                                           [--only shapes sweep isa overhead]

shapes    µs, TOPS, share of the bare dot-product loop timed in the same rounds, × the best peer
sweep     no cliffs: M = 1...65 at K = N = 1024, odd K and N against the padded shape
isa       the AVX2, AVX-VNNI and AVX-512 paths against torch fp32 as such a machine runs it
overhead  a 1×64×64 Int8Linear against nn.Linear

Weights are the same ones in every call, so those that fit a cache stay there, ours and theirs.
"""

from __future__ import annotations

import argparse
import re
import sys

import harness
import linear_modes
import numpy as np
import peers
import roofline
import torch
from harness import Table, Timing, geomean

import trimtab.nn
from trimtab import ops
from trimtab.reference.int8_linear import int8_linear as reference_int8_linear

SHAPES = (
    (1, 4096, 4096),
    (4, 4096, 11008),
    (8, 4096, 4096),
    (17, 1001, 4099),
    (32, 1024, 1024),
    (64, 2048, 8192),
    (128, 768, 3072),
    (128, 3072, 768),
    (512, 1024, 4096),
    (512, 4096, 1024),
    (2048, 1024, 1024),
    (4096, 384, 1536),
    (4096, 4096, 4096),
)
QUICK = ((8, 256, 512), (17, 101, 259))
OURS = "trimtab int8"
LOOP = "bare loop"


def main() -> int:
    options = parse()
    harness.start(options)
    sections = {
        "shapes": bench_shapes,
        "sweep": linear_modes.bench_sweep,
        "isa": linear_modes.bench_isa,
        "overhead": linear_modes.bench_overhead,
    }
    for name in options.only or sections:
        sections[name](options)
    return 0


def parse() -> argparse.Namespace:
    parser = harness.parser(__doc__.partition("\n")[0])
    parser.add_argument(
        "--shapes", nargs="+", type=shape, metavar="M,K,N", help="instead of the list"
    )
    parser.add_argument("--only", nargs="+", choices=("shapes", "sweep", "isa", "overhead"))
    parser.add_argument(
        "--seconds", type=float, default=6.0, help="of rounds a shape (%(default)s)"
    )
    parser.add_argument("--peers", help="only peers whose name matches this regular expression")
    return parser.parse_args()


def shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+,\d+,\d+", text):
        raise argparse.ArgumentTypeError(f"expected M,K,N, got {text!r}")
    return tuple(int(part) for part in text.split(","))


def bench_shapes(options: argparse.Namespace) -> None:
    """The table of the README: a line a shape and dtype, a geomean, the CSV, the roofline."""
    table = Table("int8_linear", options.out)
    shapes = options.shapes or (QUICK if options.quick else SHAPES)
    notes: dict[str, str] = {}
    for dtype, known in ((torch.float32, peers.FP32), (torch.bfloat16, peers.BF16)):
        label = "fp32" if dtype == torch.float32 else "bf16"
        chosen = {
            n: f for n, f in known.items() if not options.peers or re.search(options.peers, n)
        }
        print(f"\n{label} in and out, {options.threads} threads")
        print(f"{'M,K,N':<16} {'µs':>10} {'TOPS':>7} {'% loop':>7} {'× best':>7}  best peer")
        against: list[float] = []
        for case in shapes:
            problem = peers.problem(*case, dtype, options.threads)
            calls, absent = peers.build(chosen, problem)
            at = ",".join(map(str, case))
            notes |= {name: f"{reason} (at {at})" for name, reason in absent.items()}
            seconds = 0.3 if options.quick else options.seconds * (1 if label == "fp32" else 0.4)
            ratio = bench_shape(table, label, problem, calls, seconds)
            against += [ratio] if ratio else []
        if against:
            worst = min(against)
            print(
                f"geomean {geomean(against):.2f} × the best peer of each shape, worst {worst:.2f}"
            )
    for name, reason in notes.items():
        print(f"not measured: {name}: {reason}")
        table.add(name, "absent", ("M,K,N", ""), 0.0, metric="absent", unit="", reason=reason)
    table.write()
    roofline.write(table.path)


def bench_shape(
    table: Table, label: str, problem: peers.Problem, calls: dict[str, peers.Call], seconds: float
) -> float | None:
    """Times one shape, prints and records it; returns × the best peer."""
    M, K, N = problem.shape
    layer = trimtab.nn.Int8Linear.from_float(peers.linear(problem))
    check(layer, problem)
    candidates = {OURS: lambda: layer(problem.x), **calls}
    loop = harness.bare_loop(ops.get_isa(), problem.threads)
    if loop is not None:
        candidates[LOOP] = loop[0]
    times = harness.interleave(candidates, seconds, keep=(LOOP,))
    work = 2.0 * M * K * N
    x = ("M,K,N", f"{M},{K},{N}")
    mode = f"{label}->{label}"
    # A loop's turn is some operations in some time: 1e-6 of their quotient is TOPS.
    peak = loop[1] / times[LOOP].median * 1e-6 if loop is not None else float("nan")
    for name, value in times.items():
        if name == LOOP:
            continue
        tops = work / value.median * 1e-6
        table.add(name, mode, x, value, tops=float(f"{tops:.4g}"), peak_tops=float(f"{peak:.4g}"))
    mine = times[OURS].median
    line = (
        f"{x[1]:<16} {mine:10.1f} {work / mine * 1e-6:7.3f} {100 * work / mine * 1e-6 / peak:7.1f}"
    )
    best = best_peer(times)
    if best is None:
        print(line, flush=True)
        return None
    ratio = times[best].median / mine
    print(f"{line} {ratio:7.2f}  {best} {times[best].median:.1f}", flush=True)
    return ratio


def best_peer(times: dict[str, Timing]) -> str | None:
    others = [name for name in times if name not in (OURS, LOOP)]
    return min(others, key=lambda name: times[name].median, default=None)


def check(layer: trimtab.nn.Int8Linear, problem: peers.Problem) -> None:
    """The layer gives the reference's bits on the first rows, or nothing is timed.

    A row's result does not depend on the others (tests hold that for all of them).
    """
    rows = slice(0, 16)
    dtype = "float32" if problem.x.dtype == torch.float32 else "bfloat16"
    weight, scale = layer.int8_weight().numpy(), layer.weight_scale.numpy()
    x, bias, got = (as_numpy(t) for t in (problem.x[rows], problem.bias, layer(problem.x)[rows]))
    want = reference_int8_linear(x, weight, scale, bias, "none", dtype)
    if not np.array_equal(got, want):
        worst = int((got != want).sum())
        raise SystemExit(
            f"bench_int8_linear: {worst} of {want.size} outputs differ from the reference at M,K,N = "
            f"{problem.shape}, {dtype}: not timed"
        )


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """bfloat16 as its uint16 bits, as the reference wants it."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy()
    return tensor.numpy()


if __name__ == "__main__":
    sys.exit(main())
