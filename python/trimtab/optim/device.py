"""Who makes the step of a device's parameters: C++ for a CPU, CUDA C++ or Triton for a GPU.

A runner is handed a whole tt_optim_call, or tt_adafactor_call, each step and keeps between steps
what its device needs: on CUDA the table of tensors, which csrc/cuda reads there. Nothing in a step
of a GPU waits for it.
"""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..ops import backend
from . import library

AnyCall = library.Call | library.AdafactorCall


class Runner(Protocol):
    waits: bool  # a step is made when step() returns

    def step(self, call: AnyCall, *arrays: np.ndarray) -> None:
        """``arrays``: what the call's tensors, groups and shapes point to."""

    def parts(self, call: AnyCall, *arrays: np.ndarray) -> Parts:
        """For a step in parts: what makes them."""


class Parts(Protocol):
    def step(self, call: AnyCall) -> None:
        """Adafactor's; the call says which."""

    def squares(self, call: library.Call, squares: Tensor) -> None:
        """LAMB's first one, to float64 [tensors, 2], which are 0."""

    def step_by(self, call: library.Call, squares: Tensor) -> None:
        """Its second one, from them."""


class HostRunner:
    """tt_optim_step and tt_adafactor_step on torch's threads."""

    waits = True

    def step(self, call: AnyCall, *arrays: np.ndarray) -> None:
        _HostParts().step(call)

    def parts(self, call: AnyCall, *arrays: np.ndarray) -> Parts:
        return _HostParts()


class _HostParts:
    def step(self, call: AnyCall) -> None:
        if isinstance(call, library.AdafactorCall):
            library.adafactor_step(call)
        else:
            library.step(call)

    def squares(self, call: library.Call, squares: Tensor) -> None:
        library.squares(call, squares.data_ptr())

    def step_by(self, call: library.Call, squares: Tensor) -> None:
        library.step_by(call, squares.data_ptr())


# --- a GPU


class CudaFunctions(Protocol):
    """libtrimtab_cuda.so's C functions, or those of kernels/{optim_step,adafactor}.py.

    RuntimeError if one refuses.
    """

    def sizes(self, call: AnyCall) -> tuple[int, int]: ...
    def table(self, call: AnyCall, table: Tensor) -> None: ...
    def step(self, call: AnyCall, table: Tensor, workspace: Tensor, stream: int | None) -> None: ...
    def squares(
        self, call: library.Call, table: Tensor, workspace: Tensor, found: Tensor, stream: int
    ) -> None: ...
    def step_by(
        self, call: library.Call, table: Tensor, workspace: Tensor, given: Tensor, stream: int
    ) -> None: ...


