"""int8_embedding_bag against torch.nn.functional.embedding_bag on fp32 and bf16 tables, mode sum."""

from __future__ import annotations

import sys

import harness
import torch
from harness import Table
from torch.nn import functional as F

from trimtab import ops

# rows of the table, columns, bags, indices a bag
SHAPES = ((1_000_000, 64, 512, 40), (200_000, 128, 2048, 20), (100_000, 256, 64, 100))
QUICK = ((1000, 33, 10, 7),)


def main() -> int:
    options = harness.parser(__doc__).parse_args()
    harness.start(options)
    cases = {}
    for V, D, bags, n in QUICK if options.quick else SHAPES:
        table = torch.randn(V, D)
        weight, scale = ops.quantize_int8(table)
        narrow = table.bfloat16()
        indices = torch.randint(0, V, (bags, n))
        got = ops.int8_embedding_bag(indices, weight, scale, mode="sum")
        exact = (weight[indices].double() * scale.double()[indices][..., None]).sum(1)
        if not (got - exact).norm() < 1e-6 * exact.norm():
            raise SystemExit(f"bench_int8_embedding_bag: wrong sums at {V},{D},{bags}: not timed")
        cases[f"{V},{D},{bags},{n}"] = {
            "trimtab": lambda i=indices, w=weight, s=scale: ops.int8_embedding_bag(
                i, w, s, mode="sum"
            ),
            "torch fp32": lambda i=indices, w=table: F.embedding_bag(i, w, mode="sum"),
            "torch bf16": lambda i=indices, w=narrow: F.embedding_bag(i, w, mode="sum"),
        }
    harness.bench_simple(Table("int8_embedding_bag", options.out), cases, "trimtab", options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
