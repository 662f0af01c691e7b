"""The layout in which int8 weights live on a CPU."""

import torch
from torch import Tensor

from . import library

PANEL, TAIL = 16, 960  # kPanelN and TT_INT8_PACK_TAIL of the C++ side


def packed_size(N: int, K: int) -> int:
    """Bytes of the packed form of an [N, K] weight."""
    return (N + PANEL - 1) // PANEL * PANEL * ((K + 3) // 4 * 4) + TAIL


def int8_pack(weight: Tensor) -> Tensor:
    """Packs an int8 ``weight`` [N, K] for the CPU kernels: 1-D int8, one layout for all of them.

    ``packed[n // 16][k // 4][n % 16][k % 4]``, N padded to 16 and K to 4 with zeros.

    Raises:
        RuntimeError: wrong dtype, rank or device.
    """
    return torch.ops.trimtab.int8_pack.default(weight)


def int8_unpack(packed: Tensor, N: int, K: int) -> Tensor:
    """The inverse of int8_pack: int8 [N, K], bit for bit.

    Raises:
        RuntimeError: ``packed`` is not the packed form of an [N, K] weight.
    """
    return torch.ops.trimtab.int8_unpack.default(packed, N, K)


@library.register_fake("trimtab::int8_pack")
def _(weight: Tensor) -> Tensor:
    library.expect(
        weight.dtype == torch.int8 and weight.dim() == 2,
        f"int8_pack: expected weight of 2-D int8, got {library.describe(weight)}",
    )
    return weight.new_empty(packed_size(weight.shape[0], weight.shape[1]))


@library.register_fake("trimtab::int8_unpack")
def _(packed: Tensor, N: int, K: int) -> Tensor:
    return packed.new_empty(N, K)
