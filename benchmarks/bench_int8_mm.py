"""int8_mm on operands that are int8 already, against torch._int_mm and its eager epilogue."""

from __future__ import annotations

import sys

import harness
import torch
from harness import Table

from trimtab import ops

SHAPES = (
    (1, 4096, 4096),
    (32, 1024, 1024),
    (128, 768, 3072),
    (512, 1024, 4096),
    (2048, 1024, 1024),
)
QUICK = ((17, 101, 259),)


def main() -> int:
    options = harness.parser(__doc__).parse_args()
    harness.start(options)
    cases = {}
    for M, K, N in QUICK if options.quick else SHAPES:
        a = torch.randint(-127, 128, (M, K), dtype=torch.int8)
        b = torch.randint(-127, 128, (N, K), dtype=torch.int8)
        a_scale, b_scale, bias = torch.rand(M) / 1e3, torch.rand(N) / 1e3, torch.randn(N)
        packed = ops.int8_pack(b)

        def ours(
            a: torch.Tensor = a,
            b: torch.Tensor = packed,
            scales: tuple = (a_scale, b_scale, bias),
        ) -> torch.Tensor:
            return ops.int8_mm(a, b, *scales, out_dtype=torch.float32)

        def theirs(
            a: torch.Tensor = a, b: torch.Tensor = b, scales: tuple = (a_scale, b_scale, bias)
        ) -> torch.Tensor:
            acc = torch._int_mm(a, b.t()).float()
            return acc.mul_(scales[1]).mul_(scales[0][:, None]).add_(scales[2])

        # The same roundings in the same order: the same bits.
        if not torch.equal(ours(), theirs()):
            raise SystemExit(f"bench_int8_mm: not equal to torch._int_mm at {M},{K},{N}: not timed")
        cases[f"{M},{K},{N}"] = {"trimtab": ours, "torch._int_mm": theirs}
    harness.bench_simple(Table("int8_mm", options.out), cases, "trimtab", options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
