"""The command line: ``python -m trimtab {info, demo, bench}`` and where the C library lies.

python -m trimtab info                     what is built, what this machine has, what is in use
python -m trimtab demo [OPTIONS]           the demo; its own options follow
python -m trimtab bench [NAME ...] [-- OPTIONS]
                                           benchmarks/bench_NAME.py of a source checkout
cmake -Dtrimtab_DIR=`python -m trimtab --cmakedir`
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import trimtab

PACKAGE = Path(__file__).resolve().parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["demo"]:  # its options are its own, -h too
        return demo(arguments[1:])
    passed_on: list[str] = []
    if "--" in arguments:
        cut = arguments.index("--")
        arguments, passed_on = arguments[:cut], arguments[cut + 1 :]

    parser = argparse.ArgumentParser(
        prog="python -m trimtab",
        description=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=trimtab.__version__)
    folders = {
        "cmakedir": ("of trimtab-config.cmake", trimtab.get_cmake_dir),
        "includedir": ("of the C headers", trimtab.get_include),
        "libdir": ("of libtrimtab.so", trimtab.get_library_dir),
    }
    for name, (what, _) in folders.items():
        parser.add_argument(f"--{name}", action="store_true", help=f"print the folder {what}")
    commands = parser.add_subparsers(dest="command", metavar="{info,demo,bench}")
    commands.add_parser("info", help="what is built, what this machine has, what is in use")
    commands.add_parser("demo", help="the demo on a real model")
    bench_parser = commands.add_parser("bench", help="run the benchmarks of a source checkout")
    bench_parser.add_argument("names", nargs="*", metavar="NAME", help="such as int8_linear")
    options = parser.parse_args(arguments)

    asked = [get() for name, (_, get) in folders.items() if getattr(options, name)]
    if asked:
        print("\n".join(asked))
        return 0
    if options.command == "info":
        return info()
    if options.command == "bench":
        return bench(options.names, passed_on)
    parser.print_help(sys.stderr)
    return 2


# --- info


def info() -> int:
    """Prints a line a fact. A part that is missing is a line with the reason, not an error."""
    for topic, facts in facts_by_topic():
        for fact in facts:
            print(f"{topic:<13} {fact}")
            topic = ""
    return 0


def facts_by_topic() -> Iterator[tuple[str, list[str]]]:
    yield "trimtab", [f"{trimtab.__version__} in {PACKAGE}"]
    yield "python", [f"{platform.python_version()}, {versions()}"]
    yield "CPU", cpu()
    yield "threads", threads()
    yield "torch ops", [torch_ops()]
    yield "CUDA library", [cuda()]
    yield "Triton", [triton()]
    yield "backend", backend()


def versions() -> str:
    found = []
    for name in ("torch", "numpy", "triton", "ml_dtypes"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def cpu() -> list[str]:
    facts = [cpu_model()]
    try:
        isas = importlib.import_module("trimtab.numpy")
    except ImportError as error:
        return facts + [f"instruction sets unknown: {error}"]
    wish = os.environ.get("TRIMTAB_ISA", "")
    source = f"TRIMTAB_ISA={wish}" if wish else "the best; TRIMTAB_ISA is not set"
    try:
        in_use = f"in use: {isas.get_isa()} ({source})"
    except ValueError as error:
        in_use = f"in use: none, every kernel raises: {error}"
    return facts + [f"instruction sets: {', '.join(isas.available_isas())}", in_use]


def threads() -> list[str]:
    facts = []
    try:
        count = importlib.import_module("trimtab.numpy").get_num_threads()
        facts.append(f"{count} of trimtab's own, for NumPy and C")
    except ImportError:
        pass
    try:
        count = importlib.import_module("torch").get_num_threads()
        facts.append(f"{count} of torch's, for torch ops")
    except ImportError:
        pass
    return facts or ["unknown"]


def torch_ops() -> str:
    library = PACKAGE / "lib" / "libtrimtab_torch.so"
    if not library.exists():
        return f"not built: no {library.name} in {library.parent} (was torch there at build time?)"
    try:
        importlib.import_module("trimtab.ops")
        torch = importlib.import_module("torch")
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return f"not loaded: {error}"
    schemas = torch._C._jit_get_all_schemas()
    names = sorted({s.name.partition("::")[2] for s in schemas if s.name.startswith("trimtab::")})
    return f"loaded: {', '.join(names)}"


def cuda() -> str:
    library = PACKAGE / "lib" / "libtrimtab_cuda.so"
    if not library.exists():
        return "not built: there was no nvcc at build time, or TRIMTAB_CUDA=0"
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        return f"built, not loaded: {error}"
    if torch.version.cuda is None:
        return f"built, not used: torch {torch.__version__} has no CUDA"
    if not torch.cuda.is_available():
        return "built, not used: torch sees no GPU"
    major, minor = torch.cuda.get_device_capability()
    name = f"{torch.cuda.get_device_name()} of compute capability {major}.{minor}"
    if major < 8:
        return f"built, not used: {name}, and the kernels need 8.0"
    return f"built, on {name}"


def backend() -> list[str]:
    try:
        importlib.import_module("trimtab.ops")
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return [f"none: {error}"]
    return importlib.import_module("trimtab.ops.backend").describe()


def triton() -> str:
    try:
        availability = importlib.import_module("trimtab.kernels").is_available()
    except ImportError as error:
        return f"not available: {error}"
    return ("available: " if availability.ok else "not available: ") + availability.reason


# --- demo and bench


def demo(arguments: list[str]) -> int:
    """``trimtab.demo.main`` with what follows ``demo`` on the command line."""
    return int(importlib.import_module("trimtab.demo").main(arguments) or 0)


def checkout() -> Path | None:
    """The benchmarks folder of the checkout that this package, or the current folder, is in."""
    for root in (PACKAGE.parents[1], Path.cwd()):
        if any((root / "benchmarks").glob("bench_*.py")):
            return root / "benchmarks"
    return None


def bench(names: list[str], passed_on: list[str]) -> int:
    """Runs the named benchmarks, or all, each in a process of its own; 1 if one failed."""
    folder = checkout()
    if folder is None:
        print(
            "trimtab bench: no benchmarks/bench_*.py here. They are not part of the installed "
            "package: run this in a source checkout.",
            file=sys.stderr,
        )
        return 2
    scripts = {path.stem.removeprefix("bench_"): path for path in sorted(folder.glob("bench_*.py"))}
    unknown = [name for name in names if name not in scripts]
    if unknown:
        print(
            f"trimtab bench: expected names out of {', '.join(scripts)}; got {', '.join(unknown)}",
            file=sys.stderr,
        )
        return 2
    failed = []
    for name in names or scripts:
        print(f"=== {scripts[name].name}", flush=True)
        if subprocess.run([sys.executable, str(scripts[name]), *passed_on]).returncode:
            failed.append(name)
    if failed:
        print(f"trimtab bench: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0
