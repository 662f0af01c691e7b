"""What every benchmark shares: interleaved timing, the machine's stamp, CSV, the bare loop.

Timing. Candidates take turns, round after round, so that a slow moment of the machine hits all of
them; each turn starts with an untimed call, after a pause in which the thread pool of the one before
stops spinning. A turn times as many calls as fill about two milliseconds. Weights and inputs are the
same ones in every call: whatever fits a cache stays there, for every candidate alike.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import json
import logging
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

import trimtab
from trimtab import ops
from trimtab.cli import cpu_model

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"

TURN = 2e-3  # seconds of timed calls in one turn
PAUSE = 2e-3  # seconds between two turns; libgomp and ONNX Runtime spin for about one
SLOW = 4.0  # times ours: a candidate slower than that needs no precise figure ...
SLOW_ROUNDS = 3  # ... and sits out after so many rounds


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: median, 20th and 80th percentile, over ``rounds`` turns."""

    median: float
    p20: float
    p80: float
    rounds: int


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile, linear between neighbours."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def timing(microseconds: Sequence[float]) -> Timing:
    return Timing(*(quantile(microseconds, q) for q in (0.5, 0.2, 0.8)), len(microseconds))


def interleave(
    candidates: dict[str, Callable[[], object]],
    seconds: float,
    *,
    min_rounds: int = 3,
    max_rounds: int = 200,
    keep: Collection[str] = (),
) -> dict[str, Timing]:
    """Times the candidates in turns for about ``seconds`` altogether.

    The first candidate is ours; others much slower sit out after a few rounds, but those in ``keep``.

    A candidate that returns a float says itself how many seconds it took (the bare loop does).
    """
    calls = {name: calibrate(call) for name, call in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    ours = order[0]
    begin = time.monotonic()
    for done in range(max_rounds):
        if done >= min_rounds and time.monotonic() - begin > seconds:
            break
        late = done >= SLOW_ROUNDS
        out = {n for n in order if late and n not in keep and is_slow(samples[n], samples[ours])}
        random.Random(done).shuffle(order)
        for name in order:
            if name in out:
                continue
            time.sleep(PAUSE)
            samples[name].append(turn(candidates[name], calls[name]))
    return {name: timing(values) for name, values in samples.items()}


def is_slow(samples: Sequence[float], ours: Sequence[float]) -> bool:
    return quantile(samples, 0.5) > SLOW * quantile(ours, 0.5)


def calibrate(call: Callable[[], object]) -> int:
    """How many calls fill a turn."""
    call()
    start = time.perf_counter()
    call()
    once = time.perf_counter() - start
    return max(1, min(1000, math.ceil(TURN / max(once, 1e-7))))


def turn(call: Callable[[], object], calls: int) -> float:
    """Microseconds a call."""
    own = call()
    if isinstance(own, float):
        return own * 1e6
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls * 1e6


# --- the bare loop


@cache
def _peak_library() -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise RuntimeError("the bare loop needs a C++ compiler: no c++ or g++ found, CXX not set")
    folder = tempfile.mkdtemp(prefix="trimtab-peak-")
    try:
        library = Path(folder) / "peak.so"
        command = [compiler, "-O2", "-std=c++17", "-shared", "-fPIC", "-pthread"]
        subprocess.run([*command, str(HERE / "peak.cpp"), "-o", str(library)], check=True)
        lib = ctypes.CDLL(str(library))
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # a loaded library needs no file
    lib.bare_loop_ops.restype = lib.bare_loop.restype = ctypes.c_double
    lib.bare_loop_ops.argtypes = [ctypes.c_char_p]
    lib.bare_loop.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int64]
    return lib


def bare_loop(isa: str, threads: int) -> tuple[Callable[[], float], float] | None:
    """A candidate for interleave, and the operations it does; None where there is no such loop."""
    lib, name = _peak_library(), isa.encode()
    ops_a_round = lib.bare_loop_ops(name)
    probe = 10_000
    seconds = lib.bare_loop(name, threads, probe) if ops_a_round else -1
    if seconds <= 0:
        return None
    seconds = min(lib.bare_loop(name, threads, probe) for _ in range(3))
    rounds = max(probe, int(probe * 2 * TURN / seconds))
    return lambda: lib.bare_loop(name, threads, rounds), ops_a_round * rounds * threads


