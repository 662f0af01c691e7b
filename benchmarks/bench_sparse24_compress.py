"""sparse24_compress against the same rule by torch's operators, and against a clone of the weight."""

from __future__ import annotations

import sys
from functools import partial

import harness
import torch
from harness import Table

from trimtab import ops
from trimtab.ops.sparse24_compress import compress_in_torch

SHAPES = ((1024, 1024), (4096, 4096), (11008, 4096))
QUICK = ((33, 101),)
DTYPES = (torch.float32, torch.bfloat16, torch.int8)


def main() -> int:
    options = harness.parser(__doc__).parse_args()
    harness.start(options)
    cases = {}
    for N, K in QUICK if options.quick else SHAPES:
        for dtype in DTYPES:
            weight = (40 * torch.randn(N, K)).clamp(-127, 127).to(dtype)
            if not all(map(torch.equal, ops.sparse24_compress(weight), compress_in_torch(weight))):
                raise SystemExit(f"bench_sparse24_compress: {N},{K} {dtype} differs: not timed")
            name = f"{N},{K} {str(dtype).removeprefix('torch.')}"
            cases[name] = {
                "trimtab": partial(ops.sparse24_compress, weight),
                "torch operators": partial(compress_in_torch, weight),
                "clone": weight.clone,
            }
    harness.bench_simple(Table("sparse24_compress", options.out), cases, "trimtab", options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
