"""The activations: C++ scalar == AVX2 == AVX-512 == the NumPy reference, and how far from exact.

No compiled trimtab is needed: the C++ test is built here with the system's compiler, and the
reference is imported from its file.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "tests" / "cpp" / "test_activation.cpp"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
FLAGS = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-ffp-contract=off", f"-I{ROOT / 'csrc'}"]
VECTOR_FLAGS = {
    8: ["-mavx2", "-mfma", "-mf16c"],
    16: ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
FUNCTIONS = ("exp", "tanh", "erf", "relu", "gelu", "gelu_tanh", "silu")
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")


def compiler(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMPILER, *map(str, arguments)], capture_output=True, text=True)


def takes(flags: list[str], folder: Path) -> bool:
    """Whether the compiler knows ``flags``; a compiler for another architecture does not."""
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}\n")
    return compiler(*flags, "-c", probe, "-o", folder / "probe.o").returncode == 0


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """test_activation, with every vector type that the compiler can make; it asks cpuid itself."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("activation")
    link = []
    for lanes, flags in VECTOR_FLAGS.items():
        if takes(flags, folder):
            part = folder / f"f32x{lanes}.o"
            built = compiler(*FLAGS, *flags, f"-DTT_LANES={lanes}", "-c", SOURCE, "-o", part)
            assert built.returncode == 0, built.stderr
            link += [f"-DTT_HAVE_{lanes}", part]
    path = folder / "test_activation"
    built = compiler(*FLAGS, "-DTT_LANES=1", SOURCE, *link, "-o", path, "-pthread")
    assert built.returncode == 0, built.stderr
    return path


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    path = ROOT / "python" / "trimtab" / "reference" / "activation.py"
    spec = importlib.util.spec_from_file_location("activation_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def inputs() -> np.ndarray:
    """Every 4001st bit pattern, dense runs where a formula changes, and all the special values."""
    strided = np.arange(0, 2**32, 4001, dtype=np.uint64).astype(np.uint32).view(np.float32)
    seams = np.float32(
        [0.58, 0.6931472, 0.875, 1.3862944, 4, 5.25, 10, 10.8125, 14.5, 16.68, 18, 89, 104.5, 111]
    )
    runs = (seams.view(np.int32)[:, None] + np.arange(-500, 500, dtype=np.int32)).view(np.float32)
    tiny = np.arange(1000, dtype=np.uint32).view(np.float32)
    special = np.float32(
        [0, 1, np.inf, np.nan, np.finfo(np.float32).max, np.finfo(np.float32).tiny]
    )
    more = np.concatenate([runs.ravel(), tiny, special])
    return np.concatenate([strided, more, -more])


def evaluate(program: Path, name: str, x: np.ndarray, folder: Path) -> np.ndarray:
    x.tofile(folder / "in.bin")
    subprocess.run([program, "eval", name, folder / "in.bin", folder / "out.bin"], check=True)
    return np.fromfile(folder / "out.bin", np.float32)


def test_vectors_accuracy_and_order(program: Path) -> None:
    """The C++ program's own table: same bits on every vector type, at most 4 ulp, monotone."""
    done = subprocess.run([program], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", FUNCTIONS)
def test_reference_is_the_cpp(
    program: Path, reference: ModuleType, inputs: np.ndarray, tmp_path: Path, name: str
) -> None:
    assert inputs.size >= 10**6
    expected = evaluate(program, name, inputs, tmp_path)
    got = getattr(reference, name)(inputs)
    assert got.dtype == np.float32 and got.shape == inputs.shape
    differ = (got.view(np.uint32) != expected.view(np.uint32)) & ~(
        np.isnan(got) & np.isnan(expected)
    )
    worst = [(x, g, e) for x, g, e in zip(inputs[differ], got[differ], expected[differ])][:5]
    assert not differ.any(), f"{differ.sum()} of {inputs.size} differ: (x, NumPy, C++) {worst}"


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_limits(reference: ModuleType, name: str) -> None:
    x = np.float32([-np.inf, np.finfo(np.float32).min, -0.0, 0.0, np.inf, np.nan])
    y = getattr(reference, name)(x)
    low = 0.0 if name == "relu" else -0.0
    np.testing.assert_array_equal(y, np.float32([low, low, -0.0, 0.0, np.inf, np.nan]))
    np.testing.assert_array_equal(np.signbit(y[:4]), np.signbit(np.float32([low, low, -0.0, 0.0])))


def test_activate(reference: ModuleType) -> None:
    x = np.float32([[-1.5, 0.25, 3.0]])
    np.testing.assert_array_equal(reference.activate("none", x), x)
    for name in ACTIVATIONS:
        np.testing.assert_array_equal(reference.activate(name, x), getattr(reference, name)(x))
    assert reference.gelu(x[:, 1:2]).shape == (1, 1)
    assert reference.gelu(x[:0]).shape == (0, 3)


def test_bad_input(reference: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"expected an activation in .*'gelu_tanh'.*, got 'swish'"):
        reference.activate("swish", np.float32([1.0]))
    with pytest.raises(TypeError, match="expected a float32 array, got float64"):
        reference.silu(np.float64([1.0]))
