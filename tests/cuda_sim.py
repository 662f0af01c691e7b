"""The CUDA kernels on the SIMT machine (tests/simt): built here, called on CPU tensors.

    sim = cuda_sim.Simulator(arch=80, seed=1)
    q, scale = sim.quantize_int8(x)          # csrc/cuda/quantize_int8.cu, thread by thread
    with cuda_sim.as_cpu(sim):               # torch.ops.trimtab.* of CPU tensors go there too
        ops.int8_linear(x, weight, weight_scale)

Kernels may touch the tensors of the call and nothing else, to the byte; outputs and the workspace start as
garbage. What a kernel does wrong (tests/simt/core.h) raises RuntimeError with block, thread and line.
"""

from __future__ import annotations

import ctypes
import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from sim_call import Machine, garbage, plain, rows, stride
from sim_sparse import SparseCalls
from torch import Tensor


class Simulator(SparseCalls, Machine):
    """Calls of the kernels as on a GPU of that architecture; every launch is another shuffle."""

    def quantize_int8(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x2 = rows(x)
        M, K = x2.shape
        q, scale = garbage(M, K, dtype=torch.int8), garbage(M, dtype=torch.float32)
        arguments = (x2, x2.dtype, stride(x2), M, K, q, K, scale, None)
        self.call("tt_quantize_int8_cuda", *arguments, reads=[x2], writes=[q, scale])
        return q.reshape(x.shape), scale.reshape(x.shape[:-1])

    def silu_mul_quantize_int8(self, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        g, u = rows(gate), rows(up)
        M, K = g.shape
        q, scale = garbage(M, K, dtype=torch.int8), garbage(M, dtype=torch.float32)
        arguments = (g, stride(g), u, stride(u), g.dtype, M, K, q, K, scale, None)
        self.call("tt_silu_mul_quantize_int8_cuda", *arguments, reads=[g, u], writes=[q, scale])
        return q.reshape(gate.shape), scale.reshape(gate.shape[:-1])

    def rms_norm_quantize_int8(
        self, x: Tensor, weight: Tensor, eps: float = 1e-6
    ) -> tuple[Tensor, Tensor]:
        x2, weight = rows(x), weight.contiguous()
        M, K = x2.shape
        q, scale = garbage(M, K, dtype=torch.int8), garbage(M, dtype=torch.float32)
        factor = ctypes.c_float(eps)
        arguments = (
            x2,
            x2.dtype,
            stride(x2),
            weight,
            weight.dtype,
            factor,
            M,
            K,
            q,
            K,
            scale,
            None,
        )
        function = "tt_rms_norm_quantize_int8_cuda"
        self.call(function, *arguments, reads=[x2, weight], writes=[q, scale])
        return q.reshape(x.shape), scale.reshape(x.shape[:-1])

    def int8_mm(
        self,
        a: Tensor,
        b: Tensor,
        a_scale: Tensor,
        b_scale: Tensor,
        bias: Tensor | None = None,
        activation: int = 0,
        out_dtype: torch.dtype | None = None,
        out_scale: Tensor | None = None,
    ) -> Tensor:
        a = rows(a)
        (M, K), N = a.shape, b_scale.shape[0]
        b = plain(b, N, K)
        out = garbage(M, N, dtype=out_dtype or torch.bfloat16)
        epilogue = self.epilogue(b_scale, bias, activation, out, out_scale)
        space = self.workspace("tt_int8_mm_cuda_workspace", M, N, K)
        operands = (a, stride(a), a_scale, b, stride(b), M, N, K)
        self.call(
            *("tt_int8_mm_cuda", *operands, ctypes.byref(epilogue), space, None),
            reads=[a, a_scale, b, b_scale, bias, out_scale],
            writes=[out, space],
        )
        return out

    def int8_linear(
        self,
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        activation: int = 0,
        out_dtype: torch.dtype | None = None,
        out_scale: Tensor | None = None,
    ) -> Tensor:
        x2 = rows(x)
        (M, K), N = x2.shape, weight_scale.shape[0]
        b = plain(weight, N, K)
        out = garbage(M, N, dtype=out_dtype or x.dtype)
        epilogue = self.epilogue(weight_scale, bias, activation, out, out_scale)
        space = self.workspace("tt_int8_linear_cuda_workspace", M, N, K)
        operands = (x2, x2.dtype, stride(x2), b, stride(b), M, N, K)
        self.call(
            *("tt_int8_linear_cuda", *operands, ctypes.byref(epilogue), space, None),
            reads=[x2, b, weight_scale, bias, out_scale],
            writes=[out, space],
        )
        return out.reshape(*x.shape[:-1], N)

    def int8_weight_mm(
        self,
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        zero_point: Tensor | None = None,
        bias: Tensor | None = None,
        group_size: int | None = None,
        activation: int = 0,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        x2 = rows(x)
        (M, K), N = x2.shape, weight_scale.shape[-1]
        b = plain(weight, N, K)
        out = garbage(M, N, dtype=out_dtype or x.dtype)
        epilogue = self.epilogue(weight_scale, bias, activation, out)
        group = K if group_size is None else group_size
        operands = (x2, x2.dtype, stride(x2), b, stride(b), group, zero_point, M, N, K)
        self.call(
            *("tt_int8_weight_mm_cuda", *operands, ctypes.byref(epilogue), None),
            reads=[x2, b, weight_scale, zero_point, bias],
            writes=[out],
        )
        return out.reshape(*x.shape[:-1], N)

    def optim_step_table(self, call: ctypes.Structure) -> tuple[Tensor, Tensor]:
        """(table, workspace) for steps of that tt_optim_call; the workspace as garbage."""
        sizes = (ctypes.c_int64 * 2)()
        spaces = []
        parts = (ctypes.byref(sizes, 8 * i) for i in range(2))
        self.call("tt_optim_step_sizes_cuda", ctypes.byref(call), *parts, reads=[], writes=[])
        for size in sizes:
            whole = garbage(size + 256, dtype=torch.int8)
            start = -whole.data_ptr() % 256
            spaces.append(whole[start : start + size])
        self.call("tt_optim_step_table_cuda", ctypes.byref(call), spaces[0], reads=[], writes=[])
        return spaces[0], spaces[1]

    def optim_step(
        self,
        call: ctypes.Structure,
        reads: Sequence[Tensor | None],
        writes: Sequence[Tensor | None],
        made: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """made: what optim_step_table gave for the same tensors and groups."""
        table, space = made or self.optim_step_table(call)
        arguments = (ctypes.byref(call), table, space, None)
        self.call("tt_optim_step_cuda", *arguments, reads=[table, *reads], writes=[space, *writes])


# --- as the CPU's implementation


@contextmanager
def as_cpu(sim: Simulator) -> Iterator[None]:
    """Inside, the torch ops that have a CUDA kernel answer from the simulator for CPU tensors."""

    def into_codes(quantizer):
        def run(*args: object, q: Tensor, scale: Tensor) -> None:
            for into, value in zip((q, scale), quantizer(*args), strict=True):
                into.copy_(value)

        return run

    def into_out(product):
        # The out form lacks out_dtype, which out_scale follows.
        names = list(inspect.signature(product).parameters)
        before = names.index("out_dtype")

        def run(*args: object, out: Tensor) -> None:
            rest = dict(zip(names[before + 1 :], args[before:], strict=False))
            out.copy_(product(*args[:before], out_dtype=out.dtype, **rest))

        return run

    library = torch.library.Library("trimtab", "IMPL")
    quantizers = ("quantize_int8", "silu_mul_quantize_int8", "rms_norm_quantize_int8")
    implementations = {
        **{op: getattr(sim, op) for op in quantizers},
        **{f"{op}.out": into_codes(getattr(sim, op)) for op in quantizers},
        **{
            f"{op}{overload}": getattr(sim, op)
            for op in (
                *("int8_mm", "int8_linear", "int8_weight_mm"),
                *("sparse24_linear", "bitmap_linear"),
            )
            for overload in ("", ".inference")
            if (op, overload) != ("int8_mm", ".inference")
        },
        "int8_mm.out": into_out(sim.int8_mm),
        "int8_linear.out": into_out(sim.int8_linear),
        "int8_weight_mm.out": into_out(sim.int8_weight_mm),
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it overrides, which is what it is for
            for name, function in implementations.items():
                library.impl(name, function, "CPU", allow_override=True)
        yield
    finally:
        library._destroy()
