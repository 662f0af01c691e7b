"""rms_norm_quantize_int8 against torch's rms_norm, followed by our quantize_int8."""

from __future__ import annotations

import sys
from functools import partial

import harness
import torch
from harness import Table

from trimtab import ops
from trimtab.reference.rms_norm_quantize_int8 import rms_norm_quantize_int8 as reference

SHAPES = ((1, 4096), (32, 1024), (512, 4096), (2048, 8192))
QUICK = ((17, 101),)


def apart(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.quantize_int8(torch.nn.functional.rms_norm(x, x.shape[-1:], weight, 1e-6))


def same(x: torch.Tensor, weight: torch.Tensor) -> bool:
    want = reference(x[:4].float().numpy(), weight.float().numpy())
    got = ops.rms_norm_quantize_int8(x[:4], weight)
    return all(torch.equal(a, torch.from_numpy(b)) for a, b in zip(got, want, strict=True))


def main() -> int:
    options = harness.parser(__doc__).parse_args()
    harness.start(options)
    cases = {}
    for M, K in QUICK if options.quick else SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            x, weight = torch.randn(M, K).to(dtype), (torch.rand(K) + 0.5).to(dtype)
            if not same(x, weight):
                raise SystemExit(
                    f"bench_rms_norm_quantize_int8: {M},{K} {dtype} differs from the reference: "
                    "not timed"
                )
            name = f"{M},{K} {str(dtype).removeprefix('torch.')}"
            cases[name] = {
                "trimtab": partial(ops.rms_norm_quantize_int8, x, weight),
                "torch rms_norm + quantize_int8": partial(apart, x, weight),
            }
    harness.bench_simple(Table("rms_norm_quantize_int8", options.out), cases, "trimtab", options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
