"""What the launchers of the int8 products check about their operands, and say when it is wrong."""

from __future__ import annotations

import torch

# Kernels reach into a tile of out, at most 256 rows or columns, with 32-bit offsets.
OUT_STRIDE_LIMIT = 2**23

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def describe(t: torch.Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)} on {t.device}"


def check_tensor(
    op: str,
    name: str,
    t: torch.Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """ValueError unless ``t`` has this shape, one of these dtypes, and lies on this device."""
    if tuple(t.shape) != shape or t.dtype not in dtypes or t.device != device:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{op}: expected {name} {names} {shape} on {device}, got {describe(t)}")


def check_matrix(op: str, name: str, t: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """ValueError unless ``t`` is a matrix of one of these dtypes."""
    if t.dim() != 2 or t.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{op}: expected {name} {names} of rank 2, got {describe(t)}")


def out_tensor(
    op: str,
    out: torch.Tensor | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES,
) -> torch.Tensor:
    """``out``, checked, or a new tensor of ``dtype``. A given ``out`` brings its own dtype."""
    if out is not None:
        check_tensor(op, "out", out, shape, dtypes, device)
        for size, stride in zip(shape, out.stride(), strict=True):
            if size > 1 and stride >= OUT_STRIDE_LIMIT:
                raise ValueError(
                    f"{op}: expected strides of out below {OUT_STRIDE_LIMIT}, got {out.stride()}"
                )
        return out
    if dtype not in dtypes:
        names = "fp32, bf16, fp16 or int8" if torch.int8 in dtypes else "fp32, bf16 or fp16"
        raise ValueError(f"{op}: expected out_dtype {names}, got {dtype}")
    return torch.empty(shape, dtype=dtype, device=device)


def check_out_scale(op: str, out: torch.Tensor, out_scale: torch.Tensor | None) -> None:
    """ValueError unless int8 ``out`` comes with one fp32 scale, and other dtypes with none."""
    if out_scale is None:
        if out.dtype == torch.int8:
            raise ValueError(f"{op}: expected out_scale float32 (1,) for int8 out, got None")
        return
    if out.dtype != torch.int8:
        raise ValueError(f"{op}: expected out_scale with int8 out alone, got one with {out.dtype}")
    check_tensor(op, "out_scale", out_scale, (1,), (torch.float32,), out.device)


def check_scale(
    op: str, scale: torch.Tensor | None, N: int, int8: bool, device: torch.device
) -> None:
    """ValueError unless int8 values come with a scale an output, and others with none."""
    if int8 and scale is not None:
        check_tensor(op, "weight_scale", scale, (N,), (torch.float32,), device)
    elif int8:
        raise ValueError(f"{op}: expected weight_scale float32 ({N},) for int8 values, got None")
    elif scale is not None:
        raise ValueError(f"{op}: expected weight_scale with int8 values alone")


def check_bias(op: str, bias: torch.Tensor | None, N: int, device: torch.device) -> None:
    """ValueError unless there is none or one of [N] floats."""
    if bias is not None:
        check_tensor(op, "bias", bias, (N,), FLOAT_DTYPES, device)
