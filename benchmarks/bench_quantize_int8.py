"""quantize_int8 against the same formula in eager torch."""

from __future__ import annotations

import sys
from functools import partial

import harness
import torch
from harness import Table

from trimtab import ops

SHAPES = ((1, 4096), (32, 1024), (128, 4096), (2048, 1024), (4096, 4096))
QUICK = ((17, 101),)


def eager(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.float()
    absmax = x.abs().amax(1)
    return (x * (127 / absmax)[:, None]).round_().to(torch.int8), absmax / 127


def main() -> int:
    options = harness.parser(__doc__).parse_args()
    harness.start(options)
    cases = {}
    for M, K in QUICK if options.quick else SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(M, K).to(dtype)
            if not all(map(torch.equal, ops.quantize_int8(x), eager(x))):
                raise SystemExit(
                    f"bench_quantize_int8: {M},{K} {dtype} differs from eager: not timed"
                )
            name = f"{M},{K} {str(dtype).removeprefix('torch.')}"
            cases[name] = {
                "trimtab": partial(ops.quantize_int8, x),
                "torch eager": partial(eager, x),
            }
    harness.bench_simple(Table("quantize_int8", options.out), cases, "trimtab", options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