class Queue:
    """One GPU as torch sees it: its current stream, its allocator, captures of graphs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def guard(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device)

    def stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream

    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def pinned(self, size: int) -> Tensor:
        # torch's cache of pinned memory hands a block out again only after the copies from it.
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)


@dataclass
class Buffers:
    """A table on the device, what it was made of, and the memory of the steps that read it."""

    stream: int
    options: tuple[int, ...]
    arrays: tuple[np.ndarray, ...]
    table: Tensor
    workspace: Tensor

    def serve(self, call: AnyCall, arrays: tuple[np.ndarray, ...], stream: int) -> bool:
        return (
            self.stream == stream
            and self.options == _options(call)
            and all(map(_same_bytes, self.arrays, arrays))
        )


RESERVE = 2  # captures without a step between them
# Tables that captured graphs copy from at every replay. Nothing says when a graph is gone.
_captured: list[Tensor] = []


class CudaRunner:
    """tt_optim_step_cuda, or tt_adafactor_step_cuda, on the current stream.

    The table is copied to the device when a pointer or a number in it has changed, from pinned
    memory: no step waits. Under CUDA graph capture all memory comes from the graph's pool, but for the
    pinned table, which a step before must have set aside.
    """

    waits = False

    def __init__(self, queue: Queue, functions: CudaFunctions) -> None:
        self.queue, self.functions = queue, functions
        self.buffers: Buffers | None = None
        self.reserve: list[Tensor] = []  # pinned tables for captures

    def step(self, call: AnyCall, *arrays: np.ndarray) -> None:
        self.parts(call, *arrays).step(call)

    def parts(self, call: AnyCall, *arrays: np.ndarray) -> Parts:
        with self.queue.guard():
            stream, capturing = self.queue.stream(), self.queue.is_capturing()
            buffers = self.buffers
            if capturing or buffers is None or not buffers.serve(call, arrays, stream):
                buffers = self._upload(call, arrays, stream, capturing)
            if not capturing:
                self.buffers = buffers
                while len(self.reserve) < RESERVE:
                    self.reserve.append(self.queue.pinned(buffers.table.numel()))
        return _CudaParts(self, buffers)

    def _upload(
        self,
        call: AnyCall,
        arrays: tuple[np.ndarray, ...],
        stream: int,
        capturing: bool,
    ) -> Buffers:
        size, workspace_size = self.functions.sizes(call)
        old = None if capturing else self.buffers
        if capturing:
            self.reserve = [host for host in self.reserve if host.numel() >= size]
            if not self.reserve:
                raise RuntimeError(
                    "optim_step: a CUDA graph is being captured; expected a step of the same "
                    f"parameters before, outside of it, and one after every {RESERVE} captures"
                )
            host = self.reserve.pop()[:size]
            _captured.append(host)
        else:
            host = self.queue.pinned(size)
        self.functions.table(call, host)
        # What the steps before still read on this stream is overwritten after them.
        if old is not None and old.stream == stream and old.table.numel() == size:
            table, workspace = old.table, old.workspace
            if workspace.numel() != workspace_size:
                workspace = self.queue.empty(workspace_size)
        else:
            table, workspace = self.queue.empty(size), self.queue.empty(workspace_size)
        table.copy_(host, non_blocking=True)
        kept = tuple(array.copy() for array in arrays)
        return Buffers(stream, _options(call), kept, table, workspace)


class _CudaParts:
    """On one stream, with one table and workspace."""

    def __init__(self, runner: CudaRunner, buffers: Buffers) -> None:
        self.guard, self.functions = runner.queue.guard, runner.functions
        self.memory, self.stream = (buffers.table, buffers.workspace), buffers.stream

    def step(self, call: AnyCall) -> None:
        with self.guard():
            self.functions.step(call, *self.memory, self.stream)

    def squares(self, call: library.Call, squares: Tensor) -> None:
        with self.guard():
            self.functions.squares(call, *self.memory, squares, self.stream)

    def step_by(self, call: library.Call, squares: Tensor) -> None:
        with self.guard():
            self.functions.step_by(call, *self.memory, squares, self.stream)


def _options(call: AnyCall) -> tuple[int, ...]:
    """What a table depends on beside tensors, groups and shapes."""
    if isinstance(call, library.AdafactorCall):
        return ()
    return call.rule, call.torch_tails


def _same_bytes(left: np.ndarray, right: np.ndarray) -> bool:
    return left.nbytes == right.nbytes and not library.memory_differs(
        left.ctypes.data, right.ctypes.data, left.nbytes
    )


class _Loaded:
    """CudaFunctions of libtrimtab_cuda.so."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(backend.LIBRARY))
        self._library.tt_last_error.restype = ctypes.c_char_p

    def _check(self, status: int) -> None:
        if status:
            raise RuntimeError(self._library.tt_last_error().decode())

    def _call(self, function: str, call: AnyCall, *arguments: Any) -> None:
        name = f"tt_{c_name(call)}{function}_cuda"
        self._check(getattr(self._library, name)(ctypes.byref(call), *arguments))

    def sizes(self, call: AnyCall) -> tuple[int, int]:
        table, workspace = ctypes.c_int64(), ctypes.c_int64()
        self._call("_sizes", call, ctypes.byref(table), ctypes.byref(workspace))
        return table.value, workspace.value

    def table(self, call: AnyCall, table: Tensor) -> None:
        self._call("_table", call, ctypes.c_void_p(table.data_ptr()))

    def step(self, call: AnyCall, table: Tensor, workspace: Tensor, stream: int | None) -> None:
        pointers = (table.data_ptr(), workspace.data_ptr(), stream)
        last = "_step" if isinstance(call, library.AdafactorCall) else ""
        self._call(last, call, *map(ctypes.c_void_p, pointers))

    def squares(
        self, call: library.Call, table: Tensor, workspace: Tensor, found: Tensor, stream: int
    ) -> None:
        pointers = map(ctypes.c_void_p, (table.data_ptr(), workspace.data_ptr(), found.data_ptr()))
        arguments = ctypes.byref(call), *pointers, ctypes.c_void_p(stream)
        self._check(self._library.tt_optim_squares_cuda(*arguments))

    def step_by(
        self, call: library.Call, table: Tensor, workspace: Tensor, given: Tensor, stream: int
    ) -> None:
        pointers = map(ctypes.c_void_p, (table.data_ptr(), workspace.data_ptr(), given.data_ptr()))
        arguments = ctypes.byref(call), *pointers, ctypes.c_void_p(stream)
        self._check(self._library.tt_optim_step_by_cuda(*arguments))


