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


def spans(rows: np.ndarray) -> tuple[list[Span], list[Span]]:
    """What kernels may read, and what they may write, of these tensors."""
    reads, writes = [], []
    for row in rows[rows["grad"] != 0]:
        n = int(row["numel"])
        sizes = {name: BYTES[int(row[f"{name}_dtype"])] for name in ("param", "grad", "copy")}
        for name, size in {**sizes, "ema": 4, "master": 2}.items():
            writes.append(Span(int(row[name]), n * size))
        for state in row["state"]:
            writes.append(Span(int(state), n * BYTES[int(row["state_dtype"])]))
        for scale in row["scale"]:
            writes.append(Span(int(scale), -(-n // 256) * 4))
        writes += [Span(int(row[name]), 4) for name in ("step", "product")]
        reads.append(Span(int(row["mask"]), n))
    return [[s for s in list_ if s.address and s.numel()] for list_ in (reads, writes)]  # type: ignore[return-value]


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

    def sizes(self, call: library.Call) -> tuple[int, int]:
        table, workspace = ctypes.c_int64(), ctypes.c_int64()
        arguments = ctypes.byref(call), ctypes.byref(table), ctypes.byref(workspace)
        self.sim.call("tt_optim_step_sizes_cuda", *arguments, reads=[], writes=[])
        return table.value, workspace.value

    def table(self, call: library.Call, table: Tensor) -> None:
        self.uploads += 1
        self.sim.call("tt_optim_step_table_cuda", ctypes.byref(call), table, reads=[], writes=[])

    def step(
        self, call: library.Call, table: Tensor, workspace: Tensor, stream: int | None
    ) -> None:
        assert stream == self.current
        n, size = call.n_tensors, library.TENSOR.itemsize
        rows = np.frombuffer(ctypes.string_at(call.tensors, n * size), library.TENSOR)
        reads, writes = spans(rows)
        n, size = call.n_groups, library.GROUP.itemsize
        groups = np.frombuffer(ctypes.string_at(call.groups, n * size), library.GROUP)
        pointers = (call.grad_scale, call.found_inf, call.given_norm, *groups["lr_tensor"].tolist())
        reads += [Span(pointer, 4) for pointer in set(pointers) if pointer]
        writes += [Span(p, size) for p, size in ((call.norm, 4), (call.skipped, 8)) if p]
        self.sim.call(
            *("tt_optim_step_cuda", ctypes.byref(call), table, workspace, ctypes.c_void_p(None)),
            reads=[table, *reads],
            writes=[workspace, *writes],
        )


@contextmanager
def as_gpu(sim: cuda_sim.Simulator) -> Iterator[Gpu]:
    gpu, whole = Gpu(sim), device.runner
    device.runner = lambda name, place: device.CudaRunner(gpu, gpu)
    try:
        yield gpu
    finally:
        device.runner = whole
