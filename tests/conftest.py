"""Fixtures for all tests.

`isa` runs a test once for every instruction set this CPU has. `implementation` adds the CUDA kernels, on the
SIMT machine as GPUs of sm_80 and of sm_90: for tests of ops that have one, and that ask for equal bits.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import cuda_sim
import pytest
import simt_build
import torch

from trimtab import ops


@pytest.fixture(params=ops.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    ops.set_isa(request.param)
    yield request.param
    ops.set_isa(None)


@pytest.fixture(params=[*ops.available_isas(), "cuda_sim_sm80", "cuda_sim_sm90"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    if not request.param.startswith("cuda_sim_sm"):
        ops.set_isa(request.param)
        yield request.param
        ops.set_isa(None)
        return
    if shutil.which(simt_build.compiler()) is None:
        pytest.skip(f"no {simt_build.compiler()} to compile csrc/cuda with")
    sim = cuda_sim.Simulator(arch=int(request.param.removeprefix("cuda_sim_sm")))
    with cuda_sim.as_cpu(sim):
        yield request.param


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
