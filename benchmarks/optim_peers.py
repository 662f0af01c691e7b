"""The optimizer steps that bench_optim times, and who else can do them.

A peer is a function of a case and of parameters with gradients that returns a step to call, or raises
Absent with the reason why it can't here.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peers import load
from torch.nn import Parameter

from trimtab import optim

Step = Callable[[], Any]


@dataclass(frozen=True)
class Model:
    """``count`` tensors of one size; ``apart``: a parameter group for each."""

    name: str
    count: int
    size: tuple[int, ...]
    apart: bool = False

    @property
    def numel(self) -> int:
        return self.count * torch.Size(self.size).numel()

    def parameters(self, dtype: torch.dtype) -> list[Parameter]:
        generator = torch.Generator().manual_seed(0)
        params = []
        for _ in range(self.count):
            p = Parameter(torch.randn(self.size, generator=generator).to(dtype))
            p.grad = torch.randn(self.size, generator=generator).to(dtype)
            params.append(p)
        return params

    def groups(self, params: list[Parameter]) -> list[Any]:
        return [{"params": [p]} for p in params] if self.apart else list(params)


@dataclass(frozen=True)
class Case:
    """One optimizer: torch's options, ours beside them, and what stands in memory for a parameter."""

    name: str
    rule: str
    peers: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)
    clipped: bool = False
    dtype: torch.dtype = torch.float32
    # fp32 arrays read, and of those written; then the same for arrays of a byte a parameter. None: no
    # loop has its traffic.
    traffic: tuple[int, int, int, int] | None = None


LR = 1e-4
TORCH = ("torch fused", "torch foreach", "torch single")
UNFUSED = ("torch foreach", "torch single")
TORCH_KINDS = {
    "torch fused": {"fused": True},
    "torch foreach": {"foreach": True},
    "torch single": {"foreach": False},
    "torch": {},  # Muon has no choice of kinds
}
ADAMW = (4, 3, 0, 0)
MOMENTUM = (3, 2, 0, 0)
BF16 = torch.bfloat16

# The bars: on large models, many small tensors and many groups.
CASES = (
    Case("AdamW fp32", "AdamW", (*TORCH, "DeepSpeedCPUAdam"), traffic=ADAMW),
    Case("AdamW fp32 clipped", "AdamW", TORCH, clipped=True),
    Case("AdamW bf16", "AdamW", TORCH, dtype=BF16, traffic=ADAMW),
    Case("SGD momentum fp32", "SGD", TORCH, {"momentum": 0.9}, traffic=MOMENTUM),
)
# Less memory, on one tensor; torch's fused AdamW on fp32 is what all are measured by.
SMALL_STATE = (
    Case("AdamW 8-bit state", "AdamW", ("torch fused fp32", "bitsandbytes 8-bit"),
         ours={"state_dtype": "int8"}, traffic=(2, 1, 2, 2)),
    Case("AdamW 8-bit state, stochastic", "AdamW", ("torch fused fp32",),
         ours={"state_dtype": "int8", "rounding": "stochastic"}, traffic=(2, 1, 2, 2)),
    Case("AdamW bf16, remainder", "AdamW", ("torch fused fp32", "torch fused"),
         ours={"master": "remainder"}, dtype=BF16),
    Case("AdamW bf16, Kahan", "AdamW", ("torch fused fp32", "torch fused"),
         ours={"master": "kahan"}, dtype=BF16),
    Case("AdamW bf16, remainder, 8-bit state", "AdamW", ("torch fused fp32", "torch fused"),
         ours={"master": "remainder", "state_dtype": "int8"}, dtype=BF16),
)  # fmt: skip
RULES = (
    Case("SGD", "SGD", TORCH, traffic=(2, 1, 0, 0)),
    Case("Adagrad", "Adagrad", TORCH, traffic=MOMENTUM),
    Case("RMSprop", "RMSprop", UNFUSED, traffic=MOMENTUM),
    Case("NAdam", "NAdam", UNFUSED, traffic=ADAMW),
    Case("RAdam", "RAdam", UNFUSED, traffic=ADAMW),
    Case("Adamax", "Adamax", UNFUSED, traffic=ADAMW),
    Case("Lion", "Lion", ("bitsandbytes",), traffic=MOMENTUM),
    Case("LAMB", "LAMB", ()),
)
# Three passes over gradients, one that reads parameters and one that writes them.
ADAFACTOR = Case("Adafactor", "Adafactor", UNFUSED, traffic=(5, 1, 0, 0))
MUON = Case("Muon", "Muon", ("torch",))


