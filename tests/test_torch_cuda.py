"""The torch adapter's CUDA path without a GPU: what it passes on, refuses and allocates.

The adapter is one binary for a torch with CUDA and one without. Here torch has none, and
torch_cuda/pretend.cpp stands in for the GPU, for torch's CUDA half and for libtrimtab_cuda.so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import trimtab

HERE = Path(__file__).parent / "torch_cuda"
LIB = Path(trimtab.get_library_dir())
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the libraries, the CUDA one replaced."""
    folder = tmp_path_factory.mktemp("pretend")
    for name in ("libtrimtab.so", "libtrimtab_torch.so"):
        shutil.copy(LIB / name, folder)
    subprocess.run(
        [
            *(
                str(COMPILER),
                "-std=c++17",
                "-O1",
                "-shared",
                "-fPIC",
                "-Wall",
                "-Wextra",
                "-Werror",
            ),
            *(str(HERE / "pretend.cpp"), "-o", str(folder / "libtrimtab_cuda.so")),
            *("-I", trimtab.get_include(), "-L", str(folder), "-ltrimtab"),
            *("-ldl", "-Wl,-rpath,$ORIGIN"),
        ],
        check=True,
    )
    return folder


def run(folder: Path, *arguments: str, preload: bool = True, backend: str = "") -> str:
    environment = {**os.environ, "TRIMTAB_BACKEND": backend}
    if preload:
        environment["LD_PRELOAD"] = str(folder / "libtrimtab_cuda.so")
    done = subprocess.run(
        [sys.executable, str(HERE / "program.py"), str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("backend", ["", "cuda"])
def test_every_op_reaches_the_cuda_library(folder: Path, backend: str) -> None:
    assert run(folder, backend=backend) == "as expected\n"


def test_triton_when_it_is_forced(folder: Path) -> None:
    assert run(folder, "triton", backend="triton") == "as expected\n"


def test_triton_where_there_is_no_cuda_library(folder: Path, tmp_path: Path) -> None:
    """The adapter looks beside itself, so a copy of it without the library finds none."""
    for name in ("libtrimtab.so", "libtrimtab_torch.so"):
        shutil.copy(LIB / name, tmp_path)
    (tmp_path / "libtrimtab_pretend.so").symlink_to(folder / "libtrimtab_cuda.so")
    code = (HERE / "program.py").read_text().replace("libtrimtab_cuda.so", "libtrimtab_pretend.so")
    (tmp_path / "program.py").write_text(code)
    environment = {**os.environ, "LD_PRELOAD": str(folder / "libtrimtab_cuda.so")}
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path), "triton"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.stdout == "as expected\n", done.stdout + done.stderr


BACKENDS = {
    "nonsense": "TRIMTAB_BACKEND: expected cpu, cuda, triton, reference, got 'nonsense'",
    "cuda": "TRIMTAB_BACKEND=cuda: ",
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_impossible_backend_is_refused_at_import(backend: str) -> None:
    code = (
        "import torch; torch.version.cuda = None\n"
        "try:\n    import trimtab.ops\nexcept ValueError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TRIMTAB_BACKEND": backend},
    )
    assert done.stdout.startswith(BACKENDS[backend]), done.stdout + done.stderr
    if backend == "cuda":
        assert "expected cpu, triton, reference or nothing" in done.stdout


def test_reference_backend_gives_the_same_bits() -> None:
    """Every op of it once, beside trimtab.numpy, whose kernels are the C++ ones."""
    code = """
import torch, trimtab.numpy as plain
from trimtab import nn, ops
torch.manual_seed(0)
assert ops.backend.describe() == ["the NumPy reference for all tensors (TRIMTAB_BACKEND=reference)"]
x, b = torch.randn(4, 20), torch.randint(-127, 128, (6, 20), dtype=torch.int8)
scale, bias = torch.rand(6), torch.randn(6)
q, q_scale = ops.quantize_int8(x)
want_q, want_scale = plain.quantize_int8(x.numpy())
assert (q.numpy() == want_q).all() and (q_scale.numpy() == want_scale).all()
arrays = [t.numpy() for t in (x, b, scale, bias)]
want = plain.int8_linear(*arrays, "gelu")
for weight in (b, ops.int8_pack(b)):
    assert (ops.int8_linear(x, weight, scale, bias, "gelu").numpy() == want).all()
out = torch.zeros(4, 6)
assert (ops.int8_linear(x, b, scale, bias, "gelu", out=out).numpy() == want).all()
got = ops.int8_mm(q, b, q_scale, scale, bias, "gelu", torch.float32)
assert (got.numpy() == want).all()
want = plain.int8_weight_mm(*arrays[:3], bias=arrays[3])
assert (ops.int8_weight_mm(x, b, scale, bias=bias).numpy() == want).all()
assert ops.int8_linear(x.bfloat16(), b, scale, bias).dtype == torch.bfloat16
print("same")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TRIMTAB_BACKEND": "reference"},
    )
    assert done.stdout == "same\n", done.stdout + done.stderr
