"""SparseLinear: torch.nn.Linear with a pruned weight, compressed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .sparse_weight import SparseWeight


class SparseLinear(SparseWeight, nn.Linear):
    """``act(x @ weight.T + bias)`` with the kept weights of a pruned Linear alone.

    ``pattern``: "bitmap" (any weights; pays from about half of them zero), "2:4" (at most two of each
    four adjacent inputs), "block" (whole blocks of ``block`` = (outputs, inputs)). ``x``
    [..., in_features] has the dtype of the values, and so has the result. With ``int8=True`` the values
    are int8, one scale an output channel, ``x`` is quantized row by row, and the result has the bits of
    Int8Linear of the same masked weight.

    Gradients flow to ``x``, ``bias`` and float ``values``, a parameter that trains in place of
    ``weight``: what is kept stays kept, what is pruned stays zero; in a kept block or group zeros train
    too. A pruned weight contributes nothing, so an Inf in ``x`` that meets pruned weights alone leaves
    no NaN (NUMERICS.md section 7).

    ``weight`` is computed on demand: the dense weight [out_features, in_features]. Writing to it
    changes nothing.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        pattern: str = "bitmap",
        block: tuple[int, int] = (32, 32),
        int8: bool = False,
        activation: str = "none",
    ) -> None:
        """An all-zero layer, to load a checkpoint into; see from_float for a trained one.

        Raises ValueError for an unknown pattern, block or activation.
        """
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.weight_shape, self.groups = (out_features, in_features), 1
        self._take_format(pattern, block, int8, dtype or torch.get_default_dtype(), activation)
        self._set_empty(device, bias)

    @classmethod
    def from_float(
        cls,
        module: nn.Linear,
        activation: str = "none",
        *,
        pattern: str = "bitmap",
        block: tuple[int, int] = (32, 32),
        int8: bool = False,
        mask: Tensor | None = None,
    ) -> SparseLinear:
        """The sparse form of a pruned Linear; shares its bias parameter, leaves it otherwise alone.

        Kept are the nonzeros, or what ``mask`` (bool, of the weight's shape) says; None takes the mask
        that trimtab.prune left beside the weight, if it did.

        Raises:
            TypeError: ``module`` is no nn.Linear.
            ValueError: unknown pattern, block or activation; a NaN (with int8 an Inf too), a weight
                that does not fit the pattern, or one that its own mask prunes and that isn't zero (the
                first position is named: nothing is pruned here); or the result would take more memory
                than the dense weight.
            RuntimeError: its weight is not float32, bfloat16 or float16, or a mask that is not its.
        """
        if not isinstance(module, nn.Linear):
            raise TypeError(f"SparseLinear: expected an nn.Linear, got {type(module).__name__}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = module.in_features, module.out_features
        layer.weight_shape, layer.groups = (module.out_features, module.in_features), 1
        layer._take_format(pattern, block, int8, module.weight.dtype, activation)
        layer._take_float(module, mask)
        return layer

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dense weight this layer stands for, computed on demand."""
        return self.float_weight()

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            # The op takes any K that rows of its bits have room for.
            raise RuntimeError(
                f"SparseLinear: expected x [..., {self.in_features}], got {list(x.shape)}"
            )
        return self._product(x)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}{self._described()}"
        )
