"""The house keeps its rules: every op has all its parts, kernels know no torch, importing is cheap.

The rule for an op (CONTRIBUTING.md): one stem names its schema, its C functions, its files in csrc/cpu,
csrc/cuda, csrc/torch, kernels, ops and reference, its test and its benchmark.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import trimtab

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
LIB = Path(trimtab.get_library_dir())
ISAS = ("avx2", "avxvnni", "avx512", "amx")  # each has files compiled with flags of its own

# --- the rule for an op

# Schemas that live in another op's files.
COMPANIONS = {
    "int8_unpack": "int8_pack",
    "dequantize_affine": "quantize_affine",
    "int8_conv2d_pack": "int8_conv2d",
    "int8_conv2d_unpack": "int8_conv2d",
    "block_grad_x": "block_linear",
    "block_grad_values": "block_linear",
    "sparse24_pack": "sparse24_compress",
    "sparse24_pack_both": "sparse24_compress",
}

# What an op may lack, and why. A line whose file exists after all fails, so this list stays true.
EXCEPTIONS = {
    "kernels/bitmap_conv2d": "on a GPU SparseConv2d multiplies patches by bitmap_linear",
    "cuda/bitmap_conv2d": "on a GPU SparseConv2d multiplies patches by bitmap_linear",
    "cuda/int8_conv2d": "CPU only so far",
    "cuda/int8_embedding": "CPU only so far",
    "cuda/int8_embedding_bag": "CPU only so far",
    "cuda/int8_pack": "the packed layout is the CPU kernels' own; CUDA reads plain [N, K]",
    "cuda/quantize_affine": "on a GPU it is Triton's",
    "kernels/sparse24_compress": "where CUDA C++ is missing it is torch's operators",
    "cpu/sparse24_linear": "on a CPU a 2:4 weight is a bitmap weight",
    "benchmark/sparse24_linear": "bench_cuda_sparse.py has it, as it is CUDA's alone",
    "kernels/int8_conv2d": "CPU only so far",
    "kernels/int8_embedding": "CPU only so far",
    "kernels/int8_embedding_bag": "CPU only so far",
    "kernels/int8_pack": "the packed layout is the CPU kernels' own; Triton reads plain [N, K]",
    "reference/int8_pack": "it moves bytes and computes nothing; its test writes the layout out",
}

PARTS = {
    "cpu": "csrc/cpu/{}.cpp",
    "cuda": "csrc/cuda/{}.cu",
    "torch": "csrc/torch/{}.cpp",
    "kernels": "kernels/{}.py",
    "ops": "python/trimtab/ops/{}.py",
    "reference": "python/trimtab/reference/{}.py",
    "test": "tests/test_{}.py",
    "benchmark": "benchmarks/bench_{}.py",
}


def schemas():
    """{(op name without overload, stem of the file that defines it)}, from the C++ sources."""
    found = set()
    for path in sorted((CSRC / "torch").glob("*.cpp")):
        for name in re.findall(r'm\.def\(\s*"(\w+)(?:\.\w+)?\(', path.read_text()):
            found.add((name, path.stem))
    return sorted(found)


STEMS = sorted({name for name, _ in schemas()} - set(COMPANIONS))


def header_functions():
    text = "".join(path.read_text() for path in sorted(CSRC.glob("include/trimtab/*.h")))
    return set(re.findall(r"^TT_API [^;(]*?\b(tt_\w+)\(", text, re.MULTILINE))


def test_there_are_ops():
    assert {"quantize_int8", "int8_mm", "int8_linear"} <= set(STEMS)


@pytest.mark.parametrize("name,file", schemas())
def test_schema_is_in_the_file_of_its_stem(name, file):
    assert file == COMPANIONS.get(name, name)


@pytest.mark.parametrize("stem", STEMS)
def test_op_has_its_c_function(stem):
    here = f"tt_{stem}_cuda" if f"cpu/{stem}" in EXCEPTIONS else f"tt_{stem}"
    assert here in header_functions()


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("stem", STEMS)
def test_op_has_its_part(stem, part):
    path = ROOT / PARTS[part].format(stem)
    if f"{part}/{stem}" in EXCEPTIONS:
        assert not path.exists(), f"{path} exists: take it out of EXCEPTIONS"
    else:
        assert path.exists()


# --- what the libraries and objects are made of


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def needed(library):
    return re.findall(r"\(NEEDED\).*\[(.+)\]", output("readelf", "-d", str(library)))


def test_kernels_link_no_torch_and_no_openmp():
    """libc alone: a second OpenMP would fight torch's for the cores, a libstdc++ the caller's."""
    assert not [n for n in needed(LIB / "libtrimtab.so") if not re.match(r"lib(c|m)\.|ld-linux", n)]


@pytest.mark.parametrize("library", sorted(LIB.parent.rglob("*.so")), ids=lambda path: path.name)
def test_no_library_links_openmp(library):
    assert not [name for name in needed(library) if re.search("gomp|iomp|libomp", name)]


def test_numpy_module_links_no_torch():
    (module,) = LIB.parent.glob(f"_numpy.{sys.implementation.cache_tag}*.so")
    assert not [name for name in needed(module) if re.search("torch|c10", name)]


def shown(library):
    lines = output("nm", "-D", "--defined-only", str(library)).splitlines()
    return {line.split()[-1] for line in lines}


def is_cuda(function):
    return function.endswith(("_cuda", "_cuda_workspace"))


def test_library_shows_the_c_interface_and_nothing_else():
    assert shown(LIB / "libtrimtab.so") == {f for f in header_functions() if not is_cuda(f)}


CUDA_LIBRARY = LIB / "libtrimtab_cuda.so"
with_cuda = pytest.mark.skipif(
    not CUDA_LIBRARY.exists(), reason="libtrimtab_cuda.so is not built: no nvcc, or TRIMTAB_CUDA=0"
)


@with_cuda
def test_cuda_library_shows_its_part_and_nothing_else():
    assert shown(CUDA_LIBRARY) == {f for f in header_functions() if is_cuda(f)}


@with_cuda
def test_cuda_library_needs_no_driver():
    """It links libtrimtab.so and libc; without a driver it loads, and says so in tt_last_error."""
    others = [
        n for n in needed(CUDA_LIBRARY) if not re.match(r"lib(c|m|rt|dl|pthread)\.|ld-linux", n)
    ]
    assert others == ["libtrimtab.so"]
    code = (
        "import ctypes\n"
        f"cuda, plain = (ctypes.CDLL({str(LIB)!r} + '/' + n) for n in ('libtrimtab_cuda.so', 'libtrimtab.so'))\n"
        "plain.tt_last_error.restype = ctypes.c_char_p\n"
        "print(cuda.tt_supported_cuda(), plain.tt_last_error().decode())"
    )
    answer = python(code).strip()
    assert answer == "0" or answer.startswith("2 tt_supported_cuda: expected a ")


def test_torch_headers_only_in_the_adapter():
    including = re.compile(r'^\s*#\s*include\s*[<"](torch|ATen|c10)/', re.MULTILINE)
    sources = [path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    outside = [path for path in sources if path.parent != CSRC / "torch"]
    assert len(outside) > 20
    assert not [str(path) for path in outside if including.search(path.read_text())]


def test_no_global_instruction_set():
    text = (CSRC / "CMakeLists.txt").read_text()
    assert not re.search(r"add_compile_options\([^)]*-m(arch|avx|amx)|CMAKE_CXX_FLAGS[^)]*-m", text)


def objects():
    """Compiled files of libtrimtab.so, {name: path}, of the build this package came from."""
    build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}" / "CMakeFiles" / "trimtab.dir"
    return {path.name.partition(".")[0]: path for path in sorted(build.rglob("*.cpp.o"))}


ISA_FILES = [
    path.stem for path in sorted(CSRC.glob("cpu/*.cpp")) if path.stem.rpartition("_")[2] in ISAS
]


@pytest.mark.parametrize("name", ISA_FILES)
def test_no_avx_code_leaks(name):
    """A file compiled with -m flags defines its own kernels and nothing that is shared by name.

    An inline or template function with external linkage is a weak symbol: the linker keeps one copy,
    perhaps the one compiled for AVX-512, and a CPU without it dies in the scalar path. Neither may it
    have static constructors, which run when the library is loaded.
    """
    if name not in objects():
        pytest.skip("not built in this checkout")
    leaks = []
    for line in output("nm", "-C", "--defined-only", str(objects()[name])).splitlines():
        _, kind, symbol = line.split(maxsplit=2)
        named = re.match(r"trimtab::\w+?_?(avx2|avxvnni|avx512|amx)\b", symbol, re.IGNORECASE)
        own = kind in "TRDB" and named
        # DW.ref...: a pointer to the C++ runtime, not code.
        shared = kind not in "trdbn" and not own and not symbol.startswith("DW.ref.")
        if shared or symbol.startswith("_GLOBAL__sub_I"):
            leaks.append(f"{kind} {symbol}")
    assert not leaks


# --- importing


def python(code, *options, env=None):
    command = [sys.executable, *options, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_import_is_cheap():
    """At most 50 ms of processor time beyond torch, layers and swap_ included; the best of six.

    With bytecode, which the first run may write: compiling the modules costs twice their import.
    """
    code = (
        "import time, torch\n"
        "start = time.process_time()\n"
        "import trimtab\n"
        "trimtab.ops, trimtab.nn, trimtab.swap_\n"
        "print(time.process_time() - start)"
    )
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    times = [float(python(code, env=env))]
    while min(times) >= 0.05 and len(times) < 6:
        times.append(float(python(code, env=env)))
    assert min(times) < 0.05, f"importing trimtab.ops, trimtab.nn and swap_ takes {times} s"


def test_import_is_silent_and_leaves_cuda_alone():
    code = (
        "import warnings, torch\n"
        "warnings.simplefilter('error')\n"
        "import trimtab\n"
        "trimtab.ops, trimtab.nn, trimtab.kernels, trimtab.swap_\n"
        "assert not torch.cuda.is_initialized()"
    )
    assert python(code) == ""


def test_import_alone_brings_no_torch():
    code = "import sys, trimtab, trimtab.numpy\nassert 'torch' not in sys.modules"
    assert python(code, "-W", "error") == ""


# --- one version, pinned tools


def test_one_version():
    project = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    cmake = re.search(r"project\(trimtab VERSION (\S+)", (CSRC / "CMakeLists.txt").read_text())
    assert project and cmake
    assert project[1] == cmake[1] == trimtab.__version__


def test_constraints_pin_every_extra():
    text = (ROOT / "pyproject.toml").read_text()
    extras = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    wanted = set(re.findall(r'"([\w-]+)"', extras)) | {"torch"}
    assert wanted - set(pinned) == set()
