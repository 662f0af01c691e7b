"""Compile Triton kernels for GPUs this machine lacks, and read what came out.

The triton wheel carries ptxas and cuobjdump, so a plain CPU can check instructions, registers,
spills and shared memory for every chip. Arguments are specialised as Triton's launcher does: an
integer 1 is a constant, a multiple of 16 is known to be one, and every pointer is 16-byte aligned.

Triton reads TRITON_INTERPRET when a kernel is decorated: none of this works in a process that
interprets kernels. triton_interpret.py gives that a process of its own.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Compiled:
    """A kernel for one chip. Registers and local memory are a thread's, shared memory a block's."""

    ptx: str
    registers: int
    local_bytes: int  # stack and spilled registers
    shared_bytes: int

    def count(self, pattern: str) -> int:
        """How many of the PTX's lines hold the regular expression ``pattern``."""
        return sum(1 for line in self.ptx.splitlines() if re.search(pattern, line))


def _specialise(kernel: Any, arguments: dict[str, Any]) -> tuple[dict, dict, dict]:
    """ASTSource's signature, constants and attributes for ``arguments``: a pointer is given as
    Triton spells its type ("*bf16"), everything else as the value it would be launched with."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if isinstance(value, str) and value.startswith("*"):
            signature[parameter.name] = value
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value is None or value == 1:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        else:
            integer = "i32" if value < 2**31 else "i64"
            signature[parameter.name] = "fp32" if isinstance(value, float) else integer
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_kernel(
    kernel: Any, capability: int, arguments: dict[str, Any], options: dict[str, Any]
) -> Compiled:
    """Compile ``kernel`` for compute capability ``capability`` (80, 90) with these arguments."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(kernel, *_specialise(kernel, arguments))
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(binary.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [str(cuobjdump), "--dump-resource-usage", cubin.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    used = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(
        ptx=binary.asm["ptx"],
        registers=used["REG"],
        local_bytes=used["STACK"] + used["LOCAL"],
        shared_bytes=binary.metadata.shared,
    )


def expect_exact(kernel: Compiled, *, division: bool) -> None:
    """The arithmetic of NUMERICS.md section 1: each step rounds to nearest, once, and subnormals
    stay. ``division``: whether the kernel divides."""
    assert (kernel.count(r"\bdiv\.rn\.f32\b") > 0) == division
    assert kernel.count(r"\bdiv\.(full|approx)|\b(rcp|sqrt|rsqrt|ex2|lg2|tanh)\.approx") == 0
    assert kernel.count(r"\bfma\.") == 0
    assert kernel.count(r"\.ftz\b") == 0
