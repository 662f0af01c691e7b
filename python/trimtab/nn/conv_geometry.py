"""What the replacements of nn.Conv2d share: its arguments, checked, and the padding of an image."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.conv2d import padding_sides, pair

Sizes = int | tuple[int, int]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


def plan(
    in_channels: int, out_channels: int, kernel_size: Sizes, stride: Sizes, padding: Sizes | str,
    dilation: Sizes, groups: int, padding_mode: PaddingMode,
) -> nn.Conv2d:  # fmt: skip
    """On meta: nn.Conv2d checks its arguments and works out the padding; nothing is allocated."""
    return nn.Conv2d(
        in_channels, out_channels, pair("kernel_size", kernel_size), stride, padding, dilation,
        groups, False, padding_mode, device="meta",
    )  # fmt: skip


class ConvGeometry(nn.Conv2d):
    """An nn.Conv2d without nn.Conv2d's parameters: the attributes of one, and pairs of them.

    ``_kernel``, ``_stride`` and ``_dilation`` are (height, width); ``_sides`` the zeros (top, bottom,
    left, right), all 0 in the other padding modes, where :meth:`_padded` pads.
    """

    weight_shape: tuple[int, ...]

    def _take_geometry(self, module: nn.Conv2d) -> None:
        for name in (*nn.Conv2d.__constants__, "transposed", "output_padding"):
            setattr(self, name, getattr(module, name))
        self._reversed_padding_repeated_twice = list(module._reversed_padding_repeated_twice)
        kh, kw = self._kernel = pair("kernel_size", module.kernel_size)
        self._stride, self._dilation = pair("stride", self.stride), pair("dilation", self.dilation)
        self.weight_shape = (self.out_channels, self.in_channels // self.groups, kh, kw)
        self._sides = (0, 0, 0, 0)
        if self.padding_mode == "zeros":
            padding: Any = self.padding
            self._sides = padding_sides(padding, (kh, kw), self._stride, self._dilation)

    def _padded(self, x: Tensor) -> Tensor:
        """``x`` [B, C, H, W] with what stands around it where that is not zeros."""
        if self.padding_mode == "zeros":
            return x
        return F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
