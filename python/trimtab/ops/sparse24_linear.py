"""Activations times a 2:4 weight on a CUDA device, whose tensor cores skip what is not kept."""

from typing import Any

import torch
from torch import Tensor

from . import library
from .bitmap_linear import expect_sparse
from .flops import register_flop_formula
from .int8_linear import activation_backward
from .sparse24_compress import compress_in_torch, sparse24_codes, sparse24_dense, sparse24_mask

_op = torch.ops.trimtab.sparse24_linear

# Rows of values start on whole 16 bytes.
ROW_BYTES = 16


def sparse24_linear(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    weight_scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """``act(x @ weight.T + bias)`` for a weight [N, K] of which every group of four columns keeps two.

    CUDA devices only, by ``mma.sp`` and ``wgmma.sp`` (PTX ISA); where CUDA C++ is missing by Triton,
    which writes tiles of the dense weight out. On a CPU a 2:4 weight is a bitmap weight, see
    bitmap_linear. Float values: products are exact and summed in float32, in an order that is the same
    in every run (NUMERICS.md section 7). int8 values: ``x`` is quantized to int8 row by row, and the
    result has the bits of int8_linear with the dense weight. A pruned weight contributes nothing:
    0 * Inf is not evaluated (by Triton it is).

    Args:
        x: bfloat16 or float16 [..., K], or any float with int8 values; any rank >= 1, any strides.
        values: the kept weights [N, K4 / 2], K4 = K rounded up to 4, of the dtype of ``x`` or int8, in
            rows that start on whole 16 bytes: see sparse24_rows.
        metadata: int32 [ceil(N / 16), ceil(K / 64), 32], from sparse24_metadata for this dtype.
        weight_scale: float32 [N] for int8 values, else None.
        bias: float32, bfloat16 or float16 [N], or None.
        activation: "none", "relu", "gelu", "gelu_tanh" or "silu".

    Returns [..., N] of the dtype of ``x``. Gradients flow to ``x``, to float ``values`` and to
    ``bias``.

    Raises:
        RuntimeError: wrong dtype or shape, a CPU tensor, a GPU older than compute capability 8.0, or a
            gradient is asked for of ``weight_scale``.
        ValueError: unknown activation.
    """
    code = library.activation_code("sparse24_linear", activation)
    if torch.is_grad_enabled():
        library.refuse_grad("sparse24_linear", weight_scale=weight_scale)
    return _op.default(x, values, metadata, weight_scale, bias, code)


# --- the format


def sparse24_rows(values: Tensor) -> Tensor:
    """``values`` [N, K4 / 2] in rows that start on whole 16 bytes: itself, or a wider copy's view."""
    each = ROW_BYTES // values.element_size()
    width = -(-values.shape[1] // each) * each
    return values if values.stride() == (width, 1) else _wide(values)


def _wide(values: Tensor) -> Tensor:
    N, kept = values.shape
    each = ROW_BYTES // values.element_size()
    wide = values.new_zeros(N, -(-kept // each) * each)
    wide[:, :kept].copy_(values)
    return wide[:, :kept]


def sparse24_metadata(indices: Tensor, K: int, dtype: torch.dtype) -> Tensor:
    """What the lanes of a warp hand to mma.sp: int32 [ceil(N / 16), ceil(K / 64), 32].

    ``indices`` uint8 [N, ceil(K4 / 8)]: four bits a group of four columns, the even group's in the
    lower half; the first kept position in the lower two bits, the second above. The words' layout is
    in csrc/include/trimtab/sparse24_linear.h, with its sources, and differs between int8 and the
    16-bit floats.

    Raises:
        RuntimeError: ``indices`` of another dtype or shape, ``dtype`` none of bfloat16, float16 and
            int8, or positions that do not rise within a group.
    """
    op = "sparse24_metadata"
    library.expect(
        dtype in (torch.bfloat16, torch.float16, torch.int8),
        f"{op}: expected dtype bfloat16, float16 or int8, got {dtype}",
    )
    bytes_a_row = -(-K // 8)
    library.expect(
        indices.dtype == torch.uint8 and indices.dim() == 2 and indices.shape[1] == bytes_a_row,
        f"{op}: expected indices [N, {bytes_a_row}] uint8 for K={K}, got "
        f"{library.describe(indices)}",
    )
    nibbles = sparse24_codes(indices, K).to(torch.int64)
    wrong = (nibbles & 3) >= (nibbles >> 2)
    if bool(wrong.any()):
        row, group = (int(i) for i in wrong.nonzero()[0])
        raise RuntimeError(
            f"{op}: expected two rising positions in a group, got {int(nibbles[row, group]) & 3} and "
            f"{int(nibbles[row, group]) >> 2} in row {row}, columns {4 * group} to {4 * group + 3}"
        )
    N, groups = nibbles.shape
    rows16, blocks = -(-N // 16), -(-K // 64)
    whole = nibbles.new_full((16 * rows16, 16 * blocks), 0b0100)  # positions 0 and 1
    whole[:N, :groups] = nibbles
    # bf16: [rows16, row half, row, block, 16 columns, group]; lane 4 row + columns, row half above.
    # int8: [rows16, row half, row, block, 32 columns, group]; lane 4 row + 2 columns + row half.
    each = 8 if dtype == torch.int8 else 4
    parts = whole.view(rows16, 2, 8, blocks, 16 // each, each)
    place = torch.arange(each, device=indices.device) * 4
    words = (parts << place).sum(-1)
    if dtype == torch.int8:
        lanes = words.permute(0, 3, 2, 4, 1)
    else:
        lanes = (words[:, 0] | words[:, 1] << 16).permute(0, 2, 1, 3)
    lanes = lanes.reshape(rows16, blocks, 32)
    return torch.where(lanes >= 2**31, lanes - 2**32, lanes).to(torch.int32)


def sparse24_pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Prunes ``weight`` [N, K] to 2:4 and packs it for sparse24_linear, in one pass on a GPU.

    Which weights stay: see sparse24_compress. A NaN ranks above every number, so it stays and is seen.

    Args:
        weight: bfloat16, float16 or int8 [N, K], any strides.

    Returns:
        values [N, K4 / 2], K4 = K rounded up to 4, in rows that start on whole 16 bytes, and metadata
        int32 [ceil(N / 16), ceil(K / 64), 32], as sparse24_linear takes them.

    Raises:
        RuntimeError: wrong rank or dtype, or ``weight`` requires grad.
    """
    if torch.is_grad_enabled():
        library.refuse_grad("sparse24_pack", weight=weight)
    return torch.ops.trimtab.sparse24_pack.default(weight)


def sparse24_pack_both(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sparse24_pack of ``weight`` [N, K] and of its transpose [K, N], from one pass over it.

    The transpose is pruned along N, by itself: for products with the weight and with its transpose, as
    forward and backward of a layer that is trained 2:4 have them. A weight with at most two nonzeros in
    each four of its rows and of its columns loses nothing either way.

    Returns (values, metadata, transposed values, transposed metadata).

    Raises: as sparse24_pack.
    """
    if torch.is_grad_enabled():
        library.refuse_grad("sparse24_pack_both", weight=weight)
    return torch.ops.trimtab.sparse24_pack_both.default(weight)


def _check_packed(weight: Tensor) -> None:
    library.expect(
        weight.dim() == 2 and weight.dtype in (torch.bfloat16, torch.float16, torch.int8),
        f"sparse24_pack: expected weight [N, K] of bfloat16, float16 or int8, got "
        f"{library.describe(weight)}",
    )


def _pack_in_torch(weight: Tensor) -> tuple[Tensor, Tensor]:
    _check_packed(weight)
    values, indices = compress_in_torch(weight)
    return _wide(values), sparse24_metadata(indices, weight.shape[1], weight.dtype)


def _pack_both_in_torch(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_pack_in_torch(weight), *_pack_in_torch(weight.t())


def _fake_pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    _check_packed(weight)
    N, K = weight.shape
    each = ROW_BYTES // weight.element_size()
    kept = (K + 3) // 4 * 2
    values = weight.new_empty(N, (kept + each - 1) // each * each)[:, :kept]
    return values, weight.new_empty((N + 15) // 16, (K + 63) // 64, 32, dtype=torch.int32)


def _fake_pack_both(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_fake_pack(weight), *_fake_pack(weight.t())


library.register_fake("trimtab::sparse24_pack")(_fake_pack)
library.register_fake("trimtab::sparse24_pack_both")(_fake_pack_both)
for _name, _function in {
    "sparse24_pack": _pack_in_torch,
    "sparse24_pack_both": _pack_both_in_torch,
}.items():
    library.implement(_name, _function, "CPU")
    library.implement(f"{_name}.torch", _function, "CUDA")


def sparse24_indices(metadata: Tensor, N: int, K: int, dtype: torch.dtype) -> Tensor:
    """The inverse of sparse24_metadata."""
    rows16, blocks, _ = metadata.shape
    words = metadata.to(torch.int64) & 0xFFFFFFFF
    if dtype == torch.int8:
        parts = words.view(rows16, blocks, 8, 2, 2).permute(0, 4, 2, 1, 3)
        each = 8
    else:
        lanes = words.view(rows16, blocks, 8, 4)
        parts = torch.stack([lanes & 0xFFFF, lanes >> 16], 1).permute(0, 1, 3, 2, 4)
        each = 4
    place = torch.arange(each, device=metadata.device) * 4
    nibbles = ((parts[..., None] >> place) & 15).reshape(16 * rows16, 16 * blocks)
    groups = -(-K // 4)
    nibbles[:, groups:] = 0
    pairs = nibbles[:N].view(N, 8 * blocks, 2)
    return (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8)[:, : -(-K // 8)].contiguous()


def _dense(values: Tensor, metadata: Tensor, scale: Tensor | None, K: int) -> Tensor:
    indices = sparse24_indices(metadata, values.shape[0], K, values.dtype)
    weight = sparse24_dense(values, indices, K)
    return weight if scale is None else weight.to(torch.float32) * scale[:, None]


# --- fake, gradients


def _fake(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    weight_scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: int = 0,
) -> Tensor:
    op = "sparse24_linear"
    library.expect(
        values.dim() == 2, f"{op}: expected values [N, K / 2], got {library.describe(values)}"
    )
    N = values.shape[0]
    expect_sparse(op, x, values, weight_scale, bias, N)
    K = x.shape[-1]
    library.expect(
        values.shape[1] == (K + 3) // 4 * 2,
        f"{op}: expected values [N, {(K + 3) // 4 * 2}] for K={K}, got {library.describe(values)}",
    )
    shape = ((N + 15) // 16, (K + 63) // 64, 32)
    library.expect(
        metadata.dtype == torch.int32 and tuple(metadata.shape) == shape,
        f"{op}: expected contiguous metadata {list(shape)} int32, got {library.describe(metadata)}",
    )
    return x.new_empty([*x.shape[:-1], N])


library.register_fake("trimtab::sparse24_linear")(_fake)
library.register_fake("trimtab::sparse24_linear.inference")(_fake)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, values, metadata, weight_scale, bias, activation = inputs
    ctx.activation = activation
    # x serves the gradient of the values, and with an activation the sum before it is computed again.
    needs_x = activation or ctx.needs_input_grad[1]
    ctx.save_for_backward(x if needs_x else None, values, metadata, weight_scale, bias)
    ctx.x_dtype, ctx.K = x.dtype, x.shape[-1]


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, values, metadata, weight_scale, bias = ctx.saved_tensors
    if ctx.activation:
        before = _op.default(x, values, metadata, weight_scale, bias, 0).to(torch.float32)
        grad = activation_backward(library.ACTIVATION_NAMES[ctx.activation], before, grad)
    grad = grad.to(ctx.x_dtype)
    grad_x = grad_values = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ _dense(values, metadata, weight_scale, ctx.K).to(ctx.x_dtype)
    if ctx.needs_input_grad[1]:
        dense = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, ctx.K)
        dense = torch.nn.functional.pad(dense, (0, -ctx.K % 4))
        indices = sparse24_indices(metadata, values.shape[0], ctx.K, values.dtype)
        grad_values = dense[sparse24_mask(indices, ctx.K)].view(values.shape)
    if bias is not None and ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(bias.dtype)
    return grad_x, grad_values, None, None, grad_bias, None


torch.library.register_autograd("trimtab::sparse24_linear", _backward, setup_context=_setup_context)

library.register_autocast(_op.default, weight=True)
library.register_autocast(_op.inference, weight=True)


@register_flop_formula(torch.ops.trimtab.sparse24_linear)
def _(x_shape: Any, values_shape: Any, *_: Any, **__: Any) -> int:
    """2 M for every kept weight."""
    rows = 1
    for size in x_shape[:-1]:
        rows *= size
    return 2 * rows * values_shape[0] * values_shape[1]
