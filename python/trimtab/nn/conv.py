"""Int8Conv2d: torch.nn.Conv2d with an int8 weight."""

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import library
from .conv_geometry import ConvGeometry, PaddingMode, Sizes, plan
from .int8_weight import Int8Weight

_op = torch.ops.trimtab.int8_conv2d


class Int8Conv2d(Int8Weight, ConvGeometry):
    """``act(conv2d(x, weight) + bias)`` with an int8 weight, one scale an output channel.

    ``x`` [B, C, H, W] or [C, H, W] of float32, bfloat16 or float16 is quantized image by image (one
    scale over all of an image); the sums are exact in int32, so the same input gives the same bits on
    every device and batch size. The result has the dtype of ``x`` and its memory format (contiguous
    after circular padding, as nn.Conv2d's). Every stride, padding, padding mode, dilation and groups of
    torch.nn.Conv2d. Gradients flow to ``x`` and ``bias``; the weight is fixed.

    ``weight`` is computed on demand: the float weight [O, C / groups, kh, kw] that the int8 one stands
    for. Writing to it changes nothing.
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
        activation: str = "none",
    ) -> None:
        """An all-zero layer, to load a checkpoint into; see from_float for a trained one.

        ``dtype`` is that of the bias. Raises ValueError for what torch.nn.Conv2d refuses, and for an
        unknown activation.
        """
        code = library.activation_code("Int8Conv2d", activation)
        planned = plan(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode
        )
        nn.Module.__init__(self)
        self._take_geometry(planned)
        self._take_activation(activation, code)
        self.dtype = dtype or torch.get_default_dtype()
        weight = torch.zeros(self.weight_shape, dtype=torch.int8, device=device)
        self.set_weight(weight, torch.zeros(out_channels, dtype=torch.float32, device=device))
        zeros = torch.zeros(out_channels, dtype=self.dtype, device=device) if bias else None
        self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros))

    @classmethod
    def from_float(cls, module: nn.Conv2d, activation: str = "none") -> "Int8Conv2d":
        """The int8 form of a float Conv2d; shares its bias parameter, leaves it otherwise alone.

        Raises:
            TypeError: ``module`` is no nn.Conv2d.
            RuntimeError: its weight is not float32, bfloat16 or float16.
            ValueError: unknown activation.
        """
        if not isinstance(module, nn.Conv2d):
            raise TypeError(f"Int8Conv2d: expected an nn.Conv2d, got {type(module).__name__}")
        code = library.activation_code("Int8Conv2d", activation)
        float_weight = module.weight.detach()
        weight, scale = ops.quantize_int8(float_weight.flatten(1))
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take_geometry(module)
        layer._take_activation(activation, code)
        layer.dtype = float_weight.dtype
        layer.set_weight(weight.reshape(float_weight.shape), scale)
        layer.register_parameter("bias", module.bias)  # type: ignore[arg-type]
        layer.train(module.training)
        return layer

    def _take_activation(self, activation: str, code: int) -> None:
        self.activation, self._code = activation, code
        # What the op takes after the bias.
        self._shape = (self._kernel, self._stride, self._sides, self._dilation, self.groups, code)

    def _pack(self, weight: Tensor) -> Tensor:
        return ops.int8_conv2d_pack(weight, self.groups)

    def _unpack(self, packed: Tensor) -> Tensor:
        O, C, kh, kw = self.weight_shape
        return ops.int8_conv2d_unpack(packed, (O, C, kh, kw), self.groups)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The float weight this layer stands for, computed on demand."""
        return self.float_weight()

    def forward(self, x: Tensor) -> Tensor:
        batch = x.unsqueeze(0) if x.dim() == 3 else x
        bias = self.bias
        args = (self._padded(batch), self.packed, self.weight_scale, bias, *self._shape)
        if library.needs_grad(batch, bias):
            out = _op.default(*args)
        else:
            out = _op.inference(*args)
        return out.squeeze(0) if x.dim() == 3 else out

    def extra_repr(self) -> str:
        act = "" if self.activation == "none" else f", activation={self.activation}"
        return nn.Conv2d.extra_repr(self) + act
