"""SparseConv2d: torch.nn.Conv2d with a pruned weight, compressed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .conv_geometry import ConvGeometry, PaddingMode, Sizes, plan
from .sparse_weight import SparseWeight


class SparseConv2d(SparseWeight, ConvGeometry):
    """``act(conv2d(x, weight) + bias)`` with the kept weights of a pruned Conv2d alone.

    Patterns as in SparseLinear, over the matrix [out_channels, in_channels / groups * kh * kw]: 2:4
    counts four adjacent weights in the order (channel, kh, kw), a block spans ``block`` = (output
    channels, such weights), and each group starts a row of blocks of its own. On a CPU float weights of
    the first two are convolved directly (ops.bitmap_conv2d); the others are that matrix times the
    patches of ``x`` (im2col), group by group. With ``int8=True`` each patch is quantized with a scale
    of its own, unlike Int8Conv2d, which takes one an image.

    ``x`` [B, C, H, W] or [C, H, W]; every stride, padding, padding mode, dilation and groups of
    torch.nn.Conv2d. The result has x's memory format. Gradients and ``weight`` as in SparseLinear.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        pattern: str = "bitmap",
        block: tuple[int, int] = (32, 32),
        int8: bool = False,
        activation: str = "none",
    ) -> None:
        """An all-zero layer, to load a checkpoint into; see from_float for a trained one.

        Raises ValueError for what torch.nn.Conv2d refuses, an unknown pattern, block or activation.
        """
        planned = plan(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode
        )
        nn.Module.__init__(self)
        self._take_geometry(planned)
        self._take_format(pattern, block, int8, dtype or torch.get_default_dtype(), activation)
        self._set_empty(device, bias)

    @classmethod
    def from_float(
        cls,
        module: nn.Conv2d,
        activation: str = "none",
        *,
        pattern: str = "bitmap",
        block: tuple[int, int] = (32, 32),
        int8: bool = False,
        mask: Tensor | None = None,
    ) -> SparseConv2d:
        """The sparse form of a pruned Conv2d; arguments and errors as SparseLinear.from_float's."""
        if not isinstance(module, nn.Conv2d):
            raise TypeError(f"SparseConv2d: expected an nn.Conv2d, got {type(module).__name__}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take_geometry(module)
        layer._take_format(pattern, block, int8, module.weight.dtype, activation)
        layer._take_float(module, mask)
        return layer

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dense weight this layer stands for, computed on demand."""
        return self.float_weight()

    def forward(self, x: Tensor) -> Tensor:
        batch = x.unsqueeze(0) if x.dim() == 3 else x
        if batch.dim() != 4 or batch.shape[1] != self.in_channels:
            raise RuntimeError(
                f"SparseConv2d: expected x [B, {self.in_channels}, H, W] or [{self.in_channels}, H, W]"
                f", got {list(x.shape)}"
            )
        padded = self._padded(batch)
        last = _channels_last(batch)
        height, width = self._out_size(padded)
        if self._direct(padded, last):
            out = self._convolve(padded, self._conv_arguments)
            out = out.contiguous(memory_format=torch.channels_last) if last else out
            return out.squeeze(0) if x.dim() == 3 else out
        patches = self._patches(padded, height, width)
        if self.groups == 1:
            out = self._product(patches)
        else:
            K = patches.shape[2] // self.groups
            each = patches.split(K, 2)
            out = torch.cat([self._product(each[g], g) for g in range(self.groups)], 2)
        out = out.reshape(batch.shape[0], height, width, self.out_channels).permute(0, 3, 1, 2)
        if not last:
            out = out.contiguous()
        return out.squeeze(0) if x.dim() == 3 else out

    @property
    def _conv_arguments(self) -> tuple:
        return (self._kernel, self._stride, self._sides, self._dilation, self.groups)

    def _direct(self, x: Tensor, channels_last: bool) -> bool:
        """Whether bitmap_conv2d serves: of channels-last images a 1x1 kernel's patches are a view."""
        view = channels_last and self._kernel == (1, 1) and self._stride == (1, 1)
        return x.device.type == "cpu" and not view and self._has_float_bits()

    def _out_size(self, x: Tensor) -> tuple[int, int]:
        """OH and OW."""
        (kh, kw), (sh, sw), (dh, dw) = self._kernel, self._stride, self._dilation
        top, bottom, left, right = self._sides
        tall, wide = x.shape[2] + top + bottom, x.shape[3] + left + right
        height, width = (tall - dh * (kh - 1) - 1) // sh + 1, (wide - dw * (kw - 1) - 1) // sw + 1
        if height < 1 or width < 1:
            raise RuntimeError(
                f"SparseConv2d: expected an image that the kernel {kh}x{kw} (dilation {dh}, {dw}) fits "
                f"into, got {tall}x{wide} with its padding"
            )
        return height, width

    def _patches(self, x: Tensor, height: int, width: int) -> Tensor:
        """x as [B, OH * OW, C * kh * kw]."""
        top, bottom, left, right = self._sides
        if any(self._sides):
            x = F.pad(x, (left, right, top, bottom))
        if self._kernel == (1, 1):
            sh, sw = self._stride
            taken = x[:, :, ::sh, ::sw].permute(0, 2, 3, 1)
            return taken.reshape(x.shape[0], height * width, self.in_channels)
        return F.unfold(x, self._kernel, self._dilation, 0, self._stride).transpose(1, 2)

    def extra_repr(self) -> str:
        return nn.Conv2d.extra_repr(self) + self._described()


def _channels_last(x: Tensor) -> bool:
    """As int8_conv2d decides the format of its result."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
