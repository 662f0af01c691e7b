"""The contract on a hundred million outputs: `make bits`. Not collected by pytest (minutes, not seconds).

Random shapes, dtypes, activations and biases, with rows of zeros, NaN, Inf and subnormals. Every
instruction set of this CPU, the NumPy reference and Triton's interpreter compute quantize_int8, int8_mm
and int8_linear on the same input, and every output must have the same bits.

    TRITON_INTERPRET=1 python tests/bits.py --outputs 1e8
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter

import cases
import torch

from trimtab import kernels, ops
from trimtab.reference.int8_mm import int8_mm as reference_mm
from trimtab.reference.quantize_int8 import quantize_int8 as reference_quantize


def case(generator: torch.Generator) -> dict[str, object]:
    """Random operands: up to 1500 x 1500 outputs, K up to 700."""

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    M, N, K = integer(1, 1500), integer(1, 1500), integer(1, 700)
    dtype = cases.DTYPES[integer(0, 3)]
    weight, scale = ops.quantize_int8(torch.randn(N, K, generator=generator))
    bias = torch.randn(N, generator=generator).to(cases.DTYPES[integer(0, 3)])
    return {
        "x": cases.awkward_rows(M, K, dtype, generator),
        "weight": weight,
        "scale": scale,
        "bias": bias if integer(0, 2) else None,
        "activation": cases.ACTIVATIONS[integer(0, len(cases.ACTIVATIONS))],
        "out_dtype": cases.DTYPES[integer(0, 3)],
    }


def check(c: dict, with_triton: bool) -> Counter[str]:
    """Compares all implementations on one case; returns the outputs compared, by implementation."""
    x, weight, scale, bias = c["x"], c["weight"], c["scale"], c["bias"]
    q, q_scale = reference_quantize(cases.to_numpy(x))
    want = reference_mm(
        q, *map(cases.to_numpy, (weight,)), q_scale, *map(cases.to_numpy, (scale, bias)),
        c["activation"], cases.name(c["out_dtype"]),
    )  # fmt: skip
    count: Counter[str] = Counter()
    packed = ops.int8_pack(weight)
    tail = (scale, bias, c["activation"], c["out_dtype"])
    for isa in ops.available_isas():
        ops.set_isa(isa)
        got_q, got_scale = ops.quantize_int8(x)
        cases.assert_same_bits(got_q, q)
        cases.assert_same_bits(got_scale, q_scale)
        cases.assert_same_bits(ops.int8_mm(got_q, packed, got_scale, *tail), want)
        cases.assert_same_bits(ops.int8_linear(x, packed, *tail), want)
        count[isa] += want.size
    ops.set_isa(None)
    if with_triton:
        got_q, got_scale = kernels.load("quantize_int8")(x)
        cases.assert_same_bits(got_q, q)
        cases.assert_same_bits(got_scale, q_scale)
        cases.assert_same_bits(kernels.load("int8_mm")(got_q, weight, got_scale, *tail), want)
        count["triton"] += want.size
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--outputs", type=float, default=1e8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with_triton = os.environ.get("TRITON_INTERPRET") == "1" and bool(kernels.is_available())
    if with_triton:
        from triton_interpret import mend_interpreter

        mend_interpreter()
    generator = torch.Generator().manual_seed(options.seed)
    total: Counter[str] = Counter()
    start, shown = time.monotonic(), 0.0
    while min(total.values(), default=0) < options.outputs:
        total += check(case(generator), with_triton)
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            print(f"{min(total.values()):,} outputs equal after {shown - start:.0f} s", flush=True)
    for name, count in total.items():
        print(f"{name:>8} equals NumPy on {count:,} outputs of int8_linear and of int8_mm")


if __name__ == "__main__":
    main()