def trimtab_step(case: Case, model: Model, params: list[Parameter], lr: float = LR) -> Step:
    options = {"lr": lr, **case.options, **case.ours}
    if case.clipped:
        options["max_grad_norm"] = 1.0
    return getattr(optim, case.rule)(model.groups(params), **options).step


def torch_step(
    case: Case, model: Model, params: list[Parameter], kind: str, lr: float = LR
) -> Step:
    options = {"lr": lr, **case.options, **TORCH_KINDS[kind]}
    step = getattr(torch.optim, case.rule)(model.groups(params), **options).step
    if not case.clipped:
        return step

    def clipped() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        step()

    return clipped


def widened(params: list[Parameter]) -> list[Parameter]:
    wide = [Parameter(p.detach().to(torch.float32, copy=True)) for p in params]
    for p, q in zip(wide, params):
        p.grad = q.grad.float()  # type: ignore[union-attr]
    return wide


def peer_step(name: str, case: Case, model: Model, params: list[Parameter], lr: float = LR) -> Step:
    if name in TORCH_KINDS:
        return torch_step(case, model, params, name, lr)
    if name == "torch fused fp32":
        return torch_step(case, model, widened(params), "torch fused", lr)
    if name.startswith("bitsandbytes"):
        package = load("bitsandbytes")
        rule = case.rule + ("8bit" if name.endswith("8-bit") else "")
        return getattr(package.optim, rule)(params, **{"lr": lr, **case.options}).step
    package = load("deepspeed.ops.adam")
    return package.DeepSpeedCPUAdam(params, lr=lr, weight_decay=0.01, adamw_mode=True).step


def check(case: Case, peer: str) -> None:
    """Three steps on a small model, ours and the peer's: not timed if they end far apart.

    bf16 weights err by their width, and 8-bit states by a code's, which differ between libraries.
    """
    model, lr = Model("check", 3, (40, 130)), 0.01
    ours, theirs = model.parameters(case.dtype), model.parameters(case.dtype)
    start = [p.detach().to(torch.float32, copy=True) for p in ours]
    if peer == "torch fused fp32":
        theirs, peer = widened(theirs), "torch fused"
    ahead = trimtab_step(case, model, ours, lr)
    behind = peer_step(peer, case, model, theirs, lr)
    for _ in range(3):
        ahead()
        behind()
    error = sum(float((p.float() - q.float()).square().sum()) for p, q in zip(ours, theirs))
    moved = sum(float((p.float() - q).square().sum()) for p, q in zip(ours, start))
    close = 0.5 if case.dtype == BF16 else 0.2 if "state_dtype" in case.ours else 1e-3
    if not 0 <= error**0.5 < close * moved**0.5:
        raise SystemExit(
            f"bench_optim: {case.name}: three steps end {error**0.5:.2g} away from those of {peer}, "
            f"after {moved**0.5:.2g}: not timed"
        )


# --- the streaming loop


@cache
def stream_library() -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise RuntimeError("the streaming loop needs a C++ compiler: no c++ or g++, CXX not set")
    with tempfile.TemporaryDirectory(prefix="trimtab-stream-") as folder:
        library = Path(folder) / "stream.so"
        source = Path(__file__).with_name("stream.cpp")
        # -ffast-math: the sum in any order, so that it vectorizes
        flags = ["-O3", "-march=native", "-ffast-math", "-std=c++17", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, "-pthread", str(source), "-o", str(library)], check=True)
        lib = ctypes.CDLL(str(library))
    lib.stream.restype = ctypes.c_double
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    lib.stream.argtypes = [pointer, *[integer] * 4, ctypes.c_int64, integer]
    return lib


def stream(traffic: tuple[int, int, int, int], floats: int, threads: int) -> Callable[[], float]:
    """A candidate for interleave: seconds of one pass over arrays of so many floats."""
    wide, written, narrow, narrow_written = traffic
    tensors = [torch.zeros(floats) for _ in range(wide)]
    tensors += [torch.zeros(floats // 4) for _ in range(narrow)]
    pointers = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))

    def call(kept: object = tensors) -> float:
        return float(
            stream_library().stream(
                pointers, wide, written, narrow, narrow_written, floats, threads
            )
        )

    return call


def traffic_bytes(traffic: tuple[int, int, int, int]) -> int:
    """Of a parameter in fp32, a step."""
    wide, written, narrow, narrow_written = traffic
    return 4 * (wide + written) + narrow + narrow_written
