"""quantize_affine and dequantize_affine against the same formulas in eager torch."""

from __future__ import annotations

import sys
from functools import partial

import harness
import torch
from harness import Table

from trimtab import ops

# M, K, group size: a token, activations, weights by channel and by group.
SHAPES = (
    (1, 4096, 4096),
    (128, 4096, 4096),
    (4096, 4096, 4096),
    (4096, 4096, 128),
    (4096, 4096, 32),
)
QUICK = ((17, 104, 8),)


def eager(x: torch.Tensor, group: int) -> tuple[torch.Tensor, ...]:
    groups = x.float().unflatten(1, (-1, group))
    low, high = groups.amin(2).clamp_(max=0), groups.amax(2).clamp_(min=0)
    inverse = torch.full_like(low, 255) / (high - low)  # 255 / t would be 255 * (1 / t)
    zero = (-low * inverse).round_()
    q = (groups * inverse[..., None]).round_().add_(zero[..., None]).clamp_(max=255)
    return q.to(torch.uint8).flatten(1), (high - low) / 255, zero.to(torch.uint8)


def eager_back(
    q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group: int
) -> torch.Tensor:
    values = q.unflatten(1, (-1, group)).float() - zero.float()[..., None]
    return values.mul_(scale[..., None]).flatten(1)


def main() -> int:
    options = harness.parser(__doc__).parse_args()
    harness.start(options)
    cases = {}
    for M, K, group in QUICK if options.quick else SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(M, K).to(dtype)
            name = f"{M},{K},{group} {str(dtype).removeprefix('torch.')}"
            codes = ops.quantize_affine(x, 8, group)
            if not all(map(torch.equal, codes, eager(x, group))):
                raise SystemExit(f"bench_quantize_affine: {name} differs from eager: not timed")
            cases[name] = {
                "trimtab": partial(ops.quantize_affine, x, 8, group),
                "torch eager": partial(eager, x, group),
            }
        if not torch.equal(ops.dequantize_affine(*codes, group), eager_back(*codes, group)):
            raise SystemExit(
                f"bench_quantize_affine: {M},{K},{group} comes back otherwise: not timed"
            )
        cases[f"{M},{K},{group} back"] = {
            "trimtab": partial(ops.dequantize_affine, *codes, group),
            "torch eager": partial(eager_back, *codes, group),
        }
    harness.bench_simple(Table("quantize_affine", options.out), cases, "trimtab", options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
