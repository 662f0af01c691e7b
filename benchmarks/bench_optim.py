"""A step of the optimizers against torch's for-loop, foreach and fused, bitsandbytes, and a bare loop.

The streaming loop has the step's reads and writes (AdamW fp32: 28 bytes a parameter) and no
arithmetic to speak of; our share of its speed is printed. Clipping is clip_grad_norm_ for torch, folded
in for us. Every peer's result is compared with ours before it is timed; of a peer that is not installed
the reason is written down.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable

import harness
import size_plot
from harness import Table, Timing, geomean, interleave
from optim_peers import (
    ADAFACTOR,
    CASES,
    MUON,
    RULES,
    SMALL_STATE,
    Case,
    Model,
    check,
    peer_step,
    stream,
    traffic_bytes,
    trimtab_step,
)
from peers import Absent

MODELS = (
    Model("3x16.7M", 3, (1 << 24,)),
    Model("1x4.2M", 1, (1 << 22,)),
    Model("2000x64", 2000, (64,)),
    Model("465 groups of 64", 465, (64,), apart=True),
)
ONE = (Model("1x16.7M", 1, (1 << 24,)),)
MATRICES = (Model("4x2048x2048", 4, (2048, 2048)), Model("100x16x16", 100, (16, 16)))
SQUARES = (Model("4x512x512", 4, (512, 512)), Model("100x16x16", 100, (16, 16)))
FACTORED = (
    *MATRICES,
    Model("1x4096x4096", 1, (4096, 4096)),
    Model("3x4096x4096", 3, (4096, 4096)),
    Model("2000x64", 2000, (64,)),
)
# cases, models, seconds a line
SECTIONS = (
    (CASES, MODELS, 4.0),
    (SMALL_STATE, ONE, 5.0),
    (RULES, MATRICES, 2.0),
    ((ADAFACTOR,), FACTORED, 4.0),
    ((MUON,), SQUARES, 2.0),
)
QUICK = (Model("3x5000", 3, (50, 100)), Model("20x64", 20, (8, 8), apart=True))
SIZES = tuple(1 << k for k in range(10, 26))  # parameters of the sweep, from L1 to DRAM
QUICK_SIZES = (1 << 10, 1 << 14)
DRAM = 1 << 22  # elements; from there on the streaming loop is timed


def candidates(
    case: Case, model: Model, threads: int, absent: dict[str, str]
) -> dict[str, Callable[[], object]]:
    params = model.parameters(case.dtype)
    ours = trimtab_step(case, model, params)
    ours()
    found: dict[str, Callable[[], object]] = {"trimtab": ours}
    for peer in case.peers:
        try:
            check(case, peer)
            found[peer] = peer_step(peer, case, model, params)
        except Absent as reason:
            absent[peer] = str(reason)
    if case.traffic and model.numel >= DRAM:
        floats = model.numel * case.dtype.itemsize // 4
        found["streaming loop"] = stream(case.traffic, floats, threads)
    return found


KEEP = ("torch fused", "torch fused fp32", "streaming loop")


def measure(
    table: Table, case: Case, model: Model, seconds: float, threads: int
) -> dict[str, Timing]:
    absent: dict[str, str] = {}
    times = interleave(candidates(case, model, threads, absent), seconds, keep=KEEP)
    extra = {"traffic": traffic_bytes(case.traffic)} if case.traffic else {}
    for name, value in times.items():
        table.add(name, case.name, ("model", model.name), value, **extra)
    for name, reason in absent.items():
        x = ("model", model.name)
        table.add(name, "absent", x, 0.0, metric="absent", unit="", reason=reason)
        print(f"{name} is not measured: {reason}")
    return times


def report(case: Case, model: Model, times: dict[str, Timing]) -> None:
    mine = times["trimtab"].median
    line = f"{case.name:<34} {model.name:<17} trimtab {mine:10.1f} us"
    for name, value in times.items():
        if name == "streaming loop":
            line += f"   {100 * value.median / mine:.0f} % of a {name}"
        elif name != "trimtab":
            line += f"   {name} {value.median / mine:.2f}x"
    print(line, flush=True)


def models(table: Table, options: argparse.Namespace) -> None:
    """Every case on its models; a line each."""
    ratios: dict[str, list[float]] = {}
    for cases, shapes, seconds in SECTIONS:
        for case in cases:
            quick = QUICK if cases is CASES else QUICK[:1]
            for model in wanted(options, case, quick if options.quick else shapes):
                limit = 0.05 if options.quick else seconds
                times = measure(table, case, model, limit, options.threads)
                report(case, model, times)
                for name, value in times.items():
                    if name not in ("trimtab", "streaming loop"):
                        ratios.setdefault(name, []).append(value.median / times["trimtab"].median)
    for name, values in ratios.items():
        print(f"geomean: {geomean(values):.2f}x of {name}")


def sweep(table: Table, options: argparse.Namespace) -> None:
    """GB/s of AdamW in fp32 by model size; the slow for-loop is left out."""
    case = Case("sweep", "AdamW", ("torch fused", "torch foreach"), traffic=(4, 3, 0, 0))
    for total in QUICK_SIZES if options.quick else SIZES:
        model = Model(f"16x{total // 16}", 16, (total // 16,))
        if not wanted(options, case, (model,)):
            continue
        calls = candidates(case, model, options.threads, {})
        calls["streaming loop"] = stream((4, 3, 0, 0), total, options.threads)
        times = interleave(calls, 0.2 if options.quick else 2.0, keep=KEEP)
        line = f"{total:>10} parameters"
        for name, value in times.items():
            speed = total * 28 / value.median * 1e-3
            table.add(name, "sweep", ("parameters", str(total)), value, gb_per_s=speed)
            line += f"   {name} {speed:.2f} GB/s"
        print(line, flush=True)


def wanted(options: argparse.Namespace, case: Case, shapes: Iterable[Model]) -> list[Model]:
    return [m for m in shapes if re.search(options.only, f"{case.name} {m.name}")]


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument(
        "--only", default="", metavar="REGEX", help='such as "AdamW.*2000" or sweep'
    )
    options = parser.parse_args()
    harness.start(options)
    table = Table("optim", options.out)
    models(table, options)
    sweep(table, options)
    table.write()
    size_plot.write(table.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
