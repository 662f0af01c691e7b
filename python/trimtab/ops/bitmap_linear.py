"""Activations times an unstructured sparse weight: its kept values and a bit mask."""

from typing import Any

import torch
from torch import Tensor

from . import library
from .flops import register_flop_formula
from .int8_linear import activation_backward

_op = torch.ops.trimtab.bitmap_linear


def bitmap_linear(
    x: Tensor,
    values: Tensor,
    bitmap: Tensor,
    row_start: Tensor,
    weight_scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """``act(x @ weight.T + bias)`` with the weight [N, K] of ``bitmap_pack``.

    Float values: accumulated in float32, in an order that is the same from run to run and for every
    thread count (NUMERICS.md section 7). A pruned weight contributes nothing: 0 * Inf is not evaluated.
    With several rows of ``x``, bfloat16 on AMX may take subnormals as zero, as its instruction does.
    int8 values: ``x`` is quantized to int8 row by row, and the result has the bits of int8_linear with
    the dense weight.

    Args:
        x: float32, bfloat16 or float16 [..., K], any rank >= 1, any strides.
        values: kept weights [kept] row by row, of the dtype of ``x`` or int8.
        bitmap: uint8 [N, 8 * ceil(K / 64)], column k is bit k % 8 of byte k // 8; bits past K are 0.
        row_start: int64 [N + 1], kept weights before each row. That it agrees with the bits is what
            bitmap_check tests, once, and not this function at every call.
        weight_scale: float32 [N] for int8 values, else None.
        bias: float32, bfloat16 or float16 [N], or None.
        activation: "none", "relu", "gelu", "gelu_tanh" or "silu".

    On a GPU up to 32 rows of ``x`` go through a kernel, of CUDA C++ or where that is missing of Triton,
    slowly where an Inf or NaN of ``x`` or a sum that overflows makes it count again; more go through
    the dense weight (ops/sparse_fallback.py), where 0 * Inf is evaluated.

    Returns [..., N] of the dtype of ``x``. Gradients flow to ``x``, to float ``values`` (a pruned model
    fine-tunes) and to ``bias``; for int8 values rounding counts as identity.

    Raises:
        RuntimeError: wrong dtype or shape, values that row_start does not count, or a gradient is asked
            for of ``weight_scale``.
        ValueError: unknown activation.
    """
    code = library.activation_code("bitmap_linear", activation)
    if torch.is_grad_enabled():
        library.refuse_grad("bitmap_linear", weight_scale=weight_scale)
    return _op.default(x, values, bitmap, row_start, weight_scale, bias, code)


# --- the format


def bitmap_row_bytes(K: int) -> int:
    """Bytes of a row of the bit mask: K bits in words of 64."""
    return (K + 63) // 64 * 8


def bitmap_pack(weight: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``weight`` [N, K] as (values [kept], bitmap uint8 [N, 8 * ceil(K / 64)], row_start [N + 1]).

    What is not zero is kept, or what ``mask`` (bool [N, K]) says, zeros included. On the device of
    ``weight``.

    Raises:
        RuntimeError: ``weight`` is not 2-D of float32, bfloat16, float16 or int8, or ``mask`` is not a
            bool of its shape.
    """
    library.expect(
        weight.dim() == 2 and weight.dtype in (*library.FLOAT_DTYPES, torch.int8),
        "bitmap_pack: expected weight [N, K] of float32, bfloat16, float16 or int8, got "
        f"{library.describe(weight)}",
    )
    keep = weight != 0 if mask is None else mask
    library.expect(
        keep.dtype == torch.bool and keep.shape == weight.shape,
        f"bitmap_pack: expected mask of {list(weight.shape)} bool, got {library.describe(keep)}",
    )
    N, K = weight.shape
    bits = torch.zeros(N, bitmap_row_bytes(K) * 8, dtype=torch.uint8, device=weight.device)
    bits[:, :K] = keep
    place = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=weight.device)
    bitmap = (bits.view(N, bitmap_row_bytes(K), 8) * place).sum(-1, dtype=torch.uint8)
    return weight[keep], bitmap, _row_start(keep.sum(1))


def _row_start(counts: Tensor) -> Tensor:
    start = counts.new_zeros(counts.shape[0] + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=start[1:])
    return start


def bitmap_mask(bitmap: Tensor, K: int) -> Tensor:
    """The bits as bool [N, K]."""
    place = torch.arange(8, dtype=torch.uint8, device=bitmap.device)
    return (bitmap[:, :, None] >> place).bitwise_and(1).flatten(1)[:, :K].to(torch.bool)


def bitmap_unpack(values: Tensor, bitmap: Tensor, K: int) -> Tensor:
    """The dense weight [N, K] of ``values``' dtype, zeros where nothing is kept."""
    mask = bitmap_mask(bitmap, K)
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(
        mask, values
    )


def bitmap_counts(bitmap: Tensor) -> Tensor:
    """Kept weights of each row, int64 [N]."""
    each = torch.tensor([bin(byte).count("1") for byte in range(256)], device=bitmap.device)
    return each[bitmap.to(torch.int64)].sum(1)


def bitmap_check(
    values: Tensor,
    bitmap: Tensor,
    row_start: Tensor | None = None,
    K: int | None = None,
    op: str = "bitmap_check",
) -> Tensor:
    """Refuses parts that do not fit each other; returns row_start, int64 [N + 1].

    For what comes from a file, before bitmap_linear sees it. ``K``, if it is known, also asks for the
    right width and for zeros past K. ``op`` names the caller in messages.

    Raises:
        RuntimeError: wrong dtype or shape, a bit past K, another number of bits than of values, or a
            ``row_start`` that does not count the bits.
    """
    library.expect(
        bitmap.dtype == torch.uint8 and bitmap.dim() == 2 and bitmap.shape[1] % 8 == 0,
        f"{op}: expected bitmap uint8 [N, 8 * ceil(K / 64)], got {library.describe(bitmap)}",
    )
    if K is not None:
        library.expect(
            bitmap.shape[1] == bitmap_row_bytes(K),
            f"{op}: expected bitmap [N, {bitmap_row_bytes(K)}] for K={K}, got "
            f"{library.describe(bitmap)}",
        )
        past = bitmap_mask(bitmap[:, K // 64 * 8 :], 64)[:, K % 64 :] if K % 64 else bitmap[:, :0]
        if bool(past.any()):
            row = int(past.any(1).nonzero()[0])
            raise RuntimeError(f"{op}: expected no bit past K={K}, found one in row {row}")
    library.expect(
        values.dim() == 1, f"{op}: expected values [kept], got {library.describe(values)}"
    )
    counted = _row_start(bitmap_counts(bitmap))
    library.expect(
        int(counted[-1]) == values.numel(),
        f"{op}: expected as many values as bits that are set, got {values.numel()} values and "
        f"{int(counted[-1])} bits",
    )
    if row_start is not None:
        library.expect(
            row_start.dtype == torch.int64 and row_start.shape == counted.shape,
            f"{op}: expected row_start int64 [N + 1={len(counted)}], got "
            f"{library.describe(row_start)}",
        )
        wrong = row_start != counted
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            raise RuntimeError(
                f"{op}: expected row_start[{at}] to be the {int(counted[at])} bits set before row "
                f"{at}, got {int(row_start[at])}"
            )
    return counted


# --- fake, gradients


def _fake(
    x: Tensor,
    values: Tensor,
    bitmap: Tensor,
    row_start: Tensor,
    weight_scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: int = 0,
) -> Tensor:
    library.expect(
        bitmap.dtype == torch.uint8 and bitmap.dim() == 2,
        f"bitmap_linear: expected bitmap of 2-D uint8, got {library.describe(bitmap)}",
    )
    N = bitmap.shape[0]
    expect_sparse("bitmap_linear", x, values, weight_scale, bias, N)
    K = x.shape[-1]
    library.expect(
        bitmap.shape[1] == bitmap_row_bytes(K),
        f"bitmap_linear: expected a contiguous bitmap [N, {bitmap_row_bytes(K)}] for K={K}, got "
        f"{library.describe(bitmap)}",
    )
    library.expect(
        row_start.dtype == torch.int64 and row_start.dim() == 1 and row_start.shape[0] == N + 1,
        f"bitmap_linear: expected row_start int64 [N + 1={N + 1}], got "
        f"{library.describe(row_start)}",
    )
    library.expect(
        values.dim() == 1, f"bitmap_linear: expected values [kept], got {library.describe(values)}"
    )
    return x.new_empty([*x.shape[:-1], N])


def expect_sparse(
    op: str, x: Tensor, values: Tensor, weight_scale: Tensor | None, bias: Tensor | None, N: int
) -> None:
    """What the sparse products ask of the operands they share; for fakes."""
    library.expect_float(op, "x", x)
    library.expect(
        x.dim() >= 1, f"{op}: expected x of at least one dimension, got {library.describe(x)}"
    )
    int8 = values.dtype == torch.int8
    library.expect(
        int8 or values.dtype == x.dtype,
        f"{op}: expected values of int8 or of the dtype of x, {str(x.dtype).removeprefix('torch.')}"
        f", got {library.describe(values)}",
    )
    library.expect(
        int8 or weight_scale is None, f"{op}: expected weight_scale with int8 values alone"
    )
    if int8:
        library.expect(
            weight_scale is not None
            and weight_scale.dtype == torch.float32
            and weight_scale.dim() == 1
            and weight_scale.shape[0] == N,
            f"{op}: expected weight_scale [N={N}] float32 for int8 values, got "
            f"{'None' if weight_scale is None else library.describe(weight_scale)}",
        )
    if bias is not None:
        library.expect_float(op, "bias", bias)
        library.expect(
            bias.dim() == 1 and bias.shape[0] == N,
            f"{op}: expected a contiguous bias [N={N}], got {library.describe(bias)}",
        )


for _overload in ("", ".inference", ".triton", ".dense"):
    library.register_fake(f"trimtab::bitmap_linear{_overload}")(_fake)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, values, bitmap, row_start, weight_scale, bias, activation = inputs
    ctx.activation = activation
    # x serves the gradient of the values, and with an activation the sum before it is computed again.
    needs_x = activation or ctx.needs_input_grad[1]
    saved = (x if needs_x else None, values, bitmap, row_start, weight_scale, bias)
    ctx.save_for_backward(*saved)
    ctx.x_dtype, ctx.K = x.dtype, x.shape[-1]


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, values, bitmap, row_start, weight_scale, bias = ctx.saved_tensors
    if ctx.activation:
        before = _op.default(x, values, bitmap, row_start, weight_scale, bias, 0)
        grad = activation_backward(
            library.ACTIVATION_NAMES[ctx.activation], before.to(torch.float32), grad
        )
    grad = grad.to(ctx.x_dtype)
    grad_x = grad_values = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = bitmap_unpack(values, bitmap, ctx.K)
        if weight_scale is not None:
            weight = (weight.to(torch.float32) * weight_scale[:, None]).to(ctx.x_dtype)
        grad_x = grad @ weight
    if ctx.needs_input_grad[1]:
        dense = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, ctx.K)
        grad_values = kept_of(dense, bitmap, ctx.K, values)
    if bias is not None and ctx.needs_input_grad[5]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(bias.dtype)
    return grad_x, grad_values, None, None, None, grad_bias, None


def kept_of(dense: Tensor, bitmap: Tensor, K: int, values: Tensor) -> Tensor:
    """The elements of ``dense`` that the bits keep."""
    # Their number is known: nonzero_static keeps the graph free of guesses.
    at = torch.nonzero_static(bitmap_mask(bitmap, K).reshape(-1), size=values.shape[0])
    return dense.reshape(-1)[at[:, 0]]


torch.library.register_autograd("trimtab::bitmap_linear", _backward, setup_context=_setup_context)


library.register_autocast(_op.default, weight=True)
library.register_autocast(_op.inference, weight=True)


@register_flop_formula(torch.ops.trimtab.bitmap_linear)
def _(x_shape: Any, values_shape: Any, *_: Any, **__: Any) -> int:
    """2 M for every kept weight."""
    rows = 1
    for size in x_shape[:-1]:
        rows *= size
    return 2 * rows * values_shape[0]
