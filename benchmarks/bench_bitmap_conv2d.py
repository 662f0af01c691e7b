"""SparseConv2d with unstructured weights against torch's convolution with the same weights, dense.

The result is checked before timing. Weights stay in the caches, for both.
"""

from __future__ import annotations

import itertools
import sys
from functools import partial

import harness
import torch
from harness import Table
from torch import nn

from trimtab.nn import SparseConv2d

# batch, in, out, kernel, stride, height and width
SHAPES = (
    (1, 3, 64, 7, 2, 224),
    (1, 64, 64, 3, 1, 56),
    (8, 64, 64, 3, 1, 56),
    (8, 256, 64, 1, 1, 56),
    (8, 64, 128, 3, 2, 56),
    (8, 128, 128, 3, 1, 28),
    (1, 256, 256, 3, 1, 14),
    (8, 256, 256, 3, 1, 14),
    (1, 512, 512, 3, 1, 7),
    (8, 512, 512, 3, 1, 7),
    (8, 512, 2048, 1, 1, 7),
    (64, 16, 32, 3, 1, 14),
    (4, 33, 50, 5, 1, 37),
)
QUICK = ((2, 16, 16, 3, 1, 9),)
SPARSITIES = (0.7, 0.8, 0.9, 0.95)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def check(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    error = float((got.double() - want.double()).norm() / want.double().norm())
    if not error < 1e-2:
        raise SystemExit(f"bench_bitmap_conv2d: {name} is off by {error:.1e}: not timed")


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=tuple(DTYPES))
    parser.add_argument("--sparsity", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    harness.start(options)
    torch.set_grad_enabled(False)
    table = Table("bitmap_conv2d", options.out)
    ratios: dict[str, list[float]] = {}
    cases = itertools.product(options.dtype, QUICK if options.quick else SHAPES, options.sparsity)
    for dtype, (batch, inputs, outputs, kernel, stride, size), sparsity in cases:
        name = f"{batch}x{inputs}-{outputs} {kernel}x{kernel}/{stride} {size}"
        layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)
        layer.weight.mul_(torch.rand_like(layer.weight) >= sparsity)
        layer = layer.to(DTYPES[dtype]).eval()
        sparse = SparseConv2d.from_float(layer)
        x = torch.randn(batch, inputs, size, size).to(DTYPES[dtype])
        check(name, sparse(x), layer(x))
        calls = {"trimtab": partial(sparse, x), "torch": partial(layer, x)}
        times = harness.interleave(calls, 0.1 if options.quick else options.seconds)
        for provider, value in times.items():
            table.add(provider, dtype, ("layer", name), value, sparsity=sparsity)
        ratio = times["torch"].median / times["trimtab"].median
        ratios.setdefault(f"torch {dtype} at {sparsity:.0%}", []).append(ratio)
        print(
            f"{dtype} {name} {sparsity:.0%}: {times['trimtab'].median:9.1f} us   {ratio:.2f}x torch",
            flush=True,
        )
    for case, values in ratios.items():
        print(f"geomean: {harness.geomean(values):.2f}x of {case}, worst {min(values):.2f}")
    table.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
