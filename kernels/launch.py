"""What every launcher needs to know of its operands' memory."""

from __future__ import annotations

import contextlib
import math
from contextlib import AbstractContextManager

import torch


def on_device_of(t: torch.Tensor) -> AbstractContextManager:
    """Makes ``t``'s GPU the current one: Triton launches there, whatever its arguments' device."""
    if t.device.type != "cuda" or t.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(t.device)


def k_alignment(a: torch.Tensor, b: torch.Tensor) -> int:
    """Elements of K that ``a`` [M, K] and ``b`` [N, K] may be read by at once: 16, 8, 4, or 1.

    The largest that divides K and the distance between rows; 1 if K is not adjacent, or a tensor
    does not start on 16 bytes. Below 4 there is nothing to gain: cp.async copies at least 4 bytes.
    """
    if a.stride(1) != 1 or b.stride(1) != 1 or (a.data_ptr() | b.data_ptr()) % 16 != 0:
        return 1
    common = math.gcd(16, a.shape[1], a.stride(0), b.stride(0))
    return common if common >= 4 else 1
