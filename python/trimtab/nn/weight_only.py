"""Int8WeightOnlyLinear: torch.nn.Linear with an int8 weight and floating-point activations."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import library
from ..ops.int8_weight_mm import dequantize_weight
from ..ops.quantize_affine import group_count
from .linear import Int8Linear

_inference = torch.ops.trimtab.int8_weight_mm.inference


class Int8WeightOnlyLinear(Int8Linear):
    """``act(x @ weight.T + bias)`` with an int8 weight; ``x`` is not quantized, the sum is float32.

    What ``Int8Linear.from_float(module, weight_only=True)`` returns. With 8 bits and no group size the
    weight is symmetric, one scale an output channel, the same numbers as Int8Linear's. Otherwise it
    comes from quantize_affine: ``bits`` bits (2 to 8), a scale and a zero point for every group of
    ``group_size`` adjacent inputs of an output channel (None: all of them), a byte a code.

    state_dict is Int8Linear's; an affine weight has ``weight_scale`` float32 and ``weight_zero_point``
    int8, both [out_features, groups], and stands for ``(weight - weight_zero_point) * weight_scale``.
    """

    zero_point: Tensor | None  # [groups, N], as the op reads it; None where the weight is symmetric

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "none",
        bits: int = 8,
        group_size: int | None = None,
    ) -> None:
        """An all-zero layer, to load a checkpoint into; see from_float for a trained one.

        ``dtype`` is that of the bias. Raises ValueError for an unknown activation, ``bits`` outside
        2..8, or a ``group_size`` that is neither a multiple of 4 nor ``in_features`` or more.
        """
        check_scheme(bits, group_size, in_features)
        super().__init__(in_features, out_features, bias, device, dtype, activation=activation)
        self._set_scheme(bits, group_size)
        if self._affine:
            shape = (group_count(in_features, group_size), out_features)
            self.weight_scale = torch.zeros(shape, dtype=torch.float32, device=device)
            self.zero_point = torch.zeros(shape, dtype=torch.int8, device=device)

    @classmethod
    def from_float(
        cls,
        module: nn.Linear,
        activation: str = "none",
        *,
        weight_only: bool = True,
        bits: int = 8,
        group_size: int | None = None,
    ) -> "Int8WeightOnlyLinear":
        """The weight-only form of a float Linear; shares its bias parameter.

        Raises:
            TypeError: ``module`` is no nn.Linear.
            ValueError: as __init__, or ``weight_only`` is False.
            RuntimeError: its weight is not float32, bfloat16 or float16.
        """
        if not isinstance(module, nn.Linear):
            raise TypeError(f"Int8Linear: expected an nn.Linear, got {type(module).__name__}")
        if not weight_only:
            raise ValueError("Int8WeightOnlyLinear: expected weight_only=True, got False")
        check_scheme(bits, group_size, module.in_features)
        code = library.activation_code("Int8Linear", activation)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = module.in_features, module.out_features
        layer.weight_shape = (module.out_features, module.in_features)
        layer.activation, layer._code = activation, code
        layer.dtype = module.weight.dtype
        layer._set_scheme(bits, group_size)
        layer._quantize(module.weight.detach())
        layer.register_parameter("bias", module.bias)
        layer.train(module.training)
        return layer

    def _set_scheme(self, bits: int, group_size: int | None) -> None:
        self.bits, self.group_size = bits, group_size
        self._affine = bits != 8 or group_size is not None
        self.register_buffer("zero_point", None, persistent=False)

    def _quantize(self, weight: Tensor) -> None:
        if not self._affine:
            self.set_weight(*ops.quantize_int8(weight))
            return
        q, scale, zero = ops.quantize_affine(weight, self.bits, self.group_size)
        # 0..2^bits - 1 to int8, around 0; codes and zero points move together.
        half = 2 ** (self.bits - 1)
        self.set_weight((q.to(torch.int16) - half).to(torch.int8), scale.t())
        self.zero_point = (zero.to(torch.int16) - half).to(torch.int8).t().contiguous()

    def float_weight(self) -> Tensor:
        """The float weight [N, K] this one stands for, in ``dtype``; a new tensor at every call."""
        return dequantize_weight(
            self.int8_weight(),
            self.weight_scale,
            self.zero_point,
            self.in_features,
            self.group_size,
            self.dtype,
        )

    def resident_bytes(self) -> int:
        """Bytes the weight, its scales and zero points and the bias occupy."""
        zero = self.zero_point
        return super().resident_bytes() + (0 if zero is None else zero.numel())

    def forward(self, x: Tensor) -> Tensor:
        buffers, bias = self._buffers, self._parameters["bias"]
        args = (
            x,
            buffers["packed"],
            buffers["weight_scale"],
            buffers["zero_point"],
            bias,
            self.group_size,
            self._code,
        )
        if torch.is_grad_enabled() and (
            x.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return torch.ops.trimtab.int8_weight_mm.default(*args)
        return _inference(*args)

    def extra_repr(self) -> str:
        scheme = f", bits={self.bits}, group_size={self.group_size}" if self._affine else ""
        return f"{super().extra_repr()}, weight_only=True{scheme}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.zero_point is not None:
            destination[prefix + "weight_scale"] = self.weight_scale.t().contiguous()
            destination[prefix + "weight_zero_point"] = self.zero_point.t().contiguous()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        rest = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if not self._affine:
            super()._load_from_state_dict(state_dict, prefix, *rest)
            return
        scale = state_dict.get(prefix + "weight_scale")
        zero = state_dict.get(prefix + "weight_zero_point")
        problem = self._affine_problem(scale, zero)
        if problem and (scale is not None or zero is not None):
            # Nothing of this layer is loaded, the bias neither.
            error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {problem}")
            return
        turned = {k: v for k, v in state_dict.items() if k != prefix + "weight_zero_point"}
        if scale is not None:
            turned[prefix + "weight_scale"] = scale.t()
        errors = len(error_msgs)
        super()._load_from_state_dict(turned, prefix, *rest)
        if zero is None:
            missing_keys.extend([prefix + "weight_zero_point"] if strict else [])
        elif len(error_msgs) == errors:
            self.zero_point = zero.t().to(self.packed.device, copy=True).contiguous()

    def _affine_problem(self, scale: Tensor | None, zero: Tensor | None) -> str:
        """Why these cannot be this layer's scale and zero point; empty if they can."""
        shape = (self.out_features, group_count(self.in_features, self.group_size))
        for name, tensor, dtype in (
            ("weight_scale", scale, torch.float32),
            ("weight_zero_point", zero, torch.int8),
        ):
            if tensor is None:
                return f"expected {name} beside the others"
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                return (
                    f"expected {name} {list(shape)} {str(dtype).removeprefix('torch.')} for "
                    f"bits={self.bits} and group_size={self.group_size}, got "
                    f"{library.describe(tensor)}"
                )
        return ""


def check_scheme(bits: int, group_size: int | None, in_features: int) -> None:
    """ValueError unless a weight with ``in_features`` columns can be had in this form."""
    if not 2 <= bits <= 8:
        raise ValueError(f"Int8Linear: expected bits in 2..8, got {bits}")
    if group_size is None or group_size >= max(in_features, 1):
        return
    if group_size < 1 or group_size % 4 != 0:
        raise ValueError(
            f"Int8Linear: expected group_size to be a multiple of 4, or in_features={in_features} or "
            f"more, got {group_size}"
        )
