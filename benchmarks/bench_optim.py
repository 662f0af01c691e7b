"""A step of the optimizers against torch's for-loop, foreach and fused, and a bare streaming loop.

The loop has the step's reads and writes (AdamW fp32: 28 bytes a parameter) and no arithmetic to speak
of; our share of its speed is printed. Clipping is clip_grad_norm_ for torch, folded in for us.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import harness
import size_plot
import torch
from harness import Table, Timing, geomean, interleave

from trimtab import optim

# name, tensors, elements of each, a group for each tensor
MODELS = (
    ("3x16.7M", 3, 1 << 24, False),
    ("2000x64", 2000, 64, False),
    ("465 groups of 64", 465, 64, True),
)
SIZES = tuple(1 << k for k in range(10, 26))  # parameters of the sweep, from L1 to DRAM
QUICK_SIZES = (1 << 10, 1 << 14)
QUICK = (("3x5000", 3, 5000, False), ("20x64", 20, 64, True))
# name, class, options, whether gradients are clipped, dtype
CASES: tuple[tuple[str, str, dict[str, float], bool, torch.dtype], ...] = (
    ("AdamW fp32", "AdamW", {}, False, torch.float32),
    ("AdamW fp32 clipped", "AdamW", {}, True, torch.float32),
    ("AdamW bf16", "AdamW", {}, False, torch.bfloat16),
    ("SGD momentum fp32", "SGD", {"momentum": 0.9}, False, torch.float32),
)
# Arrays read, and of those written: p, then states, then g.
TRAFFIC = {"AdamW": (4, 3), "SGD": (3, 2)}
KINDS = {
    "torch fused": {"fused": True},
    "torch foreach": {"foreach": True},
    "torch single": {"foreach": False},
}


@cache
def stream_library() -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise RuntimeError("the streaming loop needs a C++ compiler: no c++ or g++, CXX not set")
    with tempfile.TemporaryDirectory(prefix="trimtab-stream-") as folder:
        library = Path(folder) / "stream.so"
        source = Path(__file__).with_name("stream.cpp")
        # -ffast-math: the sum in any order, so that it vectorizes
        flags = [
            "-O3",
            "-march=native",
            "-ffast-math",
            "-std=c++17",
            "-shared",
            "-fPIC",
            "-pthread",
        ]
        subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
        lib = ctypes.CDLL(str(library))
    lib.stream.restype = ctypes.c_double
    lib.stream.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int64,
        ctypes.c_int,
    ]
    return lib


def stream(arrays: int, written: int, floats: int, threads: int) -> Callable[[], float]:
    """A candidate for interleave: seconds of one pass over arrays of so many floats."""
    tensors = [torch.zeros(floats) for _ in range(arrays)]
    pointers = (ctypes.c_void_p * arrays)(*(t.data_ptr() for t in tensors))

    def call(kept: object = tensors) -> float:
        return float(stream_library().stream(pointers, arrays, written, floats, threads))

    return call


def model(count: int, size: int, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = []
    for _ in range(count):
        p = torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype))
        p.grad = torch.randn(size, generator=generator).to(dtype)
        params.append(p)
    return params


def groups(params: Sequence[torch.nn.Parameter], apart: bool) -> list:
    return [{"params": [p]} for p in params] if apart else list(params)


def check(name: str, options: dict[str, float], clipped: bool, dtype: torch.dtype) -> None:
    """A few steps on a small model; torch's fused SGD does not write bf16 parameters, so not that."""
    ours, theirs = model(3, 1000, dtype), model(3, 1000, dtype)
    a = getattr(optim, name)(ours, lr=0.01, **options, max_grad_norm=1.0 if clipped else None)
    b = getattr(torch.optim, name)(theirs, lr=0.01, **options, fused=True)
    for _ in range(3):
        if clipped:
            torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        a.step()
        b.step()
    for p, q in zip(ours, theirs):
        if not torch.allclose(p, q, rtol=1e-4, atol=1e-5):
            raise SystemExit(f"bench_optim: {name} {dtype} differs from torch: not timed")


def candidates(case: tuple, shape: tuple, threads: int) -> dict[str, Callable[[], object]]:
    _, name, options, clipped, dtype = case
    _, count, size, apart = shape
    params = model(count, size, dtype)
    found: dict[str, Callable[[], object]] = {}
    ours = getattr(optim, name)(
        groups(params, apart), lr=1e-4, **options, max_grad_norm=1.0 if clipped else None
    )
    found["trimtab"] = ours.step
    ours.step()
    # The states are torch's too: five copies of a model's would not fit everywhere.
    for kind, flags in KINDS.items():
        theirs = getattr(torch.optim, name)(groups(params, apart), lr=1e-4, **options, **flags)
        theirs.state = ours.state

        def call(theirs: torch.optim.Optimizer = theirs) -> None:
            if clipped:
                torch.nn.utils.clip_grad_norm_(params, 1.0)
            theirs.step()

        found[kind] = call
    if count * size >= 1 << 22 and not clipped:
        arrays, written = TRAFFIC[name]
        floats = count * size * dtype.itemsize // 4
        found["streaming loop"] = stream(arrays, written, floats, threads)
    return found


def measure(case: tuple, shape: tuple, seconds: float, threads: int) -> dict[str, Timing]:
    keep = ("torch fused", "streaming loop")
    return interleave(candidates(case, shape, threads), seconds, keep=keep)


def models(table: Table, options: argparse.Namespace) -> None:
    """Every case on every model; a line each."""
    ratios: dict[str, list[float]] = {}
    for case in CASES:
        shapes = [s for s in (QUICK if options.quick else MODELS) if wanted(options, case, s)]
        if shapes:
            check(*case[1:])
        for shape in shapes:
            times = measure(case, shape, 0.2 if options.quick else 4.0, options.threads)
            mine = times["trimtab"].median
            line = f"{case[0]:<20} {shape[0]:<18} trimtab {mine:10.1f} us"
            for name, value in times.items():
                table.add(name, case[0], ("model", shape[0]), value)
                if name == "streaming loop":
                    line += f"   {100 * value.median / mine:.0f} % of a {name}"
                elif name != "trimtab":
                    ratios.setdefault(name, []).append(value.median / mine)
                    line += f"   {name} {value.median / mine:.2f}x"
            print(line, flush=True)
    for name, values in ratios.items():
        print(f"geomean: {geomean(values):.2f}x of {name}")


def sweep(table: Table, options: argparse.Namespace) -> None:
    """GB/s of AdamW in fp32 by model size; the slow for-loop is left out."""
    case = CASES[0]
    for total in QUICK_SIZES if options.quick else SIZES:
        shape = (f"16x{total // 16}", 16, total // 16, False)
        if not wanted(options, ("sweep",), shape):
            continue
        arrays, written = TRAFFIC["AdamW"]
        calls = candidates(case, shape, options.threads)
        calls.pop("torch single")
        calls["streaming loop"] = stream(arrays, written, total, options.threads)
        times = interleave(
            calls, 0.2 if options.quick else 2.0, keep=("torch fused", "streaming loop")
        )
        line = f"{total:>10} parameters"
        for name, value in times.items():
            speed = total * 4 * (arrays + written) / value.median * 1e-3
            table.add(name, "sweep", ("parameters", str(total)), value, gb_per_s=speed)
            line += f"   {name} {speed:.2f} GB/s"
        print(line, flush=True)


def wanted(options: argparse.Namespace, case: tuple, shape: tuple) -> bool:
    return re.search(options.only, f"{case[0]} {shape[0]}") is not None


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
