"""bitmap_linear against torch's float linears, our dense int8 and torch.sparse CSR.

Weights rotate, so that together they are larger than the caches: as in a model, each call meets a
weight that comes from memory.
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

DECODE = [(M, 4096, N) for N in (4096, 11008) for M in (1, 2, 4, 8, 16)]
BATCHED = [(M, K, N) for K, N in ((1024, 4096), (4096, 4096)) for M in (128, 512)]
SPARSITIES = (0.5, 0.7, 0.8, 0.9)
QUICK = [(3, 104, 50)]
ROTATED_BYTES = 1 << 29  # of dense bf16 weights together: more than any cache here


def pruned(N: int, K: int, sparsity: float) -> torch.Tensor:
    weight = torch.randn(N, K) / K**0.5
    weight[torch.rand(N, K) < sparsity] = 0
    return weight


def rotate(call: Callable, weights: list) -> Callable[[], object]:
    turn = itertools.cycle(weights)
    return lambda: call(*next(turn))


def check(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    error = (got.double() - want).norm() / want.norm()
    if not error < (2e-2 if "int8" in name else 1e-2):
        raise SystemExit(f"bench_bitmap_linear: {name} is off by {error:.1e}: not timed")


def candidates(M: int, K: int, N: int, sparsity: float, dtype: str, quick: bool) -> dict:
    """Ours, and what one would use instead, each with as many weights as rotate."""
    count = 2 if quick else max(2, ROTATED_BYTES // (N * K * 2))
    weight, x = pruned(N, K, sparsity), torch.randn(M, K)
    mask, x16 = weight != 0, x.bfloat16()
    want = x.double() @ weight.double().t()
    product, dense8 = torch.ops.trimtab.bitmap_linear.inference, torch.ops.trimtab.int8_linear
    calls: dict[str, tuple[Callable, tuple]] = {}
    if dtype == "bf16":
        calls["bitmap bf16"] = (partial(product, x16), ops.bitmap_pack(weight.bfloat16()))
        calls["torch bf16"] = (partial(linear, x16), (weight.bfloat16(),))
    elif dtype == "int8":
        codes, scale = ops.quantize_int8(weight)
        calls["bitmap int8"] = (partial(product, x16), (*ops.bitmap_pack(codes, mask), scale))
        calls["dense int8"] = (partial(dense8.inference, x16), (ops.int8_pack(codes), scale))
    else:
        calls["bitmap fp32"] = (partial(product, x), ops.bitmap_pack(weight))
        calls["torch fp32"] = (partial(linear, x), (weight,))
        if M > 16:
            calls["torch CSR"] = (lambda w: w @ x.t(), (weight.to_sparse_csr(),))
    out = {}
    for name, (call, parts) in calls.items():
        got = call(*parts)
        check(name, got.t() if "CSR" in name else got, want)
        copies = [parts] + [tuple(p.clone() for p in parts) for _ in range(count - 1)]
        out[name] = rotate(call, copies)
    return out


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--dtype", nargs="+", default=("bf16", "int8", "fp32"))
    parser.add_argument("--shape", nargs="+", help="M,K,N ...")
    parser.add_argument("--sparsity", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    harness.start(options)
    table = Table("bitmap_linear", options.out)
    ratios: dict[str, list[float]] = {}
    for dtype in options.dtype:
        shapes = BATCHED if dtype == "fp32" else DECODE + BATCHED
        if options.quick:
            shapes = QUICK
        if options.shape:
            shapes = [tuple(map(int, shape.split(","))) for shape in options.shape]
        for (M, K, N), sparsity in itertools.product(shapes, options.sparsity):
            calls = candidates(M, K, N, sparsity, dtype, options.quick)
            times = harness.interleave(calls, 0.2 if options.quick else options.seconds)
            ours, mine = next(iter(times.items()))
            line = f"{dtype} {M},{K},{N} {sparsity:.0%}: {mine.median:9.1f} us"
            for name, value in times.items():
                provider = name if name != ours else "trimtab"
                x_value = f"{M},{K},{N}"
                table.add(provider, dtype, ("M,K,N", x_value), value, sparsity=sparsity)
                if name != ours:
                    ratio = value.median / mine.median
                    ratios.setdefault(f"{name} at {sparsity:.0%}", []).append(ratio)
                    line += f"   {name} {value.median:9.1f} us ({ratio:.2f}x)"
            print(line, flush=True)
    for name, values in ratios.items():
        print(f"geomean: {harness.geomean(values):.2f}x of {name}")
    table.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
