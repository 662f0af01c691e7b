"""trimtab.optim on the SIMT machine: CPU tensors take the way of a GPU's, through csrc/cuda.

with optim_on_sim.as_gpu(sim) as gpu:      # until its end a CPU's parameters are a GPU's
    trimtab.optim.AdamW(params).step()
    gpu.uploads                            # how often a table went to the device
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import cuda_sim
import numpy as np
import sim_call
import torch
from torch import Tensor

from trimtab.optim import device, library

BYTES = {0: 4, 1: 2, 2: 2, library.DYNAMIC8: 1}


class Span:
    """Memory at an address, as far as Simulator.call looks at a tensor."""

    def __init__(self, address: int, size: int) -> None:
        self.address, self.shape = address, (size,)

    def data_ptr(self) -> int:
        return self.address

    def numel(self) -> int:
        return self.shape[0]

    def stride(self) -> tuple[int]:
        return (1,)

    def element_size(self) -> int:
        return 1


def spans(rows: np.ndarray, shapes: np.ndarray | None = None) -> tuple[list[Span], list[Span]]:
    """What kernels may read, and what they may write, of these tensors; shapes: adafactor's."""
    reads, writes = [], []
    for at in np.flatnonzero(rows["grad"] != 0):
        row = rows[at]
        n = int(row["numel"])
        sizes = {name: BYTES[int(row[f"{name}_dtype"])] for name in ("param", "grad", "copy")}
        for name, size in {**sizes, "ema": 4, "master": 2}.items():
            writes.append(Span(int(row[name]), n * size))
        lengths = [n] * library.STATES
        if shapes is not None and shapes[at]["batch"]:
            lengths[:2] = (
                int(shapes[at]["batch"] * shapes[at][name]) for name in ("rows", "columns")
            )
        for state, length in zip(row["state"], lengths):
            writes.append(Span(int(state), length * BYTES[int(row["state_dtype"])]))
        for scale in row["scale"]:
            writes.append(Span(int(scale), -(-n // 256) * 4))
        writes += [Span(int(row[name]), 4) for name in ("step", "product")]
        reads.append(Span(int(row["mask"]), n))
    return [[s for s in list_ if s.address and s.numel()] for list_ in (reads, writes)]  # type: ignore[return-value]


def array_at(address: int, count: int, dtype: np.dtype) -> np.ndarray:
    return np.frombuffer(ctypes.string_at(address, count * dtype.itemsize), dtype)


def garbage(size: int) -> Tensor:
    whole = sim_call.garbage(size + 64, dtype=torch.uint8)
    start = -whole.data_ptr() % 64
    return whole[start : start + size]


class Gpu(device.Queue):
    """One made of the simulator; counts what a real one would do."""

    def __init__(self, sim: cuda_sim.Simulator) -> None:
        super().__init__(torch.device("cpu"))
        self.sim = sim
        self.uploads = self.pinned_tables = self.allocations = 0
        self.captures = False
        self.current = 7
        self.rows: np.ndarray | None = None  # of the table that was made last

    # device.Queue

    def guard(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def stream(self) -> int:
        return self.current

    def is_capturing(self) -> bool:
        return self.captures

    def pinned(self, size: int) -> Tensor:
        assert not self.captures, "cudaHostAlloc during a capture"
        self.pinned_tables += 1
        return garbage(size)

    def empty(self, size: int) -> Tensor:
        self.allocations += 1
        return garbage(size)

    # device.CudaFunctions

    def sizes(self, call: device.AnyCall) -> tuple[int, int]:
        table, workspace = ctypes.c_int64(), ctypes.c_int64()
        arguments = ctypes.byref(call), ctypes.byref(table), ctypes.byref(workspace)
        name = f"tt_{device.c_name(call)}_sizes_cuda"
        self.sim.call(name, *arguments, reads=[], writes=[])
        return table.value, workspace.value

    def table(self, call: device.AnyCall, table: Tensor) -> None:
        self.uploads += 1
        name = f"tt_{device.c_name(call)}_table_cuda"
        self.sim.call(name, ctypes.byref(call), table, reads=[], writes=[])

    def step(
        self, call: device.AnyCall, table: Tensor, workspace: Tensor, stream: int | None
    ) -> None:
        assert stream == self.current
        name, shapes, given, sums = "tt_optim_step_cuda", None, call, []
        if isinstance(given, library.AdafactorCall):
            name = "tt_adafactor_step_cuda"
            call = library.Call.from_address(given.step)
            shapes = array_at(given.shapes, call.n_tensors, library.ADAFACTOR_SHAPE)
            if given.sums:
                last = shapes[-1]
                n = last["sums_at"] + 2 + last["batch"] * (1 + last["rows"] + last["columns"])
                sums = [Span(given.sums, 8 * int(n))]
        reads, writes = spans(array_at(call.tensors, call.n_tensors, library.TENSOR), shapes)
        groups = array_at(call.groups, call.n_groups, library.GROUP)
        pointers = (call.grad_scale, call.found_inf, call.given_norm, *groups["lr_tensor"].tolist())
        reads += [Span(pointer, 4) for pointer in set(pointers) if pointer]
        writes += [Span(p, size) for p, size in ((call.norm, 4), (call.skipped, 8)) if p]
        self.sim.call(
            *(name, ctypes.byref(given), table, workspace, ctypes.c_void_p(None)),
            reads=[table, *reads],
            writes=[workspace, *writes, *sums],
        )

    def squares(
        self, call: library.Call, table: Tensor, workspace: Tensor, found: Tensor, stream: int
    ) -> None:
        self._part("tt_optim_squares_cuda", call, table, workspace, found)

    def step_by(
        self, call: library.Call, table: Tensor, workspace: Tensor, given: Tensor, stream: int
    ) -> None:
        self._part("tt_optim_step_by_cuda", call, table, workspace, given)

    def _part(
        self, name: str, call: library.Call, table: Tensor, workspace: Tensor, squares: Tensor
    ) -> None:
        reads, writes = spans(array_at(call.tensors, call.n_tensors, library.TENSOR))
        reads += [Span(pointer, 4) for pointer in (call.grad_scale, call.found_inf) if pointer]
        writes += [Span(call.skipped, 8)] if call.skipped else []
        arguments = (ctypes.byref(call), table, workspace, squares, ctypes.c_void_p(None))
        self.sim.call(name, *arguments, reads=[table, *reads], writes=[workspace, squares, *writes])


@contextmanager
def as_gpu(sim: cuda_sim.Simulator) -> Iterator[Gpu]:
    gpu, whole = Gpu(sim), device.runner
    device.runner = lambda name, place: device.CudaRunner(gpu, gpu)
    try:
        yield gpu
    finally:
        device.runner = whole
