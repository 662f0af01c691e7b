"""csrc/cuda built for the SIMT machine (tests/simt) with the C++ compiler, objects kept in build/simt."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "simt"
SIMT = ROOT / "tests" / "simt"

# launch.cu talks to the driver; simt/library.cpp stands in for it.
KERNELS = [path for path in sorted((ROOT / "csrc/cuda").glob("*.cu")) if path.name != "launch.cu"]
HOST = [*(ROOT / f"csrc/cpu/{name}.cpp" for name in ("status", "optim_rules", "optim_check"))]
HOST.append(SIMT / "library.cpp")
SELFTESTS = sorted(SIMT.glob("selftest*.cu"))


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
    sources: Iterable[Path], options: Sequence[str] = ("-O1",), csrc: Path = ROOT / "csrc"
) -> list[Path]:
    """Compiles what has changed since it was last compiled, two files at a time.

    -O2 takes a quarter longer to compile and saves the tests nothing.
    """

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
