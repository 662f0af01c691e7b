"""The C interface from C: tests/c/sample.c built with find_package and with a plain compiler call."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import trimtab
from trimtab.numpy import available_isas

SAMPLE = Path(__file__).parent / "c"
COMPILER = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
HEADERS = sorted(Path(trimtab.get_include()).glob("trimtab/*.h"))

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler")


def run(*command, **environment):
    env = {**os.environ, **environment}
    result = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env=env, timeout=300
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


def check_output(text):
    assert text.endswith("all as expected\n")
    assert "misaligned: status 1 int8_pack: expected packed aligned to 64 bytes" in text


def build(folder, name, *flags):
    program, library = folder / name, trimtab.get_library_dir()
    run(
        *(COMPILER, "-std=gnu11", "-Wall", "-Wextra", "-pedantic", "-Werror", *flags),
        *(SAMPLE / f"{name}.c", "-o", program, "-I", trimtab.get_include()),
        *("-L", library, "-ltrimtab", f"-Wl,-rpath,{library}"),
    )
    return program


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return build(tmp_path_factory.mktemp("c"), "sample", "-std=c11")


def test_own_pool(tmp_path):
    """Every index once: see tests/c/pool.c."""
    assert run(build(tmp_path, "pool", "-pthread")).endswith("all as expected\n")


def test_plain_compiler(sample):
    check_output(run(sample))


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avxvnni", "avx512", "amx"])
def test_every_instruction_set(sample, isa):
    if isa not in available_isas():
        pytest.skip(f"this CPU has no {isa}")
    text = run(sample, TRIMTAB_ISA=isa)
    check_output(text)
    assert f"instruction set: {isa}" in text


def test_find_package(tmp_path):
    if shutil.which("cmake") is None:
        pytest.skip("no cmake")
    run("cmake", "-S", SAMPLE, "-B", tmp_path, f"-Dtrimtab_DIR={trimtab.get_cmake_dir()}")
    run("cmake", "--build", tmp_path)
    check_output(run(tmp_path / "sample"))


def test_find_package_refuses_another_version(tmp_path):
    if shutil.which("cmake") is None:
        pytest.skip("no cmake")
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.20)\nproject(p NONE)\nfind_package(trimtab 99 REQUIRED)\n"
    )
    folder = f"-Dtrimtab_DIR={trimtab.get_cmake_dir()}"
    command = ["cmake", "-S", str(tmp_path), "-B", str(tmp_path / "b"), folder]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0 and 'requested version "99"' in result.stderr


@pytest.mark.parametrize("language", ["-xc -std=c99", "-xc++ -std=c++17"], ids=["c99", "c++17"])
@pytest.mark.parametrize("header", HEADERS, ids=lambda path: path.name)
def test_header_stands_alone(header, language):
    """Every header compiles by itself, in both languages, without a warning."""
    flags = "-Wall -Wextra -pedantic -Werror -fsyntax-only"
    run(COMPILER, *language.split(), *flags.split(), "-I", trimtab.get_include(), header)
