"""int8_weight_mm against torch's float linears: decoding, where the weight is larger than a cache."""

from __future__ import annotations

import sys
from functools import partial

import harness
import torch
from harness import Table
from torch.nn.functional import linear

from trimtab import ops
from trimtab.ops.int8_weight_mm import dequantize_weight

# M, K, N. Up to 16 rows the product streams the weight; 64 and 256 show where it stops to pay.
SHAPES = tuple((M, 4096, N) for N in (4096, 11008) for M in (1, 4, 8, 16)) + (
    (64, 4096, 4096),
    (256, 1024, 4096),
)
QUICK = ((3, 104, 50),)
GROUP = 128


def check(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    error = (got.double() - want).norm() / want.norm()
    if not error < 1e-2 if got.dtype == torch.bfloat16 else not error < 1e-4:
        raise SystemExit(f"bench_int8_weight_mm: {name} is off by {error:.1e}: not timed")


def candidates(M: int, K: int, N: int) -> dict:
    """The int8 layers in fp32 and bf16, one with 4-bit groups, and torch with the same weights."""
    x, weight = torch.randn(M, K), torch.randn(N, K) / K**0.5
    x16 = x.bfloat16()
    plain, scale = ops.quantize_int8(weight)
    packed = ops.int8_pack(plain)
    group = min(GROUP, K)
    codes, group_scale, zero = ops.quantize_affine(weight, 4, group)
    grouped = ops.int8_pack((codes.to(torch.int16) - 8).to(torch.int8))
    zero = (zero.to(torch.int16) - 8).to(torch.int8).t().contiguous()
    group_scale = group_scale.t().contiguous()
    stands_for = dequantize_weight(plain, scale, None, K, None, torch.float32)
    weight16 = stands_for.bfloat16()
    product = torch.ops.trimtab.int8_weight_mm.inference
    calls = {
        "trimtab fp32": partial(product, x, packed, scale),
        "trimtab bf16": partial(product, x16, packed, scale),
        "trimtab 4-bit groups": partial(product, x, grouped, group_scale, zero, None, group),
        "torch fp32": partial(linear, x, stands_for),
        "torch bf16": partial(linear, x16, weight16),
    }
    want = x.double() @ stands_for.double().t()
    for name, call in calls.items():
        if "groups" not in name:
            check(name, call(), want)
    back = dequantize_weight(grouped, group_scale, zero, K, group, torch.float32).double()
    check("groups", calls["trimtab 4-bit groups"](), x.double() @ back.t())
    return calls


def main() -> int:
    options = harness.parser(__doc__).parse_args()
    harness.start(options)
    table = Table("int8_weight_mm", options.out)
    shapes = QUICK if options.quick else SHAPES
    cases = {f"{M},{K},{N}": candidates(M, K, N) for M, K, N in shapes}
    harness.bench_simple(table, cases, "trimtab fp32", options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
