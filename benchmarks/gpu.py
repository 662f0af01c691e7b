"""What the GPU benchmark stands on: timing with a cold L2, the GPU's stamp, a CSV a device.

Timing. In every round each candidate gets one turn, in shuffled order. A turn writes a buffer larger
than L2, so that no operand is found there, and the candidate waits in the queue meanwhile: what the
events around it see is the GPU's time, not the host's. On a CPU (--device cpu: does it work at all)
the clock is the host's.
"""

from __future__ import annotations

import csv
import json
import math
import random
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

import harness
import torch
from harness import Timing

import trimtab

Call = Callable[[], object]

# Dense peaks in 10^12 operations a second: int8, of the vendor's data sheets.
PEAK_TOPS = {"H100 PCIe": 1513, "H100": 1979, "H200": 1979, "A100": 624}
FLUSH_BYTES = 256 << 20  # written in about 0.1 ms, time enough for the host to queue a candidate
ROUNDS_A_SYNC = 8


class Gpu:
    """Times calls on one device."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.is_cuda = self.device.type == "cuda"
        size = FLUSH_BYTES if self.is_cuda else 1
        self.flush = torch.empty(size, dtype=torch.int8, device=self.device)

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def interleave(
        self,
        candidates: dict[str, Call],
        seconds: float,
        *,
        min_rounds: int = 8,
        max_rounds: int = 48,
    ) -> dict[str, Timing]:
        """Microseconds of each candidate, taking turns for about ``seconds`` altogether."""
        for call in candidates.values():
            call()  # compiles, picks algorithms
        self.synchronize()
        samples: dict[str, list[float]] = {name: [] for name in candidates}
        order, done, begin = list(candidates), 0, time.monotonic()
        while done < max_rounds and (done < min_rounds or time.monotonic() - begin < seconds):
            turns = []
            for _ in range(min(ROUNDS_A_SYNC, max_rounds - done)):
                random.Random(done).shuffle(order)
                turns += [(name, self._turn(candidates[name])) for name in order]
                done += 1
            self.synchronize()
            for name, elapsed in turns:
                samples[name].append(elapsed())
        return {name: harness.timing(values) for name, values in samples.items()}

    def _turn(self, call: Call) -> Callable[[], float]:
        """One timed call; the result, asked after the next synchronize, is in microseconds."""
        if not self.is_cuda:
            start = time.perf_counter()
            call()
            elapsed = (time.perf_counter() - start) * 1e6
            return lambda: elapsed
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        begin.record()
        call()
        end.record()
        return lambda: begin.elapsed_time(end) * 1e3

    def host(self, call: Call, batches: int = 20, calls: int = 100) -> Timing:
        """Microseconds that a call keeps the host, over batches that the launch queue holds."""
        call()
        values = []
        for _ in range(batches):
            self.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            values.append((time.perf_counter() - start) / calls * 1e6)
        return harness.timing(values)


# --- where it was measured


def smi(*fields: str) -> list[str]:
    """nvidia-smi's answers for the current GPU; "unknown" where it has none."""
    query = f"--query-gpu={','.join(fields)}"
    index = str(torch.cuda.current_device()) if torch.cuda.is_available() else "0"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits", f"--id={index}"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ["unknown"] * len(fields)
    values = [value.strip() for value in run.stdout.strip().split(",")]
    return (
        values if run.returncode == 0 and len(values) == len(fields) else ["unknown"] * len(fields)
    )


@cache
def environment(device: str) -> dict[str, str]:
    """The stamp of every row. Clocks in MHz, read while the GPU works."""
    clocks = ["unknown"] * 4
    if device.startswith("cuda"):
        a = torch.randn(8192, 8192, dtype=torch.bfloat16, device=device)
        for _ in range(40):  # about 50 ms of work that is queued while nvidia-smi looks
            a @ a
        clocks = smi("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem")
        torch.cuda.synchronize()
        name = torch.cuda.get_device_name(device)
    else:
        name = harness.cpu_model()
    driver, sm, sm_max, memory = clocks
    return {
        "device": name,
        "driver": driver,
        "cuda": torch.version.cuda or "none",
        "torch": torch.__version__,
        "triton": harness.version("triton"),
        "sm_mhz": sm,
        "sm_max_mhz": sm_max,
        "memory_mhz": memory,
        "version": trimtab.__version__,
        "commit": harness.commit(),
        "timestamp": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
    }


def peak_tops(name: str) -> float:
    """The int8 peak of a GPU by its name; NaN if it is not in the table."""
    return next((float(peak) for part, peak in PEAK_TOPS.items() if part in name), math.nan)


# --- CSV

COLUMNS = (
    "section", "provider", "metric", "unit", "M", "K", "N", "y_50", "y_20", "y_80", "extra",
    "device", "driver", "cuda", "torch", "triton", "sm_mhz", "sm_max_mhz", "memory_mhz", "version",
    "commit", "timestamp",
)  # fmt: skip


class Table:
    """Rows of one run, written to <folder>/<device>.csv."""

    def __init__(self, device: str, folder: Path) -> None:
        self.stamp = environment(device)
        slug = "-".join(re.findall(r"[a-z0-9]+", self.stamp["device"].lower()))
        self.path = folder / f"{slug}.csv"
        self.rows: list[dict[str, str]] = []

    def add(
        self,
        section: str,
        provider: str,
        shape: Sequence[int | str],
        value: Timing | float,
        *,
        metric: str = "time",
        unit: str = "us",
        **extra: object,
    ) -> None:
        """One measurement at ``shape`` = (M, K, N)."""
        if not isinstance(value, Timing):
            value = Timing(value, value, value, 1)
        row = {"section": section, "provider": provider, "metric": metric, "unit": unit}
        row |= dict(zip(("M", "K", "N"), map(str, shape), strict=True))
        row |= {
            "y_50": f"{value.median:.6g}",
            "y_20": f"{value.p20:.6g}",
            "y_80": f"{value.p80:.6g}",
        }
        row["extra"] = json.dumps({"rounds": value.rounds, **extra})
        self.rows.append(row | self.stamp)

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
        print(f"wrote {self.path}")
