"""A call of a C function of csrc/cuda on the SIMT machine: its arguments, its memory, its errors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import simt_build
import torch
from torch import Tensor

POLICIES = {"late": 0, "random": 1, "early": 2, "by-seed": -1}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}


class Epilogue(ctypes.Structure):
    """tt_epilogue of csrc/include/trimtab/int8_mm.h."""

    _fields_ = (
        ("b_scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("bias_dtype", ctypes.c_int),
        ("activation", ctypes.c_int),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("out_dtype", ctypes.c_int),
        ("out_scale", ctypes.c_void_p),
    )


def rows(x: Tensor) -> Tensor:
    """x as [M, K] with adjacent elements in a row, as csrc/torch hands it down: a view if it can be."""
    if x.dim() != 2:
        x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def garbage(*sizes: int, dtype: torch.dtype) -> Tensor:
    """NaN for floats."""
    out = torch.empty(*sizes, dtype=dtype)
    out.view(torch.int8).fill_(-1 if dtype.is_floating_point else 0x5A)
    return out


def padded(weight: Tensor) -> Tensor:
    """[N, K] with garbage after each row up to a multiple of 16 bytes, which full speed needs."""
    N, K = weight.shape
    return garbage(N, -(-K // 16) * 16, dtype=torch.int8)[:, :K].copy_(weight)


def plain(weight: Tensor, N: int, K: int) -> Tensor:
    """The CUDA form [N, K] of a weight; a packed one is unpacked into padded rows."""
    if weight.dim() == 1:
        return padded(torch.ops.trimtab.int8_unpack(weight, N, K))
    return rows(weight)


def stride(x: Tensor) -> int:
    return x.stride(0) if x.shape[0] > 1 else max(x.stride(0), x.shape[1])


class Machine:
    """Calls of the kernels as on a GPU of that architecture; every launch is another shuffle.

    library: a build of csrc/cuda for the SIMT machine, that of this checkout unless given.
    """

    def __init__(
        self,
        arch: int = 80,
        seed: int = 0,
        policy: str = "by-seed",
        sm_count: int = 4,
        library: Path | None = None,
    ) -> None:
        self._library = ctypes.CDLL(str(library or simt_build.build()))
        self._library.tt_last_error.restype = ctypes.c_char_p
        with_workspace = ("int8_mm", "int8_linear", "sparse24_linear")
        with_workspace += ("bitmap_linear", "block_linear", "block_grad_values")
        for name in (f"tt_{op}_cuda_workspace" for op in with_workspace):
            if hasattr(self._library, name):
                getattr(self._library, name).restype = ctypes.c_int64
        self._library.simt_launches.restype = ctypes.c_int64
        self._settings = (ctypes.c_uint64(seed), arch, sm_count, POLICIES[policy])
        self._configured = False

    def call(self, function: str, *arguments: object, reads: Sequence, writes: Sequence) -> None:
        """The C function on these arguments, where kernels may touch `reads` and `writes` (or None)."""
        self._library.simt_clear()
        for tensors, writable in ((reads, 0), (writes, 1)):
            for t in tensors:
                if t is None or t.numel() == 0:
                    continue
                last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
                size = ctypes.c_int64((last + 1) * t.element_size())
                self._library.simt_register(ctypes.c_void_p(t.data_ptr()), size, writable)
        if not self._configured:
            self._library.simt_configure(*self._settings)
            self._configured = True
        status = getattr(self._library, function)(*(self._convert(a) for a in arguments))
        if status != 0:
            raise RuntimeError(self._library.tt_last_error().decode())

    @property
    def launches(self) -> int:
        """Of kernels, so far."""
        return self._library.simt_launches()

    @staticmethod
    def _convert(argument: object) -> object:
        if argument is None or isinstance(argument, Tensor):
            return ctypes.c_void_p(0 if argument is None else argument.data_ptr())
        if isinstance(argument, torch.dtype):
            return ctypes.c_int(DTYPES[argument])
        if isinstance(argument, int):
            return ctypes.c_int64(argument)
        return argument

    def workspace(self, function: str, *sizes: object) -> Tensor | None:
        size = getattr(self._library, function)(*map(self._convert, sizes))
        if size == 0:
            return None
        whole = garbage(size + 256, dtype=torch.int8)
        start = -whole.data_ptr() % 256
        return whole[start : start + size]

    @staticmethod
    def epilogue(
        scale: Tensor | None,
        bias: Tensor | None,
        activation: int,
        out: Tensor,
        out_scale: Tensor | None = None,
    ) -> Epilogue:
        return Epilogue(
            scale.data_ptr() if scale is not None else None,
            bias.data_ptr() if bias is not None else None,
            DTYPES[bias.dtype] if bias is not None else 0,
            activation,
            out.data_ptr(),
            out.stride(0) if out.shape[0] > 1 else out.shape[1],
            DTYPES[out.dtype],
            out_scale.data_ptr() if out_scale is not None else None,
        )
