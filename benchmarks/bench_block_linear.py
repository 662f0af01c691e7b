"""block_linear against torch's BSR and dense linears and our dense int8.

    python benchmarks/bench_block_linear.py [--quick] [--dtype bf16 int8 fp32] [--block 32,32 ...]
                                            [--shape M,K,N ...] [--sparsity 0.9 ...] [--backward]

Weights rotate, so that together they are larger than the caches: as in a model, each call meets a
weight that comes from memory. The floor of a line is the larger of two times: the bytes that must pass
through memory (kept blocks, x, out) at the speed of a plain read of this run, and the multiply-adds of
the kept blocks at the rate of the bare int8 dot-product loop of this run (halved for bf16).
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from functools import partial

import harness
import torch
from harness import Table
from torch.nn.functional import linear

from trimtab import ops

BARE, READ = "bare loop", "plain read"
CASES = {
    # dtype, block: (M, K, N) ...
    ("bf16", (32, 32)): [
        (M, K, N)
        for K, N in ((1024, 1024), (1024, 4096), (4096, 1024), (4096, 4096))
        for M in (1, 4, 16, 64, 128, 512, 2048)
    ],
    ("bf16", (16, 16)): [(M, 4096, 4096) for M in (1, 128)],
    ("bf16", (64, 64)): [(M, 4096, 4096) for M in (1, 128)],
    ("int8", (1, 16)): [
        (M, K, N) for K, N in ((1024, 4096), (4096, 4096)) for M in (128, 512, 2048)
    ],
    ("int8", (32, 32)): [(M, 4096, 4096) for M in (1, 128)],
    ("fp32", (32, 32)): [(M, 4096, 4096) for M in (1, 128)],
}
ROTATED_BYTES = 1 << 29  # of dense bf16 weights together: more than any cache here


def pruned(N: int, K: int, block: tuple[int, int], sparsity: float) -> torch.Tensor:
    """Random-normal, with that share of its blocks zero."""
    bn, bk = block
    kept = torch.rand(N // bn, K // bk) >= sparsity
    return torch.randn(N, K) / K**0.5 * kept.repeat_interleave(bn, 0).repeat_interleave(bk, 1)


def rotate(call: Callable, weights: list) -> Callable[[], object]:
    turn = itertools.cycle(weights)
    return lambda: call(*next(turn))


def check(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    error = (got.double() - want).norm() / want.norm()
    if not error < (3e-2 if "int8" in name else 1e-2):
        raise SystemExit(f"bench_block_linear: {name} is off by {error:.1e}: not timed")


def forward(
    M: int, weight: torch.Tensor, block: tuple[int, int], dtype: str
) -> tuple[torch.Tensor, dict[str, tuple[Callable, tuple]]]:
    """x, and by name a product of it and its weight's parts; ours first."""
    x = torch.randn(M, weight.shape[1])
    N = weight.shape[0]
    ours = torch.ops.trimtab.block_linear.inference
    calls: dict[str, tuple[Callable, tuple]] = {}
    if dtype == "int8":
        x = x.bfloat16()
        codes, scale = ops.quantize_int8(weight)
        packed = ops.block_pack(codes, block)

        def product8(*parts: torch.Tensor) -> torch.Tensor:
            return ours(x, *parts, None, 0, N)

        calls["trimtab block int8"] = (product8, (*packed, scale))
        dense = torch.ops.trimtab.int8_linear.inference
        calls["trimtab int8"] = (partial(dense, x), (ops.int8_pack(codes), scale))
        calls["torch bf16"] = (partial(linear, x), (weight.bfloat16(),))
        return x, calls
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    x, weight = x.to(kind), weight.to(kind)

    def product(*parts: torch.Tensor) -> torch.Tensor:
        return ours(x, *parts, None, None, 0, N)

    calls[f"trimtab block {dtype}"] = (product, ops.block_pack(weight, block))
    # torch 2.13 has no BSR product in bf16 on a CPU: its fp32 one stands in.
    calls["torch BSR fp32"] = (partial(linear, x.float()), (weight.float().to_sparse_bsr(block),))
    calls[f"torch {dtype}"] = (partial(linear, x), (weight,))
    return x, calls


