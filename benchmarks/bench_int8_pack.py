"""int8_pack and int8_unpack against the same rearrangement written with torch views."""

from __future__ import annotations

import sys
from functools import partial

import harness
import torch
from harness import Table

from trimtab import ops

SHAPES = ((1024, 1024), (4096, 1024), (4096, 4096), (11008, 4096))
QUICK = ((96, 64),)


def eager(weight: torch.Tensor) -> torch.Tensor:
    """``packed[n // 16][k // 4][n % 16][k % 4]``, for N a multiple of 16 and K of 4."""
    N, K = weight.shape
    return weight.view(N // 16, 16, K // 4, 4).transpose(1, 2).contiguous().view(-1)


def main() -> int:
    options = harness.parser(__doc__).parse_args()
    harness.start(options)
    cases = {}
    for N, K in QUICK if options.quick else SHAPES:
        weight = torch.randint(-127, 128, (N, K), dtype=torch.int8)
        packed = ops.int8_pack(weight)
        same = torch.equal(packed[: N * K], eager(weight))
        if not (same and torch.equal(ops.int8_unpack(packed, N, K), weight)):
            raise SystemExit(f"bench_int8_pack: {N},{K} is not the documented layout: not timed")
        cases[f"{N},{K}"] = {
            "trimtab": partial(ops.int8_pack, weight),
            "trimtab unpack": partial(ops.int8_unpack, packed, N, K),
            "torch views": partial(eager, weight),
        }
    harness.bench_simple(Table("int8_pack", options.out), cases, "trimtab", options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
