"""The sparse kernels' calls on the SIMT machine."""

from __future__ import annotations

import ctypes

import torch
from sim_call import DTYPES, Machine, garbage, rows, stride
from torch import Tensor


class Sparse24Weight(ctypes.Structure):
    """tt_sparse24_weight of csrc/include/trimtab/sparse24_linear.h."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("row_bytes", ctypes.c_int64),
        ("dtype", ctypes.c_int),
        ("metadata", ctypes.c_void_p),
        ("N", ctypes.c_int64),
        ("K", ctypes.c_int64),
    )


class Sparse24Compressed(ctypes.Structure):
    """tt_sparse24_compressed of csrc/include/trimtab/sparse24_compress.h."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("row_bytes", ctypes.c_int64),
        ("indices", ctypes.c_void_p),
        ("metadata", ctypes.c_void_p),
    )


class Bitmap(ctypes.Structure):
    """tt_bitmap of csrc/include/trimtab/bitmap_linear.h."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("bits", ctypes.c_void_p),
        ("row_start", ctypes.c_void_p),
        ("count", ctypes.c_int64),
    )


class BlockWeight(ctypes.Structure):
    """tt_block_weight of csrc/include/trimtab/block_linear.h."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("crow", ctypes.c_void_p),
        ("col", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("blocks", "bn", "bk", "N", "K")),
    )


class SparseCalls(Machine):
    def sparse24_compress(self, weight: Tensor, both: bool = False) -> list[Tensor | None]:
        """values, indices, metadata (None for float32); with `both` those of the transpose too."""
        w = rows(weight)
        (N, K), size = w.shape, w.element_size()
        parts: list[Tensor | None] = []
        structs = []
        for high, wide in ((N, K), (K, N)) if both else ((N, K),):
            kept = -(-wide // 4) * 2
            row_bytes = -(-kept * size // 16) * 16
            values = garbage(high, row_bytes // size, dtype=w.dtype)
            indices = garbage(high, -(-wide // 8), dtype=torch.int8).view(torch.uint8)
            metadata = None
            if size < 4:
                words = garbage(-(-high // 16) * -(-wide // 64) * 128, dtype=torch.int8)
                metadata = words.view(torch.int32).view(-(-high // 16), -(-wide // 64), 32)
            place = metadata.data_ptr() if metadata is not None else None
            structs.append(
                Sparse24Compressed(values.data_ptr(), row_bytes, indices.data_ptr(), place)
            )
            parts += [values, indices, metadata]
        pointers = [ctypes.byref(part) for part in structs] + [None] * (2 - len(structs))
        arguments = (w, w.dtype, stride(w), N, K, *pointers, None)
        self.call("tt_sparse24_compress_cuda", *arguments, reads=[w], writes=parts)
        return parts

    def sparse24_linear(
        self,
        x: Tensor,
        values: Tensor,
        metadata: Tensor,
        weight_scale: Tensor | None = None,
        bias: Tensor | None = None,
        activation: int = 0,
    ) -> Tensor:
        x2 = rows(x)
        (M, K), N = x2.shape, values.shape[0]
        out = garbage(M, N, dtype=x.dtype)
        epilogue = self.epilogue(weight_scale, bias, activation, out)
        weight = Sparse24Weight(
            values.data_ptr(),
            values.stride(0) * values.element_size(),
            DTYPES[values.dtype],
            metadata.data_ptr(),
            N,
            K,
        )
        space = self.workspace("tt_sparse24_linear_cuda_workspace", M, K, values.dtype)
        operands = (x2, x2.dtype, stride(x2), M, ctypes.byref(weight))
        self.call(
            *("tt_sparse24_linear_cuda", *operands, ctypes.byref(epilogue), space, None),
            reads=[x2, values, metadata, weight_scale, bias],
            writes=[out, space],
        )
        return out.reshape(*x.shape[:-1], N)

    def bitmap_linear(
        self,
        x: Tensor,
        values: Tensor,
        bitmap: Tensor,
        row_start: Tensor,
        weight_scale: Tensor | None = None,
        bias: Tensor | None = None,
        activation: int = 0,
    ) -> Tensor:
        x2 = rows(x)
        (M, K), N = x2.shape, bitmap.shape[0]
        out = garbage(M, N, dtype=x.dtype)
        epilogue = self.epilogue(weight_scale, bias, activation, out)
        weight = Bitmap(
            values.data_ptr(),
            DTYPES[values.dtype],
            bitmap.data_ptr(),
            row_start.data_ptr(),
            values.numel(),
        )
        space = self.workspace("tt_bitmap_linear_cuda_workspace", M, K, values.dtype)
        operands = (x2, x2.dtype, stride(x2), ctypes.byref(weight), M, N, K)
        self.call(
            *("tt_bitmap_linear_cuda", *operands, ctypes.byref(epilogue), space, None),
            reads=[x2, values, bitmap, row_start, weight_scale, bias],
            writes=[out, space],
        )
        return out.reshape(*x.shape[:-1], N)

    def block_linear(
        self,
        x: Tensor,
        values: Tensor,
        crow: Tensor,
        col: Tensor,
        weight_scale: Tensor | None,
        bias: Tensor | None,
        activation: int,
        N: int,
    ) -> Tensor:
        x2 = rows(x)
        M, K = x2.shape
        out = garbage(M, N, dtype=x.dtype)
        epilogue = self.epilogue(weight_scale, bias, activation, out)
        parts = (values.data_ptr(), DTYPES[values.dtype], crow.data_ptr(), col.data_ptr())
        weight = ctypes.byref(BlockWeight(*parts, *values.shape, N, K))
        space = self.workspace("tt_block_linear_cuda_workspace", weight, M)
        operands = (x2, x2.dtype, stride(x2), weight, M)
        self.call(
            *("tt_block_linear_cuda", *operands, ctypes.byref(epilogue), space, None),
            reads=[x2, values, crow, col, weight_scale, bias],
            writes=[out, space],
        )
        return out.reshape(*x.shape[:-1], N)

    def block_grad_values(
        self, grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, bn: int, bk: int
    ) -> Tensor:
        g2, x2 = rows(grad), rows(x)
        (M, N), K = g2.shape, x2.shape[1]
        out = garbage(col.shape[0], bn, bk, dtype=x.dtype)
        parts = (None, DTYPES[x.dtype], crow.data_ptr(), col.data_ptr())
        weight = ctypes.byref(BlockWeight(*parts, col.shape[0], bn, bk, N, K))
        space = self.workspace("tt_block_grad_values_cuda_workspace", weight, M)
        operands = (g2, stride(g2), x2, stride(x2), weight, M, out, space, None)
        self.call(
            *("tt_block_grad_values_cuda", *operands),
            reads=[g2, x2, crow, col],
            writes=[out, space],
        )
        return out
