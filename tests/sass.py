"""Reads libtrimtab_cuda.so: the instructions and resources of each of its kernels.

With cuobjdump and nvdisasm from the triton wheel: no GPU, nothing compiled again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import trimtab

LIBRARY = Path(trimtab.get_library_dir()) / "libtrimtab_cuda.so"
CACHE = Path(__file__).resolve().parents[1] / "build" / "sass"

_triton = importlib.util.find_spec("triton")
TOOLS = Path(_triton.origin).parent / "backends/nvidia/bin" if _triton and _triton.origin else None


def tool(name: str, *arguments: object, folder: Path | None = None) -> str:
    """What cuobjdump or nvdisasm says, run in that folder."""
    assert TOOLS is not None
    command = [str(TOOLS / name), *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert run.returncode == 0, run.stderr
    return run.stdout


def demangled(names: list[str]) -> list[str]:
    """Without namespaces, result and arguments: ``int8_mm_sm90<256, false, false>``."""
    run = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    short = re.sub(r"trimtab::|\(anonymous namespace\)::", "", run.stdout).splitlines()
    return [re.sub(r"^void ", "", name).rpartition("(")[0] for name in short]


# A kernel's first line, and an opcode behind its address and predicate.
SASS_LINE = re.compile(
    r"^\.text\.(\S+):$|^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.M
)


def opcodes(cubin: Path) -> dict[str, Counter[str]]:
    """{mangled name: {opcode: count}}"""
    found: dict[str, Counter[str]] = {}
    counts: Counter[str] = Counter()
    # By nvdisasm itself and without its analysis of branches: a third of cuobjdump -sass's time.
    for line in SASS_LINE.finditer(tool("nvdisasm", "-c", "-ndf", cubin)):
        if line[1]:
            counts = found[line[1]] = Counter()
        else:
            counts[line[2]] += 1
    return found


def read_library() -> list[dict[str, Any]]:
    """A dict a kernel and architecture: arch, name, instructions {opcode: count}, REG, STACK, ..."""
    kernels: dict[tuple[str, str], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        tool("cuobjdump", "-xelf", "all", LIBRARY, folder=Path(folder))
        cubins = sorted(Path(folder).iterdir(), key=lambda path: -path.stat().st_size)
        for cubin, found in zip(cubins, pool.map(opcodes, cubins), strict=True):
            arch = cubin.name.split(".")[-2].removesuffix("a")
            for mangled, counts in found.items():
                kernels[arch, mangled] = {"arch": arch, "instructions": counts}
    for kernel, name in zip(kernels.values(), demangled([m for _, m in kernels]), strict=True):
        kernel["name"] = name
    arch = mangled = ""
    for line in tool("cuobjdump", "-res-usage", LIBRARY).splitlines():
        if found := re.match(r"\s*arch = (\S+)", line):
            arch = found[1].removesuffix("a")
        elif found := re.match(r"\s*Function (.+):$", line):
            mangled = found[1]
        elif "REG:" in line:
            used = re.findall(r"(REG|STACK|LOCAL):(\d+)", line)
            kernels[arch, mangled] |= {k: int(v) for k, v in used}
    return list(kernels.values())


def kernels_of_library() -> list[dict[str, Any]]:
    """read_library, kept under build/sass by the hash of the library and of this file."""
    content = LIBRARY.read_bytes() + Path(__file__).read_bytes()
    kept = CACHE / f"{hashlib.sha256(content).hexdigest()[:16]}.json"
    if not kept.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        for old in CACHE.glob("*.json"):
            old.unlink()
        kept.write_text(json.dumps(read_library()))
    return json.loads(kept.read_text())
