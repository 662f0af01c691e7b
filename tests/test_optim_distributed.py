"""Two processes: DDP, FSDP2 (pieces of DTensors) and ZeRO give the parameters of one process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no torch.distributed with gloo", allow_module_level=True)

import cuda_sim
import optim_checkpoints
import optim_pieces
import optim_sums
import simt_build
from optim_processes import CASES, SUMS, Processes


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Processes]]:
    kept: list[Processes] = []
    yield kept
    for processes in kept:
        processes.close()


@pytest.fixture
def both(started: list[Processes], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """The two processes; fresh ones after a test that failed, which may have left them apart."""
    if not started:
        started.append(Processes(tmp_path_factory.mktemp("gloo")))
    yield started[0]
    if started[0].failed:
        started.pop().close()


@pytest.mark.parametrize("name", CASES)
def test_ddp(name: str, both: Processes) -> None:
    both.run(optim_pieces.ddp, name)


@pytest.mark.parametrize("name", CASES)
def test_fsdp(name: str, both: Processes) -> None:
    both.run(optim_pieces.fsdp, name)


def test_fsdp_against_torch(both: Processes) -> None:
    both.run(optim_pieces.fsdp_against_torch)


def test_fsdp_in_bf16(both: Processes) -> None:
    both.run(optim_pieces.fsdp_in_bf16)


def test_fsdp_8_bit(both: Processes) -> None:
    both.run(optim_pieces.fsdp_8_bit)


def test_fsdp_8_bit_goes_on(both: Processes) -> None:
    both.run(optim_pieces.fsdp_8_bit_goes_on)


def test_clipping(both: Processes) -> None:
    both.run(optim_pieces.clipping)


def test_clipping_of_mixed_cuts(both: Processes) -> None:
    both.run(optim_pieces.clipping_of_mixed_cuts)


def test_skipping(both: Processes) -> None:
    both.run(optim_pieces.skipping)


@pytest.mark.parametrize("name", CASES)
def test_state_dict_of_the_whole(name: str, both: Processes) -> None:
    both.run(optim_checkpoints.state_dict_of_the_whole, name)


def test_state_dict_of_pieces(both: Processes) -> None:
    both.run(optim_checkpoints.state_dict_of_pieces)


@pytest.mark.parametrize("name", CASES)
def test_zero(name: str, both: Processes) -> None:
    both.run(optim_checkpoints.zero, name)


def test_zero_loads(both: Processes) -> None:
    both.run(optim_checkpoints.zero_loads)


def test_zero_refuses_what_needs_all(both: Processes) -> None:
    both.run(optim_checkpoints.zero_refuses_what_needs_all)


def test_refusals(both: Processes) -> None:
    both.run(optim_pieces.refusals)


@pytest.mark.parametrize("name", SUMS)
def test_pieces_against_the_whole(name: str, both: Processes) -> None:
    both.run(optim_sums.pieces_against_the_whole, name)


@pytest.mark.skipif(shutil.which(simt_build.compiler()) is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", ["LAMB", "Adafactor"])
def test_pieces_on_gpus(name: str, both: Processes) -> None:
    cuda_sim.Simulator()  # builds it once, not in each process
    both.run(optim_sums.pieces_on_gpus, name)


@pytest.mark.parametrize("name", SUMS)
def test_sums_under_ddp_and_fsdp(name: str, both: Processes) -> None:
    both.run(optim_sums.ddp_and_fsdp, name)


def test_pieces_to_be_summed(both: Processes) -> None:
    both.run(optim_sums.refuses_pieces_to_be_summed)
