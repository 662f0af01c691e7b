"""What every int8 layer shares: one resident weight, a canonical checkpoint, moves between devices."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops

# Of the checkpoint below; raised when its meaning changes.
FORMAT_VERSION = 1

# GPUs read a weight 16 bytes at a time, and their copy engine (TMA) takes no other distance of rows.
ROW_BYTES = 16


def padded_rows(weight: Tensor) -> Tensor:
    """int8 ``weight`` [N, K] in rows that start on whole 16 bytes: itself, or a view of a wider copy.

    The bytes between K and the next row are zeros, and no part of the tensor.
    """
    N, K = weight.shape
    width = -(-K // ROW_BYTES) * ROW_BYTES
    if width == K or N == 0:
        return weight.contiguous()
    if weight.stride() == (width, 1):
        return weight
    wide = weight.new_zeros(N, width)
    wide[:, :K].copy_(weight)
    return wide[:, :K]


class Int8Weight(nn.Module):
    """A module that holds an int8 weight once, in the layout its device's kernels read.

    Buffers: ``packed`` (on a CPU the 1-D packed form, elsewhere ``weight_shape``, a matrix with the
    rows of padded_rows) and ``weight_scale`` (float32 whatever ``.to(dtype)`` says). ``dtype`` is the
    one the float weight had; ``.to(dtype)`` changes it.

    state_dict is the same on every device: ``weight`` int8, ``weight_scale`` float32,
    ``bias`` if there is one, and ``int8_format`` int32 [1], the version. It passes safetensors and
    ``torch.load(weights_only=True)``.
    """

    packed: Tensor
    weight_scale: Tensor
    weight_shape: tuple[int, ...]  # [N, K], [O, C, kh, kw], ...: one scale for each of the first
    dtype: torch.dtype

    def set_weight(self, weight: Tensor, weight_scale: Tensor) -> None:
        """Takes an int8 ``weight`` and its float32 scale, on the device they are on."""
        self.register_buffer("packed", self._resident(weight), persistent=False)
        self.register_buffer("weight_scale", weight_scale.contiguous(), persistent=False)

    def _resident(self, weight: Tensor) -> Tensor:
        """A plain int8 weight in the layout that the kernels of its device read."""
        return self._pack(weight) if weight.device.type == "cpu" else self._plain(weight)

    def _plain(self, weight: Tensor) -> Tensor:
        """The layout of a device that has no packed form."""
        return weight.contiguous()

    def _pack(self, weight: Tensor) -> Tensor:
        """The CPU kernels' form of a plain weight; 1-D if it differs from the plain one."""
        return ops.int8_pack(weight)

    def _unpack(self, packed: Tensor) -> Tensor:
        """The inverse of _pack for a 1-D form."""
        N, K = self.weight_shape
        return ops.int8_unpack(packed, N, K)

    def int8_weight(self) -> Tensor:
        """The int8 weight of ``weight_shape``; a copy where the resident one is packed."""
        return self.packed if self.packed.dim() != 1 else self._unpack(self.packed)

    def float_weight(self) -> Tensor:
        """The float weight this one stands for, in ``dtype``; a new tensor at every call."""
        scale = self.weight_scale.reshape(-1, *[1] * (len(self.weight_shape) - 1))
        return (self.int8_weight().to(torch.float32) * scale).to(self.dtype)

    def resident_bytes(self) -> int:
        """Bytes the weight, its scale and the bias occupy."""
        bias = self._parameters.get("bias")
        tensors = [self.weight_scale, *([] if bias is None else [bias])]
        packed = self.packed
        weight = packed.numel() if packed.is_contiguous() else packed.shape[0] * packed.stride(0)
        return weight + sum(t.numel() * t.element_size() for t in tensors)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int8Weight":
        """Moves; keeps the scale float32 and the weight in the layout of the device it arrives on."""
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.packed.device))
        weight, scale = self.packed, self.weight_scale
        if (probe.device.type == "cpu") != (weight.dim() == 1) and weight.device != probe.device:
            weight = self.int8_weight()
        del self._buffers["packed"], self._buffers["weight_scale"]
        try:
            super()._apply(fn, recurse)
            weight = fn(weight)
            # fn may cast floats: take its device and layout, not its dtype.
            moved = fn(scale)
            scale = moved if moved.dtype == scale.dtype else scale.to(moved.device)
            self.dtype = probe.dtype
            if weight.dim() != 1:
                weight = self._resident(weight)
        finally:
            self._buffers["packed"], self._buffers["weight_scale"] = weight, scale
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.int8_weight().contiguous()
        destination[prefix + "weight_scale"] = self.weight_scale
        destination[prefix + "int8_format"] = torch.tensor(
            [FORMAT_VERSION], dtype=torch.int32, device=self.packed.device
        )

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
        names = ("weight", "weight_scale", "int8_format")
        own: dict[str, Any] = {name: state_dict.get(prefix + name) for name in names}
        missing = [prefix + name for name, value in own.items() if value is None]
        present = len(missing) < len(own)
        rest = {k: v for k, v in state_dict.items() if k.removeprefix(prefix) not in own}
        problem = self._checkpoint_problem(own, missing) if present else ""
        if problem:
            # Nothing of this layer is loaded, the bias neither.
            error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {problem}")
            return
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not present:
            missing_keys.extend(missing if strict else [])
            return
        device = self.packed.device
        if local_metadata.get("assign_to_params_buffers") and own["weight"].device.type != "meta":
            device = own["weight"].device
        self.set_weight(
            own["weight"].to(device), own["weight_scale"].to(device, torch.float32, copy=True)
        )
        if self.packed is own["weight"] and not local_metadata.get("assign_to_params_buffers"):
            self.packed = (
                self.packed.clone()
            )  # neither packed nor moved: still the checkpoint's own

    def _checkpoint_problem(self, own: dict[str, Tensor], missing: list[str]) -> str:
        """Why these entries cannot be this layer's weight; empty if they can."""
        weight, scale, version = own["weight"], own["weight_scale"], own["int8_format"]
        if weight is not None and weight.is_floating_point():
            return (
                f"expected an int8 weight, got {str(weight.dtype).removeprefix('torch.')}: load a "
                "float checkpoint into the float model, before swap_"
            )
        if missing:
            return f"expected {', '.join(missing)} beside the others"
        if version.dtype != torch.int32 or version.numel() != 1:
            return f"expected int8_format int32 [1], got {ops.library.describe(version)}"
        if version.device.type != "meta" and int(version) != FORMAT_VERSION:
            return f"expected format version {FORMAT_VERSION}, got {int(version)}"
        if weight.dtype != torch.int8 or tuple(weight.shape) != self.weight_shape:
            return f"expected weight {list(self.weight_shape)} int8, got {ops.library.describe(weight)}"
        if scale.dtype != torch.float32 or scale.shape != self.weight_scale.shape:
            return (
                f"expected weight_scale {list(self.weight_scale.shape)} float32, got "
                f"{ops.library.describe(scale)}"
            )
        return ""
