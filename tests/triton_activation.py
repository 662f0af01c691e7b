"""A Triton kernel that does nothing but an activation, for the tests."""

from __future__ import annotations

import triton
import triton.language as tl

from trimtab.kernels.activation import activate


@triton.jit
def activation_kernel(x_ptr, out_ptr, n, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n)
    tl.store(out_ptr + offs, activate(x, ACTIVATION), mask=offs < n)