# --- where it was measured


@cache
def environment() -> dict[str, str]:
    """The stamp that every CSV row carries."""
    return {
        "device": cpu_model(),
        "isa": ops.get_isa(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "triton": version("triton"),
        "version": trimtab.__version__,
        "commit": commit(),
        "timestamp": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
    }


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def commit() -> str:
    """Short hash of HEAD, with a + if files differ from it; "unknown" outside a checkout."""
    git = ["git", "-C", str(HERE)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
        dirty = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ".."], capture_output=True)
    except OSError:
        return "unknown"
    if head.returncode:
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.returncode else "")


def device_slug() -> str:
    """The machine's part of a CSV's name: intel-xeon-processor-amx-2t."""
    stamp = environment()
    model = re.sub(r"\(R\)|\(TM\)|CPU|@.*", " ", stamp["device"])
    return "-".join(re.findall(r"[a-z0-9]+", f"{model} {stamp['isa']} {stamp['threads']}t".lower()))


# --- CSV

COLUMNS = (
    "kernel_name", "provider", "mode", "metric", "unit", "x_name", "x_value", "y_50", "y_20", "y_80",
    "extra_config", "device", "isa", "threads", "torch", "triton", "version", "commit", "timestamp",
)  # fmt: skip


class Table:
    """Rows of one benchmark, written to benchmarks/results/<device>-<name>.csv."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.path = name, folder / f"{device_slug()}-{name}.csv"
        self.rows: list[dict[str, str]] = []

    def add(
        self,
        provider: str,
        mode: str,
        x: tuple[str, str],
        value: Timing | float,
        *,
        metric: str = "time",
        unit: str = "us",
        **extra: object,
    ) -> None:
        """One measurement; ``x`` is the name and the value of what varies."""
        if not isinstance(value, Timing):
            value = Timing(value, value, value, 1)
        row = dict(environment(), kernel_name=self.name, provider=provider, mode=mode)
        row |= {"metric": metric, "unit": unit, "x_name": x[0], "x_value": x[1]}
        row |= {
            "y_50": f"{value.median:.6g}",
            "y_20": f"{value.p20:.6g}",
            "y_80": f"{value.p80:.6g}",
        }
        row["extra_config"] = json.dumps({"rounds": value.rounds, **extra})
        self.rows.append(row)

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
        print(f"wrote {self.path}")


def geomean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


# --- the command line


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parse = argparse.ArgumentParser(description=description)
    parse.add_argument(
        "--quick", action="store_true", help="a few small cases: does it work at all"
    )
    parse.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parse.add_argument(
        "--out",
        type=Path,
        help="folder for the CSV ($OUT, benchmarks/results; quick: temporary)",
    )
    return parse


def start(options: argparse.Namespace) -> None:
    """Threads and seed, and a line that says where this runs.

    Warnings are kept quiet: some peers print one at every call, which would be timed.
    """
    if options.out is None:
        quick = Path(tempfile.gettempdir(), "trimtab-quick")  # its figures mean nothing
        options.out = quick if options.quick else Path(os.environ.get("OUT") or RESULTS)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    print(", ".join(f"{key} {value}" for key, value in environment().items()), flush=True)


def bench_simple(
    table: Table,
    cases: dict[str, dict[str, Callable[[], object]]],
    ours: str,
    options: argparse.Namespace,
) -> None:
    """One line a case: our time, and how many times longer each other candidate takes."""
    ratios: dict[str, list[float]] = {}
    for case, candidates in cases.items():
        times = interleave(candidates, 0.3 if options.quick else 3.0)
        mine = times[ours].median
        line = f"{case:<28} {ours} {mine:9.1f} us"
        for name, value in times.items():
            table.add(name, "forward", ("case", case), value)
            if name != ours:
                ratios.setdefault(name, []).append(value.median / mine)
                line += f"   {name} {value.median:9.1f} us ({value.median / mine:.2f}x)"
        print(line, flush=True)
    for name, values in ratios.items():
        print(f"geomean: {geomean(values):.2f}x of {name}")
    table.write()


if __name__ == "__main__":
    sys.exit("harness.py is what the bench_*.py share; run one of those")