def c_name(call: AnyCall) -> str:
    """Between tt_ and what a function of csrc/cuda does with the call."""
    return "adafactor" if isinstance(call, library.AdafactorCall) else "optim_step"


_functions: CudaFunctions | None = None


def _cuda_functions() -> CudaFunctions:
    global _functions
    if _functions is None:
        _functions = _Loaded()
    return _functions


# --- the choice


def why_not_cuda(device: torch.device) -> str:
    """Why CUDA C++ cannot serve a device; empty if it does."""
    if device.type != "cuda":
        return f"{device} is no NVIDIA GPU"
    if problem := backend.cuda_problem():
        return problem
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < backend.LEAST_CAPABILITY:
        return f"compute capability {major}.{minor} is below 8.0"
    return ""


def runner(name: str, device: torch.device) -> Runner:
    """The runner of a device, by ``TRIMTAB_BACKEND``; RuntimeError where there is none."""
    if device.type == "cpu":
        return HostRunner()
    forced = backend.FORCED
    if device.type in ("meta", "mps"):
        raise RuntimeError(f"{name}: expected tensors on a CPU or a GPU, got {device}")
    if forced == "cpu":
        raise RuntimeError(
            f"{name}: expected tensors on the CPU, as TRIMTAB_BACKEND=cpu says, got {device}"
        )
    if forced == "reference":
        raise RuntimeError(
            f"{name}: optimizers have no NumPy reference, which TRIMTAB_BACKEND=reference asks for; "
            f"expected cuda or triton for tensors on {device}"
        )
    problem = "TRIMTAB_BACKEND=triton" if forced == "triton" else why_not_cuda(device)
    if not problem:
        return CudaRunner(Queue(device), _cuda_functions())
    if forced == "cuda":
        raise RuntimeError(f"{name}: TRIMTAB_BACKEND=cuda: {problem}")
    return _triton_runner(name, device, problem)


def _triton_runner(name: str, device: torch.device, problem: str) -> Runner:
    try:
        from ..kernels import load

        if name == "Adafactor":
            dtypes = library.TENSOR, library.GROUP, library.ADAFACTOR_GROUP, library.ADAFACTOR_SHAPE
            make = partial(load("adafactor"), library.Call, dtypes)
        else:
            make = partial(load("optim_step"), library.TENSOR, library.GROUP)
    except (ImportError, ValueError) as error:
        raise RuntimeError(
            f"{name}: nothing here steps parameters on {device}: no CUDA C++ ({problem}), no Triton "
            f"({error})"
        ) from error
    return CudaRunner(Queue(device), make(device))
