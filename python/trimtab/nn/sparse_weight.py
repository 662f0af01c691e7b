"""What the sparse layers share: a compressed weight, a canonical checkpoint, the product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import library
from ..ops.sparse24_compress import first_true
from ..ops.sparse24_linear import sparse24_metadata, sparse24_rows
from . import sparse_format
from .sparse_format import PATTERNS, RESIDENT, SAVED, Parts

# Of the checkpoint below; raised when its meaning changes.
FORMAT_VERSION = 1

# Devices whose tensor cores take 2:4 weights themselves; elsewhere one is a bitmap weight.
TENSOR_CORES = ("cuda",)

_bitmap = torch.ops.trimtab.bitmap_linear
_conv = torch.ops.trimtab.bitmap_conv2d
_sparse24 = torch.ops.trimtab.sparse24_linear
_block = torch.ops.trimtab.block_linear


def _wants_grad(x: Tensor, values: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (
        x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    )


def own_mask(module: nn.Module) -> Tensor | None:
    """The mask that trimtab.prune keeps beside a weight; None if there is none."""
    mask, weight = module._buffers.get("weight_mask"), module._parameters.get("weight")
    if mask is None or weight is None or mask.dtype != torch.bool or mask.shape != weight.shape:
        return None
    return mask


class SparseWeight(nn.Module):
    """A module that holds a sparse weight once, compressed, in the order that checkpoints have it.

    ``values`` are the kept weights: a parameter where they are floating point, so that they train in
    place, a buffer where they are int8. Which ones are kept does not change in training.

    Tensors: pattern "bitmap" and "2:4": ``values`` [kept], ``bitmap`` uint8 [O, 8 ceil(K / 64)] (bit k
    of a row: weight k is kept) and ``row_start`` int64 [O + 1]; "block": ``values`` [blocks, bn, bk],
    ``crow`` and ``col`` int32 as torch.sparse_bsr has them; ``weight_scale`` float32 [O] with int8.
    On a GPU a 2:4 weight of bfloat16, float16 or int8 has ``metadata`` besides, for its tensor cores.
    O rows are output channels; K is the product of weight_shape's other sizes.

    state_dict, the same on every device: ``values``, ``bitmap`` or ``indices`` (2:4: values [O, K' / 2]
    and sparse24_compress's indices) or ``crow`` and ``col``, ``weight_scale``, ``bias``, and
    ``sparse_format`` int32: version, number of the pattern, weight_shape. It passes safetensors and
    ``torch.load(weights_only=True)``. A checkpoint whose parts disagree is refused and changes nothing.
    """

    values: Tensor
    weight_scale: Tensor
    weight_shape: tuple[int, ...]  # [N, K], [O, C / groups, kh, kw]
    pattern: str
    block: tuple[int, int]
    int8: bool
    groups: int
    dtype: torch.dtype
    activation: str
    _code: int

    # --- construction

    def _take_format(
        self, pattern: str, block: tuple[int, int], int8: bool, dtype: torch.dtype, activation: str
    ) -> None:
        name = type(self).__name__
        sparse_format.check_pattern(name, pattern, block)
        self._code = library.activation_code(name, activation)
        self.pattern, self.block, self.int8 = pattern, (block[0], block[1]), bool(int8)
        self.dtype, self.activation = dtype, activation

    def _set_empty(self, device: torch.device | str | None, bias: bool) -> None:
        """Nothing kept, and a bias of zeros."""
        self._set_parts(self._empty(device))
        N = self.weight_shape[0]
        zeros = torch.zeros(N, dtype=self.dtype, device=device) if bias else None
        self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros))

    def _empty(self, device: torch.device | str | None) -> Parts:
        N, K, rows = self._sizes()
        args = (self.pattern, self.block, self.int8, N, K, rows, self.dtype, device)
        return sparse_format.empty(*args)

    def _take_float(self, module: Any, mask: Tensor | None) -> None:
        """Packs a float layer's weight, by its own mask if none is given; shares its bias."""
        weight, name = module.weight, type(self).__name__
        if mask is None and (mask := own_mask(module)) is not None:
            if wrong := first_true((weight.detach() != 0) & ~mask):
                raise sparse_format.DoesNotFit(
                    f"{name}: expected zeros where weight_mask prunes, got weight{wrong}: hold_ the "
                    "mask in training, or finalize_"
                )
        args = (self.block, self.int8, mask, self.groups)
        parts = sparse_format.pack(name, weight, self.pattern, *args)
        self._set_parts(parts, weight.requires_grad)
        self.register_parameter("bias", module.bias)
        self.train(module.training)

    def _set_parts(self, parts: Parts, requires_grad: bool = True) -> None:
        values = parts["values"]
        if self.int8:
            self.register_buffer("values", values, persistent=False)
            self.register_buffer("weight_scale", parts["weight_scale"], persistent=False)
        else:
            self.register_parameter("values", nn.Parameter(values, requires_grad))
        for name in RESIDENT[self.pattern]:
            self.register_buffer(name, parts[name], persistent=False)
        self._derive()

    def _sizes(self) -> tuple[int, int, int]:
        """(O, K, rows of the matrix: O and in blocks what pads each group)."""
        N = self.weight_shape[0]
        K = 1
        for length in self.weight_shape[1:]:
            K *= length
        if self.pattern != "block" or self.groups == 1:
            return N, K, N
        each = N // self.groups
        return N, K, self.groups * (each + -each % self.block[0])

    def _derive(self) -> None:
        """What follows from the other tensors: metadata, and where each group's values begin.

        The latter as Python numbers, which slices of a compiled graph need.
        """
        values = self.values
        self._buffers.pop("metadata", None)
        on_cores = self.pattern == "2:4" and values.device.type in TENSOR_CORES and self.groups == 1
        if on_cores and values.dtype in (torch.bfloat16, torch.float16, torch.int8):
            _, K, _ = self._sizes()
            indices = sparse_format.bitmap_to_indices(self._buffers["bitmap"], K)  # type: ignore[arg-type]
            metadata = sparse24_metadata(indices, K, values.dtype)
            self.register_buffer("metadata", metadata, persistent=False)
        self._starts: tuple[int, ...] = ()
        structure = self._buffers["crow" if self.pattern == "block" else "row_start"]
        assert structure is not None
        if self.groups > 1 and structure.device.type != "meta":
            each = (structure.shape[0] - 1) // self.groups
            self._starts = tuple(structure[:: max(each, 1)].tolist())

    # --- what it holds

    def parts(self) -> Parts:
        """The resident tensors by name; ``values`` is the parameter itself."""
        more = (name for name in ("weight_scale", "metadata") if name in self._buffers)
        names = (*RESIDENT[self.pattern], *more)
        return {name: getattr(self, name) for name in ("values", *names)}

    @property
    def sparsity(self) -> float:
        """Share of the weights that is not kept."""
        total = torch.Size(self.weight_shape).numel()
        return max(0.0, 1 - self.values.numel() / total) if total else 0.0

    def float_weight(self) -> Tensor:
        """The dense weight in ``dtype``; a new tensor, differentiable in ``values``."""
        N, K, rows = self._sizes()
        matrix = sparse_format.dense_matrix(self.parts(), self.pattern, rows, K)
        if rows != N:
            each = N // self.groups
            matrix = matrix.reshape(self.groups, -1, K)[:, :each].reshape(N, K)
        if self.int8:
            matrix = (matrix.to(torch.float32) * self.weight_scale[:, None]).to(self.dtype)
        return matrix.reshape(self.weight_shape)

    def resident_bytes(self) -> int:
        """Bytes of the weight, what says where its values stand, and the bias."""
        bias = self._parameters.get("bias")
        return sparse_format.size(self.parts() | ({} if bias is None else {"bias": bias}))

    def _described(self) -> str:
        block = f", block={self.block}" if self.pattern == "block" else ""
        int8 = ", int8=True" if self.int8 else ""
        act = "" if self.activation == "none" else f", activation={self.activation}"
        return f", pattern={self.pattern}{block}{int8}, sparsity={self.sparsity:.3f}{act}"

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws kept weights and bias anew as torch.nn.Linear does; which are kept stays.

        RuntimeError for int8 values.
        """
        name = type(self).__name__
        library.expect(not self.int8, f"{name}.reset_parameters: expected float values, got int8")
        bound = max(self._sizes()[1], 1) ** -0.5
        for parameter in self._parameters.values():
            if parameter is not None:
                parameter.uniform_(-bound, bound)

    # --- the product

    def _product(self, x: Tensor, group: int | None = None) -> Tensor:
        """act(x [..., K] @ weight.T + bias), of all output channels or of one group's."""
        # Plain dict look-ups: nn.Module's attribute access costs 0.3 us each.
        buffers = self._buffers
        bias: Tensor | None = self._parameters["bias"]
        values: Any = buffers["values"] if self.int8 else self._parameters["values"]
        in_blocks = self.pattern == "block"
        starts, more = (
            buffers["crow" if in_blocks else "row_start"],
            buffers["col" if in_blocks else "bitmap"],
        )
        scale = buffers["weight_scale"] if self.int8 else None
        N = self.weight_shape[0]
        if "metadata" in buffers:
            rows = sparse24_rows(values.view(N, values.numel() // max(N, 1)))
            return _sparse24.default(x, rows, buffers["metadata"], scale, bias, self._code)
        if group is not None:
            values, starts, more, scale, bias, N = self._group(group, values, starts, more, scale)
        wanted = _wants_grad(x, values, bias)
        if in_blocks:
            op = _block.default if wanted else _block.inference
            return op(x, values, starts, more, scale, bias, self._code, N)
        if self.pattern == "2:4" and x.shape[-1] % 4 == 1:
            # The second weight kept of the last group stands in its padding.
            x = torch.nn.functional.pad(x, (0, 3))
        op = _bitmap.default if wanted else _bitmap.inference
        return op(x, values, more, starts, scale, bias, self._code)

    def _has_float_bits(self) -> bool:
        """Whether the resident form is float values and the bits of exactly K columns."""
        # 2:4 may keep a second weight of the last group in its padding (see _product).
        K = self._sizes()[1]
        return not self.int8 and self.pattern != "block" and (self.pattern != "2:4" or K % 4 != 1)

    def _convolve(self, x: Tensor, conv: tuple) -> Tensor:
        """act(conv2d(x [B, C, H, W], weight) + bias); conv: kernel to groups, for _has_float_bits."""
        bias: Any = self._parameters["bias"]
        values: Any = self._parameters["values"]
        parts = (values, self._buffers["bitmap"], self._buffers["row_start"], bias)
        op = _conv.default if _wants_grad(x, values, bias) else _conv.inference
        return op(x, *parts, *conv, self._code)

    def _group(
        self, group: int, values: Any, starts: Any, more: Any, scale: Tensor | None
    ) -> tuple[Any, Any, Any, Tensor | None, Tensor | None, int]:
        """The part of each tensor that is one group's, and its number of output channels."""
        N = self.weight_shape[0] // self.groups
        begin, end = self._starts[group], self._starts[group + 1]
        each = (starts.shape[0] - 1) // self.groups
        starts = starts[group * each : (group + 1) * each + 1] - begin
        more = more[begin:end] if self.pattern == "block" else more[group * N : (group + 1) * N]
        bias: Tensor | None = self._parameters["bias"]
        channels = slice(group * N, (group + 1) * N)
        scale = None if scale is None else scale[channels]
        bias = None if bias is None else bias[channels]
        return values[begin:end], starts, more, scale, bias, N

    # --- moves and checkpoints

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseWeight:
        """Moves; scales stay float32. Out of meta comes an empty weight, to load a checkpoint into."""
        device = self.values.device
        probe = fn(torch.empty(0, dtype=self.dtype, device=device))
        scale = self._buffers.pop("weight_scale") if self.int8 else None
        structure = {name: self._buffers[name] for name in RESIDENT[self.pattern]}
        try:
            super()._apply(fn, recurse)
            self.dtype = probe.dtype
            if scale is not None:
                moved = fn(scale)  # may cast: take its device alone
                scale = moved if moved.dtype == scale.dtype else scale.to(moved.device)
        finally:
            if self.int8:
                self._buffers["weight_scale"] = scale
        # to_empty leaves any bytes: none of them may lead a kernel out of bounds.
        if device.type == "meta" and probe.device.type != "meta":
            self._take(self._empty(probe.device), assign=False)
        elif probe.device.type != "meta":
            for name, old in structure.items():
                if (new := self._buffers[name]) is not old:
                    new.copy_(old)  # type: ignore[union-attr,arg-type]
        self._derive()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        N, K, _ = self._sizes()
        parts = self.parts()
        if not keep_vars:
            parts["values"] = parts["values"].detach()
        for name, part in sparse_format.saved_form(parts, self.pattern, N, K).items():
            destination[prefix + name] = part
        facts = [FORMAT_VERSION, PATTERNS.index(self.pattern), *self.weight_shape]
        destination[prefix + "sparse_format"] = torch.tensor(
            facts, dtype=torch.int32, device=self.values.device
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
        scales = ("weight_scale",) if self.int8 else ()
        names = ("values", *SAVED[self.pattern], *scales, "sparse_format")
        own: dict[str, Any] = {name: state_dict.get(prefix + name) for name in names}
        missing = [prefix + name for name, value in own.items() if value is None]
        rest = {k: v for k, v in state_dict.items() if k.removeprefix(prefix) not in own}
        parts: Parts | None = None
        if len(missing) < len(own) or prefix + "weight" in state_dict:
            try:
                parts = self._checked(own, missing, state_dict.get(prefix + "weight"))
            except RuntimeError as problem:
                # Nothing of this layer is loaded, the bias neither.
                error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {problem}")
                return
        # nn.Module looks for each parameter itself: values' size is the checkpoint's to say.
        values = self._parameters.pop("values", None)
        problems = len(error_msgs)
        try:
            super()._load_from_state_dict(
                rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        finally:
            if values is not None:
                self._parameters = {"values": values, **self._parameters}
        if parts is None:
            missing_keys.extend(missing if strict else [])
            return
        if len(error_msgs) > problems:  # the bias does not fit: nothing is taken
            return
        self._take(parts, bool(local_metadata.get("assign_to_params_buffers")))

    def _checked(self, own: dict[str, Any], missing: list[str], dense: Tensor | None) -> Parts:
        """The resident tensors of a checkpoint's entries; RuntimeError says why they cannot be."""
        if dense is not None:
            raise RuntimeError(
                f"expected a {self.pattern} weight, got a dense one, {library.describe(dense)}: load a "
                "dense checkpoint into the dense model, before swap_"
            )
        version = own["sparse_format"]
        if version is not None:
            library.expect(
                isinstance(version, Tensor) and version.layout == torch.strided,
                f"expected sparse_format as a dense tensor, got {type(version).__name__}",
            )
            library.expect(
                version.dtype == torch.int32 and version.dim() == 1 and version.numel() >= 2,
                f"expected sparse_format int32 [{2 + len(self.weight_shape)}], got "
                f"{library.describe(version)}",
            )
            if version.device.type != "meta":
                self._check_facts(version.tolist())
        library.expect(not missing, f"expected {', '.join(missing)} beside the others")
        saved = {name: part for name, part in own.items() if name != "sparse_format"}
        return sparse_format.check_saved(saved, self.pattern, self.block, self.int8, *self._sizes())

    def _check_facts(self, facts: list[int]) -> None:
        version, number, *shape = facts
        library.expect(
            version == FORMAT_VERSION, f"expected format version {FORMAT_VERSION}, got {version}"
        )
        got = PATTERNS[number] if 0 <= number < len(PATTERNS) else f"number {number}"
        library.expect(got == self.pattern, f"expected pattern {self.pattern}, got {got}")
        library.expect(
            tuple(shape) == self.weight_shape,
            f"expected a weight of shape {list(self.weight_shape)}, got {shape}",
        )

    def _take(self, parts: Parts, assign: bool) -> None:
        """Makes checked tensors its own; the parameter stays the same object unless it is assigned."""
        device = self.values.device
        if assign and parts["values"].device.type != "meta":
            device = parts["values"].device
        copy = not assign
        for name in (*RESIDENT[self.pattern], *(("weight_scale",) if self.int8 else ())):
            self._buffers[name] = parts[name].to(device, copy=copy).contiguous()
        values = parts["values"].detach()
        if self.int8:
            self._buffers["values"] = values.to(device, copy=copy).contiguous()
        elif assign:
            requires_grad = self.values.requires_grad
            self._parameters["values"] = nn.Parameter(values.contiguous(), requires_grad)
        elif values.shape == self.values.shape:
            with torch.no_grad():
                self.values.copy_(values)
        else:
            # The same parameter, of another size: its gradient is no longer one.
            dtype = self.values.dtype
            self.values.data = values.to(device, dtype, copy=True).contiguous()
            self.values.grad = None
        self._derive()
