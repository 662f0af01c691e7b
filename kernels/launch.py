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


def k_alignment(*matrices: torch.Tensor) -> int:
    """How many elements of K the rows [*, K] of all these may be accessed by at once: 16, 8, 4 or 1.

    The largest that divides every K and distance between rows; 1 if K is not adjacent somewhere, or
    a matrix does not start on 16 bytes. Triton finds out about 16 only, and takes one element at a
    time otherwise. Below 4 there is nothing to gain: cp.async copies at least 4 bytes.
    """
    common = 16
    for t in matrices:
        if t.stride(1) != 1 or t.data_ptr() % 16 != 0:
            return 1
        common = math.gcd(common, t.shape[1], t.stride(0))
    return common if common >= 4 else 1
