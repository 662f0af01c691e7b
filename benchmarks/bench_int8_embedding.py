"""int8_embedding against torch.nn.functional.embedding on fp32 and bf16 tables."""

from __future__ import annotations

import sys

import harness
import torch
from harness import Table
from torch.nn import functional as F

from trimtab import ops

# rows of the table, columns, indices
SHAPES = ((30_522, 384, 4096), (30_522, 384, 64), (200_000, 1024, 2048), (1_000_000, 64, 16_384))
QUICK = ((1000, 33, 50),)


def main() -> int:
    options = harness.parser(__doc__).parse_args()
    harness.start(options)
    cases = {}
    for V, D, n in QUICK if options.quick else SHAPES:
        table = torch.randn(V, D)
        weight, scale = ops.quantize_int8(table)
        narrow = table.bfloat16()
        indices = torch.randint(0, V, (n,))
        got, exact = ops.int8_embedding(indices, weight, scale), weight[indices].float()
        if not torch.equal(got, exact * scale[indices, None]):
            raise SystemExit(f"bench_int8_embedding: wrong rows at {V},{D},{n}: not timed")
        cases[f"{V},{D},{n}"] = {
            "trimtab": lambda i=indices, w=weight, s=scale: ops.int8_embedding(i, w, s),
            "trimtab bf16": lambda i=indices, w=weight, s=scale: ops.int8_embedding(
                i, w, s, torch.bfloat16
            ),
            "torch fp32": lambda i=indices, w=table: F.embedding(i, w),
            "torch bf16": lambda i=indices, w=narrow: F.embedding(i, w),
        }
    harness.bench_simple(Table("int8_embedding", options.out), cases, "trimtab", options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
