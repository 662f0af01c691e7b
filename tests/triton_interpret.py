"""Run Triton kernels on the CPU, in Triton's interpreter.

TRITON_INTERPRET has to be set before a kernel is decorated, and then holds for the whole process.
So the checks live in files named ``interpreted_<op>.py``, which pytest does not collect, and
``test_triton_<op>.py`` runs each in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from trimtab.reference.dtypes import round_to, to_float32

TESTS = Path(__file__).resolve().parent


def run_interpreted(name: str) -> None:
    """Run pytest on ``name``, a file beside this one, with kernels interpreted. Shows what failed."""
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "--tb=short"]
    command += ["-p", "no:cacheprovider", str(TESTS / name)]
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    result = subprocess.run(
        command, cwd=TESTS.parent, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, f"\n{result.stdout}\n{result.stderr}"


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


def mend_bfloat16() -> None:
    """Give the interpreter bfloat16 as the hardware has it.

    Triton 3.6 and 3.7 keep it as uint16, truncate fp32 to it where the GPU rounds to nearest, lose
    its subnormals, and multiply the bit patterns as integers in tl.dot.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

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

    InterpreterBuilder.cast_impl = mended_cast
    InterpreterBuilder.create_dot = mended_dot
