"""Which implementation answers: ``TRIMTAB_BACKEND``, read once.

Unset, tensors on a CPU are served by C++, tensors on a GPU by CUDA C++ where this build has
libtrimtab_cuda.so and the GPU is NVIDIA's with compute capability 8.0 or later, else by Triton.
csrc/torch/cuda.cpp decides that, once a GPU.

cpu        refuses tensors on a GPU
cuda       CUDA C++ for tensors on a GPU, or an error
triton     Triton for tensors on a GPU
reference  the NumPy reference, on the CPU, for tensors anywhere: slow, to compare with
"""

import functools
import importlib.util
import os
from pathlib import Path

import torch

CHOICES = ("cpu", "cuda", "triton", "reference")
FORCED = os.environ.get("TRIMTAB_BACKEND", "")
LIBRARY = Path(__file__).parent.parent / "lib" / "libtrimtab_cuda.so"
# What the kernels of csrc/cuda ask for.
LEAST_CAPABILITY = (8, 0)


def cuda_problem() -> str:
    """Why CUDA C++ cannot answer, as far as can be told without touching a GPU; empty if it may."""
    if not LIBRARY.exists():
        return f"no {LIBRARY.name}: there was no nvcc at build time, or TRIMTAB_CUDA=0"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    return ""


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def check_forced() -> None:
    """ValueError if ``TRIMTAB_BACKEND`` names nothing, or what this installation lacks."""
    if FORCED not in ("", *CHOICES):
        raise ValueError(f"TRIMTAB_BACKEND: expected {', '.join(CHOICES)}, got {FORCED!r}")
    problem = ""
    if FORCED == "cuda":
        problem = cuda_problem()
    elif FORCED == "triton" and not has_triton():
        problem = "triton is not installed"
    if problem:
        others = [choice for choice in CHOICES if choice != FORCED]
        raise ValueError(
            f"TRIMTAB_BACKEND={FORCED}: {problem}; expected {', '.join(others)} or nothing"
        )


def describe() -> list[str]:
    """Lines that say who answers for which tensors, and why."""
    why = f"TRIMTAB_BACKEND={FORCED}" if FORCED else "TRIMTAB_BACKEND is not set"
    if FORCED == "reference":
        return [f"the NumPy reference for all tensors ({why})"]
    return [f"tensors on a CPU: C++ ({why})", f"tensors on a GPU: {_on_gpu()}"]


def _on_gpu() -> str:
    if FORCED == "cpu":
        return "refused"
    if FORCED:
        return {"cuda": "CUDA C++", "triton": "Triton"}[FORCED]
    if not torch.cuda.is_available():
        return "none, torch sees no GPU"
    problem = cuda_problem()
    if not problem:
        capability = torch.cuda.get_device_capability()
        if capability >= LEAST_CAPABILITY:
            return "CUDA C++"
        problem = f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return f"Triton, because {problem}"
