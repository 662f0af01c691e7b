"""Int8Linear: torch.nn.Linear with an int8 weight."""

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import library
from .int8_weight import Int8Weight, padded_rows

_inference = torch.ops.trimtab.int8_linear.inference


class Int8Linear(Int8Weight, nn.Linear):
    """``act(x @ weight.T + bias)`` with an int8 weight, one scale an output channel.

    ``x`` [..., in_features] of float32, bfloat16 or float16 is quantized row by row; the product is
    exact in int32, so the same input gives the same bits on every device and batch size. The result
    has the dtype of ``x``. Gradients flow to ``x`` and ``bias``; the weight is fixed.

    ``weight`` is computed on demand: the float weight [out_features, in_features] that the int8 one
    stands for. Writing to it changes nothing.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "none",
    ) -> None:
        """An all-zero layer, to load a checkpoint into; see from_float for a trained one.

        ``dtype`` is that of the bias. Raises ValueError for an unknown activation.
        """
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.weight_shape = (out_features, in_features)
        self.activation = activation
        self._code = library.activation_code("Int8Linear", activation)
        self.dtype = dtype or torch.get_default_dtype()
        weight = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        self.set_weight(weight, torch.zeros(out_features, dtype=torch.float32, device=device))
        zeros = torch.zeros(out_features, dtype=self.dtype, device=device) if bias else None
        self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros))

    @classmethod
    def from_float(
        cls,
        module: nn.Linear,
        activation: str = "none",
        *,
        weight_only: bool = False,
        bits: int = 8,
        group_size: int | None = None,
    ) -> "Int8Linear":
        """The int8 form of a float Linear; shares its bias parameter, leaves it otherwise alone.

        ``weight_only`` keeps ``x`` in floating point, for decoding and for accuracy; ``bits`` (2 to 8)
        and ``group_size`` (inputs that share a scale) then choose an affine weight: see
        Int8WeightOnlyLinear, which is what comes back.

        Raises:
            TypeError: ``module`` is no nn.Linear.
            ValueError: unknown activation, ``bits`` or ``group_size`` out of range, or one of them
                without ``weight_only``.
            RuntimeError: its weight is not float32, bfloat16 or float16.
        """
        if not isinstance(module, nn.Linear):
            raise TypeError(f"Int8Linear: expected an nn.Linear, got {type(module).__name__}")
        if weight_only:
            from .weight_only import Int8WeightOnlyLinear

            return Int8WeightOnlyLinear.from_float(
                module, activation, bits=bits, group_size=group_size
            )
        if bits != 8 or group_size is not None:
            raise ValueError(
                "Int8Linear: expected weight_only=True with bits or group_size, got "
                f"weight_only=False, bits={bits}, group_size={group_size}"
            )
        weight, scale = ops.quantize_int8(module.weight.detach())
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = module.in_features, module.out_features
        layer.weight_shape = (module.out_features, module.in_features)
        layer.activation = activation
        layer._code = library.activation_code("Int8Linear", activation)
        layer.dtype = module.weight.dtype
        layer.set_weight(weight, scale)
        layer.register_parameter("bias", module.bias)
        layer.train(module.training)
        return layer

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The float weight this layer stands for, computed on demand."""
        return self.float_weight()

    def _plain(self, weight: Tensor) -> Tensor:
        return padded_rows(weight)

    def forward(self, x: Tensor) -> Tensor:
        # Plain dict look-ups: nn.Module's attribute access costs 0.3 us each.
        buffers, bias = self._buffers, self._parameters["bias"]
        args = (x, buffers["packed"], buffers["weight_scale"], bias, self._code)
        if torch.is_grad_enabled() and (
            x.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return torch.ops.trimtab.int8_linear.default(*args)
        return _inference(*args)

    def extra_repr(self) -> str:
        act = "" if self.activation == "none" else f", activation={self.activation}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}{act}"
        )
