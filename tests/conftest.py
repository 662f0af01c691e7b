"""Fixtures for all tests. `isa` runs a test once for every instruction set this CPU has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from trimtab import ops


@pytest.fixture(params=ops.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    ops.set_isa(request.param)
    yield request.param
    ops.set_isa(None)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
