"""The Triton activations, interpreted, against the reference: the same bits over all of fp32.

Run by test_triton_activation.py, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
from triton_activation import activation_kernel
from triton_interpret import from_bits, same

from trimtab.kernels.activation import ACTIVATIONS
from trimtab.reference.activation import activate

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, for Inf and NaN
BLOCK = 2**17


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_same_bits(activation: str) -> None:
    """Every 16411th of the 2^32 floats, where things happen at a finer step, and the special ones."""
    special = from_bits([0, 0x80000000, 1, 0x80000001, 0x7F800000, 0xFF800000, 0x7FC00000])
    every = torch.from_numpy(np.arange(0, 2**32, 16411, dtype=np.uint32).view(np.float32))
    x = torch.cat([every, torch.linspace(-120, 120, BLOCK), torch.randn(BLOCK), special])
    out = torch.empty_like(x)
    activation_kernel[(triton.cdiv(len(x), BLOCK),)](x, out, len(x), activation, BLOCK)
    assert same(out, activate(activation, x.numpy()))
