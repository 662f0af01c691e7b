"""Int8Conv2d against torch's fp32 and bf16 convolutions, contiguous and channels-last.

The result is checked before timing: within 3 % of the float convolution in norm, and the same bits for
both memory formats. Every candidate gets its input in its own dtype and memory format.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import harness
import torch
from harness import Table
from torch import nn

from trimtab.nn import Int8Conv2d

# name: batch, in, out, kernel, stride, groups, height and width
SHAPES = {
    "stem 7x7/2 3-64 224": (1, 3, 64, 7, 2, 1, 224),
    "3x3 64 56": (1, 64, 64, 3, 1, 1, 56),
    "1x1 256-64 56": (1, 256, 64, 1, 1, 1, 56),
    "3x3 128 28": (1, 128, 128, 3, 1, 1, 28),
    "1x1/2 256-512 56": (1, 256, 512, 1, 2, 1, 56),
    "3x3 256 14": (1, 256, 256, 3, 1, 1, 14),
    "3x3 512 7": (1, 512, 512, 3, 1, 1, 7),
    "1x1 512-2048 7": (1, 512, 2048, 1, 1, 1, 7),
    "8 of 3x3 64 56": (8, 64, 64, 3, 1, 1, 56),
    "3x3 320 64": (1, 320, 320, 3, 1, 1, 64),
    "3x3 128 56 groups 32": (1, 128, 128, 3, 1, 32, 56),
    "depthwise 3x3 144 56": (1, 144, 144, 3, 1, 144, 56),
}
QUICK = {"3x3 16 9": (2, 16, 16, 3, 1, 1, 9), "depthwise 3x3 16 9": (2, 16, 16, 3, 1, 16, 9)}
FORMATS = {"": torch.contiguous_format, " channels-last": torch.channels_last}


def main() -> int:
    options = harness.parser(__doc__).parse_args()
    harness.start(options)
    with torch.inference_mode():
        shapes = QUICK if options.quick else SHAPES
        cases = {name: candidates(name, *shape) for name, shape in shapes.items()}
        harness.bench_simple(Table("int8_conv2d", options.out), cases, "trimtab fp32", options)
    return 0


def candidates(
    name: str,
    batch: int,
    inputs: int,
    outputs: int,
    kernel: int,
    stride: int,
    groups: int,
    size: int,
) -> dict[str, Callable[[], torch.Tensor]]:
    """A call for each of ours and theirs, in fp32 and bf16, in both memory formats."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups).eval()
    x = torch.randn(batch, inputs, size, size)
    check(name, layer, x)
    calls: dict[str, Callable[[], torch.Tensor]] = {}
    for suffix, layout in FORMATS.items():
        for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            own = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups)
            own.load_state_dict(layer.state_dict())
            own = own.eval().to(dtype=dtype, memory_format=layout)
            images = x.to(dtype=dtype, memory_format=layout)
            int8 = Int8Conv2d.from_float(own)
            calls[f"trimtab {short}{suffix}"] = lambda f=int8, x=images: f(x)
            calls[f"torch {short}{suffix}"] = lambda f=own, x=images: f(x)
    return calls


def check(name: str, layer: nn.Conv2d, x: torch.Tensor) -> None:
    int8, want = Int8Conv2d.from_float(layer), layer(x)
    got = int8(x)
    if not torch.equal(got, int8(x.contiguous(memory_format=torch.channels_last))):
        raise SystemExit(f"bench_int8_conv2d: memory formats differ at {name}: not timed")
    if not (got - want).norm() < 0.03 * want.norm():
        raise SystemExit(f"bench_int8_conv2d: not close to the float layer at {name}: not timed")


if __name__ == "__main__":
    sys.exit(main())
