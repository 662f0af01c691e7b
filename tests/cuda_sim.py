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
import fcntl
import functools
import hashlib
import inspect
import os
import subprocess
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "simt"
SIMT = ROOT / "tests" / "simt"

# launch.cu talks to the driver; simt/library.cpp stands in for it.
KERNELS = [path for path in sorted((ROOT / "csrc/cuda").glob("*.cu")) if path.name != "launch.cu"]
HOST = [ROOT / "csrc/cpu/status.cpp", ROOT / "csrc/cpu/optim_rules.cpp", SIMT / "library.cpp"]
SELFTESTS = sorted(SIMT.glob("selftest*.cu"))
POLICIES = {"late": 0, "random": 1, "early": 2, "by-seed": -1}

# --- building


def compiler() -> str:
    return os.environ.get("CXX", "g++")


@functools.cache
def flags() -> tuple[str, ...]:
    """Locals start as garbage where the compiler can do it (GCC 12, Clang 16)."""
    pattern = "-ftrivial-auto-var-init=pattern"
    command = [compiler(), pattern, "-E", "-x", "c++", os.devnull]
    supported = subprocess.run(command, capture_output=True).returncode == 0
    return (
        *("-std=c++17", "-DTT_SIMT", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
        "-Wno-unknown-pragmas",
        *((pattern,) if supported else ()),
    )


def includes(csrc: Path) -> list[str]:
    """csrc: the folder that holds cuda/, perhaps a mutated copy; all else comes from the checkout."""
    folders = (csrc, ROOT / "csrc", ROOT / "csrc/include", ROOT / "tests", SIMT / "include")
    return [word for folder in folders for word in ("-I", str(folder))]


@functools.cache
def digest(*extra: str) -> str:
    """Of all that a kernel includes, the compiler and its flags."""
    found = hashlib.sha256()
    for folder in ("csrc/cuda", "csrc/math", "csrc/include", "csrc/cpu", "tests/simt"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".h", ".cuh") or path in HOST:
                found.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    version = subprocess.run([compiler(), "--version"], capture_output=True, check=True).stdout
    found.update(version + " ".join((*flags(), *extra)).encode())
    return found.hexdigest()[:16]


def compile_object(source: Path, into: Path, csrc: Path, options: Sequence[str]) -> None:
    """Raises RuntimeError with the compiler's words."""
    command = [compiler(), *flags(), *options, *includes(csrc)]
    command += ["-x", "c++", "-c", str(source), "-o", str(into)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"{source.name}: {run.stderr[:4000]}")


def link(objects: Iterable[Path], into: Path, options: Sequence[str] = ()) -> None:
    command = [compiler(), "-shared", *options, *map(str, objects), "-o", str(into)]
    subprocess.run(command, check=True, capture_output=True, text=True)


@contextmanager
def locked() -> Iterator[None]:
    """One builder at a time, so that pytest's workers wait for the first."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build_objects(
    sources: Iterable[Path], options: Sequence[str] = ("-O2",), csrc: Path = ROOT / "csrc"
) -> list[Path]:
    """Compiles what has changed since it was last compiled, two files at a time."""

    headers = b"".join(path.read_bytes() for path in sorted(csrc.glob("cuda/*.cuh")))
    version = digest(*options) + hashlib.sha256(headers).hexdigest()

    def one(source: Path) -> Path:
        name = hashlib.sha256(version.encode() + source.read_bytes()).hexdigest()[:16]
        into = BUILD / "objects" / f"{source.stem}-{name}.o"
        if not into.exists():
            into.parent.mkdir(exist_ok=True)
            partial = into.with_suffix(f".{os.getpid()}.o")
            compile_object(source, partial, csrc, options)
            partial.rename(into)
        return into

    with locked(), ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, [s for s in sources if s.name != "launch.cu"]))


@functools.cache
def build() -> Path:
    """The library of all kernels."""
    objects = build_objects([*HOST, *SELFTESTS, *KERNELS])
    name = hashlib.sha256(" ".join(path.name for path in objects).encode()).hexdigest()[:16]
    into = BUILD / name / "libtrimtab_simt.so"
    with locked():
        if not into.exists():
            into.parent.mkdir(exist_ok=True)
            link(objects, into)
    return into


# --- calling

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


class Simulator:
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
        self._library = ctypes.CDLL(str(library or build()))
        self._library.tt_last_error.restype = ctypes.c_char_p
        with_workspace = ("int8_mm", "int8_linear", "sparse24_linear")
        with_workspace += ("bitmap_linear", "block_linear")
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

    def _workspace(self, function: str, *sizes: object) -> Tensor | None:
        size = getattr(self._library, function)(*map(self._convert, sizes))
        if size == 0:
            return None
        whole = garbage(size + 256, dtype=torch.int8)
        start = -whole.data_ptr() % 256
        return whole[start : start + size]

    @staticmethod
    def _epilogue(
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
        epilogue = self._epilogue(b_scale, bias, activation, out, out_scale)
        space = self._workspace("tt_int8_mm_cuda_workspace", M, N, K)
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
        epilogue = self._epilogue(weight_scale, bias, activation, out, out_scale)
        space = self._workspace("tt_int8_linear_cuda_workspace", M, N, K)
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
        epilogue = self._epilogue(weight_scale, bias, activation, out)
        group = K if group_size is None else group_size
        operands = (x2, x2.dtype, stride(x2), b, stride(b), group, zero_point, M, N, K)
        self.call(
            *("tt_int8_weight_mm_cuda", *operands, ctypes.byref(epilogue), None),
            reads=[x2, b, weight_scale, zero_point, bias],
            writes=[out],
        )
        return out.reshape(*x.shape[:-1], N)

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
        epilogue = self._epilogue(weight_scale, bias, activation, out)
        weight = Sparse24Weight(
            values.data_ptr(),
            values.stride(0) * values.element_size(),
            DTYPES[values.dtype],
            metadata.data_ptr(),
            N,
            K,
        )
        space = self._workspace("tt_sparse24_linear_cuda_workspace", M, K, values.dtype)
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
        epilogue = self._epilogue(weight_scale, bias, activation, out)
        weight = Bitmap(
            values.data_ptr(),
            DTYPES[values.dtype],
            bitmap.data_ptr(),
            row_start.data_ptr(),
            values.numel(),
        )
        space = self._workspace("tt_bitmap_linear_cuda_workspace", M, K, values.dtype)
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
        epilogue = self._epilogue(weight_scale, bias, activation, out)
        parts = (values.data_ptr(), DTYPES[values.dtype], crow.data_ptr(), col.data_ptr())
        weight = ctypes.byref(BlockWeight(*parts, *values.shape, N, K))
        space = self._workspace("tt_block_linear_cuda_workspace", weight, M)
        operands = (x2, x2.dtype, stride(x2), weight, M)
        self.call(
            *("tt_block_linear_cuda", *operands, ctypes.byref(epilogue), space, None),
            reads=[x2, values, crow, col, weight_scale, bias],
            writes=[out, space],
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
