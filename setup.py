"""Builds trimtab: calls CMake for the libraries, and says what it built without.

Torch is needed only to compile the adapter against its headers; with none (or TRIMTAB_TORCH=0) the
kernels, the C interface and the NumPy module are built alone.
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
        if shutil.which("nvcc") is None:
            print("trimtab: no nvcc here; building for the CPU only")
        configure = ["cmake", "-S", str(ROOT / "csrc"), "-B", str(build)]
        configure += [f"-DTRIMTAB_PYTHON={python}"]
        configure += [f"-DTRIMTAB_TORCH_INCLUDE={include}", f"-DTRIMTAB_TORCH_LIB={lib}"]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        jobs = str(len(os.sched_getaffinity(0)))
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)
        install = ["cmake", "--install", str(build), "--prefix", str(package.resolve())]
        subprocess.run(install, check=True)

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
