"""What the convolutions share: their arguments, the size of the result, the gradient to images."""

from collections.abc import Sequence

import torch
import torch.nn.grad
from torch import Tensor
from torch.nn import functional as F

from . import library


def pair(name: str, value: int | tuple[int, ...], op: str = "conv2d") -> tuple[int, int]:
    """``(value, value)``, or the two integers themselves; ValueError for anything else."""
    if isinstance(value, int):
        return (value, value)
    if len(value) != 2:
        raise ValueError(f"{op}: expected {name} of one or two integers, got {value}")
    return (value[0], value[1])


def padding_sides(
    padding: int | tuple[int, int] | str,
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    op: str = "conv2d",
) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of a padding as torch.nn.Conv2d takes it.

    "same" with an even kernel puts the odd zero at the bottom and right, as torch does.
    """
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"{op}: expected padding 'same' or 'valid', got {padding!r}")
        if padding == "valid":
            return (0, 0, 0, 0)
        if stride != (1, 1):
            raise ValueError(f"{op}: expected stride 1 with padding 'same', got {stride}")
        h, w = (d * (k - 1) for d, k in zip(dilation, kernel))
        return (h // 2, h - h // 2, w // 2, w - w // 2)
    h, w = pair("padding", padding, op)
    return (h, h, w, w)


def out_sizes(
    op: str,
    x: Tensor,
    O: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> list[int]:
    """[B, O, OH, OW] of images ``x``, for fakes; ``padding`` is (top, bottom, left, right)."""
    library.expect_float(op, "x", x)
    library.expect(x.dim() == 4, f"{op}: expected x [B, C, H, W], got {library.describe(x)}")
    B, C, H, W = x.shape
    library.expect(
        C % groups == 0 and O % groups == 0,
        f"{op}: expected groups that divide {C} input and {O} output channels, got {groups}",
    )
    top, bottom, left, right = padding
    room_h = H + top + bottom - dilation[0] * (kernel[0] - 1) - 1
    room_w = W + left + right - dilation[1] * (kernel[1] - 1) - 1
    library.expect(
        room_h >= 0 and room_w >= 0,
        f"{op}: expected a kernel no larger than the padded image, got kernel {list(kernel)} with "
        f"dilation {list(dilation)} on {H + top + bottom}x{W + left + right}",
    )
    return [B, O, room_h // stride[0] + 1, room_w // stride[1] + 1]


def grad_of_images(
    x_shape: Sequence[int],
    weight: Tensor,
    grad: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """torch's gradient to the padded images, cut to the images: padding may be uneven."""
    B, C, H, W = x_shape
    top, bottom, left, right = padding
    padded = torch.nn.grad.conv2d_input(
        (B, C, H + top + bottom, W + left + right), weight, grad, stride, 0, dilation, groups
    )
    return padded[:, :, top : top + H, left : left + W]


def grad_of_weight(
    x: Tensor,
    sizes: Sequence[int],
    grad: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """torch's gradient to the dense weight of these ``sizes``."""
    top, bottom, left, right = padding
    padded = F.pad(x, (left, right, top, bottom)) if any(padding) else x
    return torch.nn.grad.conv2d_weight(padded, sizes, grad, stride, 0, dilation, groups)
