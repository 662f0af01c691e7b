"""A step of the optimizers on a GPU, against torch's foreach and fused and a bare streaming kernel.

    python benchmarks/bench_cuda_optim.py [--quick] [--device cuda] [--only sizes tensors ...]

sizes    AdamW, 0.1M ... 1B parameters in up to 60 tensors, fp32 and bf16; a streaming kernel with
         the same reads and writes (fp32: 28 bytes a parameter) on one long array
tensors  2000 tensors of 64, with and without clipping; SGD; the time that a step keeps the host
formats  smaller states and masters, LAMB: against AdamW with fp32 state
matrices Adafactor on a transformer's matrices, against torch's foreach

A turn is the GPU's time: the queue is kept busy while the host submits. Writes <device>-optim.csv,
with the bars of the project and what came of them, losses too. (apex and DeepSpeed need a build.)
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import gpu
import harness
import torch
from gpu import Gpu, Table
from harness import Timing

from trimtab import optim
from trimtab.optim import device as optim_device

SIZES = (100_000, 1_000_000, 5_000_000, 25_000_000, 125_000_000, 1_000_000_000)
QUICK_SIZES = (5_000,)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OURS, FUSED, FOREACH, STREAM = "trimtab", "torch fused", "torch foreach", "streaming kernel"
TORCH: dict[str, dict[str, Any]] = {FUSED: {"fused": True}, FOREACH: {"foreach": True}}
OTHER = "torch foreach, factored"  # of optimizers that torch has not fused
FORMATS: tuple[tuple[str, str, torch.dtype, dict[str, Any]], ...] = (
    ("AdamW fp32", "AdamW", torch.float32, {}),
    ("AdamW fp32, 8-bit states", "AdamW", torch.float32, {"state_dtype": "int8"}),
    ("AdamW bf16, 8-bit states, remainder", "AdamW", torch.bfloat16,
     {"state_dtype": "int8", "master": "remainder"}),
    ("AdamW bf16, bf16 states, stochastic", "AdamW", torch.bfloat16, {"rounding": "stochastic"}),
    ("AdamW bf16, Kahan", "AdamW", torch.bfloat16, {"master": "kahan"}),
    ("LAMB fp32", "LAMB", torch.float32, {}),
)  # fmt: skip
FAILURES: list[str] = []
BARS = {  # the least
    "of the streaming kernel, 125M and more": 0.92,
    "x torch fused, bf16, 125M and more": 1.2,
    "x torch fused, 0.1-5M": 4.0,
}


class Queue(Gpu):
    """A turn waits behind work enough for the host to submit it whole."""

    cycles = 4_000_000  # about 2 ms

    def _turn(self, call: gpu.Call) -> Callable[[], float]:
        if not self.is_cuda:
            return super()._turn(call)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        torch.cuda._sleep(self.cycles)
        begin.record()
        call()
        end.record()
        return lambda: begin.elapsed_time(end) * 1e3


def lengths(total: int) -> list[int]:
    """Of a model's tensors: 60, or as many as keep each below 2^25 elements; none a round number."""
    count = max(min(60, total // 1000), -(-total // (1 << 25)), 1)
    return [total // count + (i * 37) % 11 for i in range(count)]


def parameters(
    sizes: Sequence[int], dtype: torch.dtype, device: torch.device
) -> list[torch.nn.Parameter]:
    params = []
    for n in sizes:
        param = torch.nn.Parameter(torch.randn(n, device=device, dtype=dtype))
        param.grad = torch.randn_like(param) * 0.01
        params.append(param)
    return params


def step_of(
    kind: str, name: str, params: Sequence[torch.nn.Parameter], clips: bool, **options: Any
) -> Callable[[], object]:
    """A step on these parameters, with states of its own."""
    if kind == OURS:
        more = {"max_grad_norm": 1.0} if clips else {}
        return getattr(optim, name)(params, **options, **more).step
    how = {"foreach": True} if kind == OTHER else TORCH[kind]
    optimizer = getattr(torch.optim, name)(params, **options, **how)
    if not clips:
        return optimizer.step

    def clip_and_step() -> object:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        return optimizer.step()

    return clip_and_step


def is_right(
    name: str,
    dtype: torch.dtype,
    clips: bool,
    device: torch.device,
    reference: str = FUSED,
    **options: Any,
) -> bool:
    """Two steps of ours and of torch's, on copies of a few parameters, come out alike."""
    params = parameters((1, 4099, 70_001), dtype, device)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for p, q in zip(params, twins, strict=True):
        q.grad = p.grad.clone() if p.grad is not None else None
    ours, theirs = (
        step_of(kind, name, list_, clips, **options)
        for kind, list_ in ((OURS, params), (reference, twins))
    )
    for _ in range(2):
        ours()
        theirs()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for p, q in zip(params, twins, strict=True):
        if not torch.allclose(p.float(), q.float(), rtol=tolerance, atol=tolerance):
            FAILURES.append(f"{name} {dtype}: far from torch's")
            print(FAILURES[-1], flush=True)
            return False
    return True


def line(label: str, times: dict[str, Timing], size: float = 0.0) -> None:
    ours = times[OURS].median
    words = [f"{name} {t.median:.1f} us ({t.median / ours:.2f} x)" for name, t in times.items()]
    rate = f", {size / ours / 1e3:.0f} GB/s" if size else ""
    print(f"{label:<28} {', '.join(words)}{rate}", flush=True)


def record(
    table: Table, section: str, label: str, shape: Sequence[int], times: dict[str, Timing]
) -> None:
    for name, timing in times.items():
        ratio = round(timing.median / times[OURS].median, 4)
        table.add(section, name, shape, timing, case=label, x_ours=ratio)


# --- sections


def streaming(arrays: Sequence[torch.Tensor], writes: int) -> gpu.Call:
    if arrays[0].is_cuda:
        import gpu_stream

        return gpu_stream.stream(arrays, writes)
    return lambda: [arrays[i].add_(arrays[-1]) for i in range(writes)]


def bench_sizes(device: Queue, table: Table, options: argparse.Namespace) -> None:
    ratios: dict[str, list[float]] = {name: [] for name in BARS}
    for total in QUICK_SIZES if options.quick else SIZES:
        for label, dtype in DTYPES.items():
            needed = total * dtype.itemsize * 14  # three optimizers' states, foreach's temporaries
            if device.is_cuda and needed > 0.9 * torch.cuda.mem_get_info()[0]:
                reason = f"needs {needed >> 30} GiB"
                table.add(
                    "sizes", OURS, (total, 0, 0), 0.0, metric="absent", unit="", reason=reason
                )
                continue
            if not is_right("AdamW", dtype, False, device.device):
                continue
            sizes = lengths(total)
            params = parameters(sizes, dtype, device.device)
            calls = {k: step_of(k, "AdamW", params, False) for k in (OURS, *TORCH)}
            long = [torch.zeros(sum(sizes), device=device.device, dtype=dtype) for _ in range(4)]
            calls[STREAM] = streaming(long, writes=3)  # p, g, m, v read; p, m, v written
            times = device.interleave(calls, options.seconds, max_rounds=24)
            del calls, long, params
            if device.is_cuda:
                torch.cuda.empty_cache()
            line(f"AdamW {label} {total / 1e6:g}M", times, 7 * dtype.itemsize * sum(sizes))
            record(table, "sizes", f"AdamW {label}", (total, len(sizes), 0), times)
            share = times[STREAM].median / times[OURS].median
            fused = times[FUSED].median / times[OURS].median
            if total >= 125_000_000:
                ratios["of the streaming kernel, 125M and more"].append(share)
            if total >= 125_000_000 and label == "bf16":
                ratios["x torch fused, bf16, 125M and more"].append(fused)
            if total <= 5_000_000:
                ratios["x torch fused, 0.1-5M"].append(fused)
    for name, found in ratios.items():
        judge(table, name, found)


def judge(table: Table, name: str, found: Sequence[float]) -> None:
    """A bar of the project, met or not: the worst of what was measured."""
    bar, worst = BARS[name], min(found, default=0.0)
    met = bool(found) and worst >= bar
    print(f"bar {name}: at least {bar}, worst {worst:.3f}: {'met' if met else 'NOT met'}")
    table.add("bars", OURS, (0, 0, 0), worst, metric=name, unit="x", bar=bar, met=met)


def bench_tensors(device: Queue, table: Table, options: argparse.Namespace) -> None:
    count = 20 if options.quick else 2000
    cases = (
        ("AdamW", "AdamW", {}, False),
        ("AdamW clipped", "AdamW", {}, True),
        ("SGD momentum", "SGD", {"momentum": 0.9, "lr": 1e-3}, False),
    )
    for label, name, more, clips in cases:
        if not is_right(name, torch.float32, clips, device.device, **more):
            continue
        params = parameters([64] * count, torch.float32, device.device)
        calls = {k: step_of(k, name, params, clips, **more) for k in (OURS, *TORCH)}
        device.cycles = 60_000_000  # foreach keeps the host for many milliseconds
        times = device.interleave(calls, options.seconds, max_rounds=16)
        device.cycles = Queue.cycles
        line(f"{label} {count} x 64", times)
        record(table, "tensors", label, (count * 64, count, 0), times)
        batches = 2 if options.quick else 5
        host = {k: device.host(call, batches=batches, calls=5) for k, call in calls.items()}
        line(f"{label} {count} x 64, host", host)
        record(table, "host", label, (count * 64, count, 0), host)


def bench_formats(device: Queue, table: Table, options: argparse.Namespace) -> None:
    total = 20_000 if options.quick else 125_000_000
    for label, name, dtype, more in FORMATS:
        params = parameters(lengths(total), dtype, device.device)
        calls = {OURS: step_of(OURS, name, params, False, **more)}
        times = device.interleave(calls, options.seconds / 3, max_rounds=16)
        del calls, params
        line(f"{label} {total / 1e6:g}M", times)
        record(table, "formats", label, (total, 0, 0), times)


# A block of a transformer of that width, and how many of them.
QUICK_BLOCKS, BLOCKS = ((32, 1),), ((1024, 8), (4096, 2))


def bench_matrices(device: Queue, table: Table, options: argparse.Namespace) -> None:
    """GB/s count gradients read three times, parameters twice and written once."""
    for width, count in QUICK_BLOCKS if options.quick else BLOCKS:
        for label, dtype in DTYPES.items():
            if not is_right("Adafactor", dtype, False, device.device, OTHER):
                continue
            shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
            shapes += [(width,)] * 6  # biases and norms
            params = [
                torch.nn.Parameter(torch.randn(shape, device=device.device, dtype=dtype))
                for shape in shapes * count
            ]
            for param in params:
                param.grad = torch.randn_like(param) * 0.01
            calls = {kind: step_of(kind, "Adafactor", params, False) for kind in (OURS, OTHER)}
            device.cycles = 60_000_000  # foreach keeps the host for many milliseconds
            times = device.interleave(calls, options.seconds, max_rounds=16)
            device.cycles = Queue.cycles
            total = sum(param.numel() for param in params)
            del calls, params
            line(f"Adafactor {label} {count} x {width}", times, 6 * dtype.itemsize * total)
            record(table, "matrices", f"Adafactor {label}", (total, width, count), times)


SECTIONS = {
    "sizes": bench_sizes,
    "tensors": bench_tensors,
    "formats": bench_formats,
    "matrices": bench_matrices,
}


def main() -> int:
    parser = harness.parser(__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", help="cpu: only to see whether it works")
    parser.add_argument("--only", nargs="+", choices=tuple(SECTIONS))
    parser.add_argument("--seconds", type=float, default=0.6, help="of rounds a case (%(default)s)")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("not measured: torch sees no GPU")
        return 0
    if options.device == "cuda" and (problem := optim_device.why_not_cuda(torch.device("cuda", 0))):
        print(f"bench_cuda_optim: CUDA C++ does not answer here: {problem}", file=sys.stderr)
        return 1
    harness.start(options)
    if options.quick:
        options.seconds = 0.02
    if options.device == "cpu":
        TORCH.pop(FOREACH, None)
    table, device = Table(options.device, options.out), Queue(options.device)
    table.path = table.path.with_name(f"{table.path.stem}-optim.csv")
    print(", ".join(f"{key} {value}" for key, value in table.stamp.items()), flush=True)
    begin = time.monotonic()
    for name in options.only or SECTIONS:
        SECTIONS[name](device, table, options)
        table.write()  # after each: what was measured survives what follows
    print(f"{time.monotonic() - begin:.0f} s")
    for failure in FAILURES:
        print(f"NOT TIMED: {failure}", file=sys.stderr)
    return 1 if FAILURES else 0


if __name__ == "__main__":
    sys.exit(main())