def backward(
    M: int, weight: torch.Tensor, block: tuple[int, int], dtype: str
) -> tuple[torch.Tensor, dict[str, tuple[Callable, tuple]]]:
    """The two products of the backward pass, against those of a dense layer."""
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    N, K = weight.shape
    x, grad, weight = torch.randn(M, K).to(kind), torch.randn(M, N).to(kind), weight.to(kind)
    grad_x, grad_values = torch.ops.trimtab.block_grad_x, torch.ops.trimtab.block_grad_values

    def ours(values: torch.Tensor, crow: torch.Tensor, col: torch.Tensor) -> torch.Tensor:
        grad_values(grad, x, crow, col, *block)
        return grad_x(grad, values, crow, col, K)

    def dense(weight: torch.Tensor) -> torch.Tensor:
        grad.t() @ x
        return grad @ weight

    def ours_x(*parts: torch.Tensor) -> torch.Tensor:
        return grad_x(grad, *parts, K)

    parts = ops.block_pack(weight, block)
    calls = {
        f"trimtab backward {dtype}": (ours, parts),
        f"trimtab grad_x {dtype}": (ours_x, parts),
        f"torch backward {dtype}": (dense, (weight,)),
    }
    return grad, calls


def candidates(make: Callable, M: int, weight: torch.Tensor, *rest: object, count: int) -> dict:
    """Each with as many weights as rotate; checked before they are timed."""
    first, calls = make(M, weight, *rest)
    plain = weight.t() if make is forward else weight
    want = first.double() @ plain.double()
    out = {}
    for name, (call, parts) in calls.items():
        check(name, call(*parts), want)
        copies = [parts] + [tuple(p.clone() for p in parts) for _ in range(count - 1)]
        out[name] = rotate(call, copies)
    return out


def floor_us(
    M: int, weight: torch.Tensor, dtype: str, bytes_a_us: float, int8_macs_a_us: float
) -> float:
    """The larger of the time of its bytes and that of its multiply-adds."""
    N, K = weight.shape
    kept = int((weight != 0).sum())
    size = {"bf16": 2, "int8": 1, "fp32": 4}[dtype]
    outer = 4 if dtype == "fp32" else 2
    moved = kept * size + (M * K + M * N) * outer
    rate = int8_macs_a_us * {"bf16": 0.5, "int8": 1.0, "fp32": 1 / 32}[dtype]
    return max(moved / bytes_a_us, kept * M / rate)


def main() -> int:
    parser = harness.parser(__doc__.partition("\n")[0])
    parser.add_argument("--dtype", nargs="+", default=("bf16", "int8", "fp32"))
    parser.add_argument("--block", nargs="+", help="bn,bk ...")
    parser.add_argument("--shape", nargs="+", help="M,K,N ...")
    parser.add_argument("--sparsity", nargs="+", type=float, default=(0.9,))
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--backward", action="store_true", help="the backward products instead")
    options = parser.parse_args()
    harness.start(options)
    table = Table("block_backward" if options.backward else "block_linear", options.out)
    loop = harness.bare_loop(ops.get_isa(), options.threads)
    stream = torch.ones(1 << 25)
    ratios: dict[str, list[float]] = {}
    for (dtype, block), shapes in CASES.items():
        if dtype not in options.dtype or (dtype == "int8" and options.backward):
            continue
        if options.block and f"{block[0]},{block[1]}" not in options.block:
            continue
        if options.shape:
            shapes = [tuple(map(int, shape.split(","))) for shape in options.shape]
        for (M, K, N), sparsity in itertools.product(shapes, options.sparsity):
            if options.quick:
                M, K, N = min(M, 5), 256, 128
            weight = pruned(N, K, block, sparsity)
            count = 2 if options.quick else max(2, ROTATED_BYTES // (N * K * 2))
            make = backward if options.backward else forward
            calls = candidates(make, M, weight, block, dtype, count=count)
            calls[READ] = lambda: stream.sum()
            if loop is not None:
                calls[BARE] = loop[0]
            seconds = 0.2 if options.quick else options.seconds
            times = harness.interleave(calls, seconds, keep=(BARE, READ))
            bytes_a_us = stream.numel() * 4 / times.pop(READ).median
            bare = times.pop(BARE, None)
            macs_a_us = loop[1] / 2 / bare.median if loop and bare else float("nan")
            floor = floor_us(M, weight, dtype, bytes_a_us, macs_a_us)
            floor *= 2 if options.backward else 1
            mine = next(iter(times.values())).median
            line = f"{dtype} {block[0]}x{block[1]} {M},{K},{N} {sparsity:.0%}: {mine:9.1f} us"
            line += f" ({floor / mine:4.0%} of floor)"
            for name, value in times.items():
                x = ("M,K,N", f"{M},{K},{N}")
                extra = {"sparsity": sparsity, "block": list(block), "floor_us": round(floor, 2)}
                table.add(name, dtype, x, value, **extra)
                if value is not next(iter(times.values())):
                    ratio = value.median / mine
                    ratios.setdefault(f"{name} ({block[0]}x{block[1]})", []).append(ratio)
                    line += f"   {name} {value.median:9.1f} us ({ratio:.2f}x)"
            print(line, flush=True)
            if options.quick:
                break
    for name, values in ratios.items():
        print(f"geomean {harness.geomean(values):.2f}x, worst {min(values):.2f}x of {name}")
    table.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
