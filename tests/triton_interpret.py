"""Run Triton kernels on the CPU, in Triton's interpreter.

TRITON_INTERPRET has to be set before a kernel is decorated, and then holds for the whole process.
So the checks live in files named ``interpreted_<op>.py``, which pytest does not collect, and
``test_triton_<op>.py`` runs each in a process of its own.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trimtab.reference.dtypes import round_to, to_float32
from trimtab.reference.int8_weight_mm import fma as fma32

TESTS = Path(__file__).resolve().parent


def interpreted(name: str) -> Any:
    """A fixture that starts pytest on ``name``, a file beside this one, with kernels interpreted.

    It runs beside the tests that compile; the last of them hands it to ``expect_passed``.
    """

    @pytest.fixture(scope="module", autouse=True)
    def started() -> Iterator[subprocess.Popen[str]]:
        command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "--tb=short"]
        command += ["-p", "no:cacheprovider", str(TESTS / name)]
        path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
        with subprocess.Popen(
            command,
            cwd=TESTS.parent,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            yield process
            process.kill()  # if nobody waited for it

    return started


def expect_passed(process: subprocess.Popen[str]) -> None:
    """Wait for an interpreted run, and fail with what it says if a check in it failed."""
    output, _ = process.communicate()
    assert process.returncode == 0, f"\n{output}"


def to_array(t: torch.Tensor) -> np.ndarray:
    """As the references take it: bfloat16 as its bits."""
    return (t.view(torch.int16).numpy().view(np.uint16)) if t.dtype == torch.bfloat16 else t.numpy()


def from_bits(bits: list[int]) -> torch.Tensor:
    """float32 of these bits."""
    return torch.from_numpy(np.array(bits, dtype=np.uint32).view(np.float32))


def same(got: torch.Tensor, want: np.ndarray) -> bool:
    """The same bits, except that any NaN equals any NaN."""
    got = to_array(got)
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    nan = np.isnan(to_float32(want))
    unsigned = f"uint{8 * got.itemsize}"
    equal = np.ascontiguousarray(got).view(unsigned) == np.ascontiguousarray(want).view(unsigned)
    return bool(np.array_equal(np.isnan(to_float32(got)), nan) and (equal | nan).all())


def fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float64 ``a * b + c``, rounded once: the C library's, one by one."""
    return np.asarray(np.frompyfunc(_libm_fma(), 3, 1)(a, b, c), np.float64)


@functools.cache
def _libm_fma() -> Any:
    fma = ctypes.CDLL(ctypes.util.find_library("m")).fma
    fma.restype, fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3
    return fma


def at_the_end(t: torch.Tensor) -> torch.Tensor:
    """A copy whose end is that of memory which can be read: a kernel that reads on is killed."""
    page, size = mmap.PAGESIZE, t.numel() * t.element_size()
    room = -(-size // page) * page
    memory = mmap.mmap(-1, room + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(start + room), ctypes.c_size_t(page), 0) == 0
    if not size:
        return t.clone()
    copy = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=room - size)
    return copy.view(t.shape).copy_(t)


def mend_interpreter() -> None:
    """Give the interpreter bfloat16 and fma as the hardware has them, and loop bounds under NumPy 2.4.

    Triton 3.6 and 3.7 keep bfloat16 as uint16, truncate fp32 to it where the GPU rounds to nearest,
    lose its subnormals, and multiply the bit patterns as integers in tl.dot. Triton 3.6 turns
    one-element arrays into loop bounds with int(), which NumPy 2.4 refuses. Its fma rounds twice.
    A call of a function by a kernel patches triton.language anew, which takes half of a test: the
    launch has done that, and only Triton's own functions see another module.
    """
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
    patch_tensor = interpreter._patch_lang_tensor
    call, patched = interpreter.InterpretedFunction.__call__, set()

    def mended_cast(self, src, dst_type):
        pair = (src.dtype.scalar, dst_type.scalar)
        if pair == (tl.bfloat16, tl.float32):
            return TensorHandle(to_float32(src.data), tl.float32)
        if pair == (tl.float32, tl.bfloat16):
            return TensorHandle(round_to(src.data, "bfloat16"), tl.bfloat16)
        if tl.bfloat16 in pair:
            # To and from integers by way of fp32, which holds every bfloat16 and every int8.
            return mended_cast(self, mended_cast(self, src, tl.float32), dst_type)
        return cast(self, src, dst_type)

    def mended_dot(self, a, b, d, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (TensorHandle(to_float32(x.data), tl.float32) for x in (a, b))
        return dot(self, a, b, d, *rest)

    def mended_patch_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def mended_call(self, *args, **kwargs):
        if self.fn.__module__ not in patched and self.fn.__module__.startswith("triton."):
            patched.add(self.fn.__module__)
            return call(self, *args, **kwargs)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    def mended_fma(self, x, y, z):
        double = x.data.dtype == np.float64
        return TensorHandle((fma64 if double else fma32)(x.data, y.data, z.data), z.dtype.scalar)

    interpreter.InterpretedFunction.__call__ = mended_call
    InterpreterBuilder.cast_impl = mended_cast
    InterpreterBuilder.create_fma = mended_fma
    remember_types()
    InterpreterBuilder.create_dot = mended_dot
    interpreter._patch_lang_tensor = mended_patch_tensor


def remember_types() -> None:
    """What the interpreter makes of a type, made once for each, and nothing made of operands that are
    alike already: two thirds of a test's time otherwise."""
    import triton.language as tl
    from triton.language import core
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    np_dtype, unwrap = interpreter._get_np_dtype, core._unwrap_if_constexpr
    new_block, new_tensor = tl.block_type.__init__, tl.tensor.__init__
    broadcast, dtypes, blocks, shapes = TritonSemantic.broadcast_impl_value, {}, {}, {}

    def known_np_dtype(dtype):
        found = dtypes.get(dtype.name)
        if found is None:
            found = dtypes[dtype.name] = np_dtype(dtype)
        return found

    def known_block(self, element_ty, shape):
        key = element_ty.name, *(getattr(size, "value", size) for size in shape)
        if key not in blocks:
            new_block(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    def known_tensor(self, handle, type):
        if type.name not in shapes:
            new_tensor(self, handle, type)
            shapes[type.name] = dict(vars(self))
        vars(self).update(shapes[type.name], handle=handle, type=type)

    def known_broadcast(self, lhs, rhs):
        a, b = getattr(lhs.type, "shape", None), getattr(rhs.type, "shape", None)
        if a is b or (a is not None and b is not None and a.values == b.values):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    def quick_unwrap(o):
        if type(o) is tl.constexpr:
            return o.value
        return unwrap(o) if isinstance(o, list | tuple | tl.tuple) else o

    interpreter._get_np_dtype, core._unwrap_if_constexpr = known_np_dtype, quick_unwrap
    tl.block_type.__init__, tl.tensor.__init__ = known_block, known_tensor
    TritonSemantic.broadcast_impl_value = known_broadcast
