"""silu_mul_quantize_int8 against torch's silu and product, followed by our quantize_int8."""

from __future__ import annotations

import sys
from functools import partial

import harness
import torch
from harness import Table

from trimtab import ops
from trimtab.reference.silu_mul_quantize_int8 import silu_mul_quantize_int8 as reference

# K of a gated MLP: 8B, 70B (14336, 28672) and a small one.
SHAPES = ((1, 14336), (32, 4096), (512, 14336), (2048, 4096))
QUICK = ((17, 101),)


def apart(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.quantize_int8(torch.nn.functional.silu(gate) * up)


def same(gate: torch.Tensor, up: torch.Tensor) -> bool:
    rows = (gate[:4], up[:4])
    want = reference(*(row.float().numpy() for row in rows))
    got = ops.silu_mul_quantize_int8(*rows)
    return all(torch.equal(a, torch.from_numpy(b)) for a, b in zip(got, want, strict=True))


def main() -> int:
    options = harness.parser(__doc__).parse_args()
    harness.start(options)
    cases = {}
    for M, K in QUICK if options.quick else SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            gate, up = torch.randn(2, M, K).to(dtype)
            if not same(gate, up):
                raise SystemExit(
                    f"bench_silu_mul_quantize_int8: {M},{K} {dtype} differs from the reference: "
                    "not timed"
                )
            name = f"{M},{K} {str(dtype).removeprefix('torch.')}"
            cases[name] = {
                "trimtab": partial(ops.silu_mul_quantize_int8, gate, up),
                "torch silu, mul + quantize_int8": partial(apart, gate, up),
            }
    harness.bench_simple(Table("silu_mul_quantize_int8", options.out), cases, "trimtab", options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
