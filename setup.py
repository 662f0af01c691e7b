"""Builds trimtab: calls CMake for the libraries, and says what it built without.

Torch is needed only to compile the adapter against its headers; with none (or TRIMTAB_TORCH=0) the
kernels, the C interface and the NumPy module are built alone. libtrimtab_cuda.so is built where there
is a working nvcc: TRIMTAB_CUDA=0 leaves it out, TRIMTAB_CUDA=1 fails without.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def torch_folders() -> tuple[str, str]:
    """(include, lib) of the installed torch, found without importing it; empty strings if none.

    pip's build isolation hides installed packages from import, but the environment's own folder still
    holds the headers, and the stable ABI asks for nothing else.
    """
    if os.environ.get("TRIMTAB_TORCH") == "0":
        return "", ""
    spec = importlib.util.find_spec("torch")
    installed = Path(sysconfig.get_path("purelib")) / "torch"
    folder = Path(spec.origin).parent if spec and spec.origin else installed
    if not (folder / "include" / "torch" / "csrc" / "stable").is_dir():
        return "", ""
    return str(folder / "include"), str(folder / "lib")


def find_nvcc() -> str:
    """nvcc of CUDACXX, the PATH, CUDA_HOME or its usual place, or the Makefile's own from PyPI; an
    empty string if none."""
    if os.environ.get("CUDACXX"):
        return os.environ["CUDACXX"]
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    own = ROOT / "build" / "nvcc" / "nvidia" / "cu13"
    places = ["nvcc", *(os.path.join(folder, "bin", "nvcc") for folder in (home, own))]
    return next((found for place in places if (found := shutil.which(place))), "")


def cuda_environment(nvcc: str) -> dict[str, str]:
    """The environment in which CMake finds this nvcc, and the linker the CUDA runtime."""
    environment = dict(os.environ)
    if not nvcc:
        return environment
    environment["CUDACXX"] = nvcc
    lib = Path(nvcc).parents[1] / "lib"  # where PyPI's wheels keep it; nvcc looks into lib64
    if (lib / "libcudart_static.a").exists():
        paths = [str(lib), environment.get("LIBRARY_PATH", "")]
        environment["LIBRARY_PATH"] = os.pathsep.join(filter(None, paths))
    return environment


def cuda_option(nvcc: str) -> str:
    """TRIMTAB_CUDA as CMake takes it: ON, OFF or AUTO. Says so where it is OFF."""
    wish = os.environ.get("TRIMTAB_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"TRIMTAB_CUDA: expected 0, 1 or nothing, got {wish!r}")
    if wish == "0":
        print("trimtab: TRIMTAB_CUDA=0; building for the CPU only")
        return "OFF"
    if wish == "1":
        return "ON"
    if not nvcc:
        print("trimtab: no nvcc here; building for the CPU only")
        return "OFF"
    return "AUTO"


class CMakeBuild(build_ext):
    """The whole CMake build, installed into the package folder; setuptools compiles nothing itself."""

    def run(self) -> None:
        here = self.inplace or getattr(self, "editable_mode", False)
        package = ROOT / "python" / "trimtab" if here else Path(self.build_lib) / "trimtab"
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        include, lib = torch_folders()
        if not include:
            print("trimtab: no torch >= 2.11 here; building without the torch adapter")
        python = sys.executable
        if importlib.util.find_spec("pybind11") is None:
            python = ""
            print("trimtab: no pybind11 here; building without the NumPy module")
        nvcc = find_nvcc()
        cuda = cuda_option(nvcc)
        configure = ["cmake", "-S", str(ROOT / "csrc"), "-B", str(build)]
        configure += [f"-DTRIMTAB_PYTHON={python}", f"-DTRIMTAB_CUDA={cuda}"]
        configure += [f"-DTRIMTAB_TORCH_INCLUDE={include}", f"-DTRIMTAB_TORCH_LIB={lib}"]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        jobs = str(len(os.sched_getaffinity(0)))
        environment = cuda_environment(nvcc)
        subprocess.run(configure, check=True, env=environment)
        compile_all = ["cmake", "--build", str(build), "--parallel", jobs]
        subprocess.run(compile_all, check=True, env=environment)
        library = package.resolve() / "lib" / "libtrimtab_cuda.so"
        library.unlink(missing_ok=True)  # of an earlier build that had nvcc
        install = ["cmake", "--install", str(build), "--prefix", str(package.resolve())]
        subprocess.run(install, check=True)
        if cuda == "AUTO" and not library.exists():
            print(f"trimtab: {nvcc} does not work here (host compiler?); built for the CPU only")

    def get_outputs(self) -> list[str]:
        return []  # CMake installs them; setuptools must not copy them again

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    packages=["trimtab", "trimtab.kernels"]
    + [f"trimtab.{p.parent.name}" for p in sorted(ROOT.glob("python/trimtab/*/__init__.py"))],
    package_dir={"trimtab": "python/trimtab", "trimtab.kernels": "kernels"},
    package_data={
        "trimtab": ["py.typed", "_numpy.pyi"]
    },  # CMake installs the rest into the build folder
    ext_modules=[Extension("trimtab._trimtab", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
