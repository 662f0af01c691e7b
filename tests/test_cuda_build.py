"""The build with nvcc and without: what CMake takes in, and what setup.py says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
    )


def configure(folder: Path, option: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(
        "cmake", "-S", ROOT / "csrc", "-B", folder, f"-DTRIMTAB_CUDA={option}", **environment
    )


def has_cuda_target(folder: Path) -> bool:
    listed = run("cmake", "--build", folder, "--target", "help")
    assert listed.returncode == 0, listed.stderr
    return "trimtab_cuda" in listed.stdout


@pytest.fixture
def broken(tmp_path: Path) -> str:
    """An nvcc that compiles nothing, as one without a host compiler."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'unsupported host compiler' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    return str(nvcc)


def test_switched_off(tmp_path: Path) -> None:
    done = configure(tmp_path / "build", "OFF")
    assert done.returncode == 0, done.stderr
    assert not has_cuda_target(tmp_path / "build")


def test_broken_nvcc_is_left_alone(tmp_path: Path, broken: str) -> None:
    """AUTO: the CPU build goes on. The configured folder finds a good nvcc later."""
    done = configure(tmp_path / "build", "AUTO", CUDACXX=broken)
    assert done.returncode == 0, done.stderr
    assert "no working nvcc, building for the CPU only" in done.stdout
    assert not has_cuda_target(tmp_path / "build")
    if nvcc := shutil.which("nvcc"):
        assert configure(tmp_path / "build", "AUTO", CUDACXX=nvcc).returncode == 0
        assert has_cuda_target(tmp_path / "build")


def test_demanded(tmp_path: Path, broken: str) -> None:
    assert configure(tmp_path / "build", "ON", CUDACXX=broken).returncode != 0


SETUP = {
    "off": ("0", True, "TRIMTAB_CUDA=0; building for the CPU only", "OFF"),
    "no-nvcc": ("", False, "no nvcc here; building for the CPU only", "OFF"),
    "nvcc": ("", True, "does not work here", "AUTO"),  # the pretended cmake builds nothing
    "demanded": ("1", False, "", "ON"),
}


@pytest.mark.parametrize("case", SETUP)
def test_setup_says_so(case: str, tmp_path: Path, broken: str) -> None:
    """With a cmake that only writes down how it was called."""
    wish, nvcc, message, option = SETUP[case]
    cmake = tmp_path / "cmake"
    cmake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    cmake.chmod(0o755)
    folder = tmp_path / "lib"
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "TRIMTAB_CUDA": wish, "CUDACXX": ""}
    environment["CUDA_HOME"] = str(tmp_path / "nowhere")
    if nvcc:
        environment["CUDACXX"] = broken
    elif any(
        Path(place, "nvcc").exists()
        for place in ("/usr/bin", "/bin", ROOT / "build/nvcc/nvidia/cu13/bin")
    ):
        pytest.skip("nvcc lies where it cannot be hidden")
    command = (sys.executable, ROOT / "setup.py", "--quiet", "build_ext", "--build-lib", folder)
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert message in done.stdout
    assert f"-DTRIMTAB_CUDA={option}" in (tmp_path / "calls").read_text()


def test_setup_refuses_a_wish_it_does_not_know() -> None:
    done = run(sys.executable, ROOT / "setup.py", "--quiet", "build_ext", TRIMTAB_CUDA="yes")
    assert (
        done.returncode != 0 and "TRIMTAB_CUDA: expected 0, 1 or nothing, got 'yes'" in done.stderr
    )
