"""The 8-bit codes of optimizer states: their values, rounding to nearest and to either neighbour."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trimtab import ops, optim
from trimtab.optim import memory


def table(is_signed: bool) -> np.ndarray:
    """All values by the formula, in rising order, in float64."""
    magnitudes = [0.0]
    for i in range(7):
        n = 2**i * (1 if is_signed else 2)
        magnitudes += [10.0 ** (i - 6) * (0.1 + 0.9 * (j + 0.5) / n) for j in range(n)]
    magnitudes.append(1.0)
    if not is_signed:
        return np.array(magnitudes)
    return np.array([-m for m in magnitudes[-2:0:-1]] + magnitudes)


def values(is_signed: bool) -> torch.Tensor:
    codes = torch.arange(256, dtype=torch.uint8)
    return memory.decode(codes, torch.ones(1), is_signed)


@pytest.mark.parametrize("is_signed", [True, False])
def test_code_is_the_papers(is_signed: bool, isa: str) -> None:
    want = table(is_signed)
    assert len(want) == 256
    got = values(is_signed)
    np.testing.assert_allclose(got.double().numpy(), want, rtol=2e-6, atol=0)
    x = got * 3.5
    codes, scales = memory.encode(x, is_signed)
    assert scales.tolist() == [3.5]
    assert torch.equal(codes, torch.arange(256, dtype=torch.uint8))


@pytest.mark.parametrize("is_signed", [True, False])
def test_nearest_code(is_signed: bool, isa: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100_003, generator=generator) * 10.0 ** (
        -8 * torch.rand(100_003, generator=generator)
    )
    x = x if is_signed else x.abs()
    codes, scales = memory.encode(x, is_signed)
    blocks = torch.nn.functional.pad(x, (0, -len(x) % 256)).view(-1, 256)
    assert torch.equal(scales, blocks.abs().amax(1))
    y = (blocks / scales[:, None]).flatten()[: len(x)].double().numpy()
    known = values(is_signed).double().numpy()
    best = np.abs(y[:, None] - known[None]).min(1)
    got = np.abs(y - known[codes.numpy()])
    assert (got <= best + 1e-7 * np.abs(y)).all()


@pytest.mark.parametrize("n", [1, 256, 5003])
def test_codes_of_what_codes_stand_for(n: int) -> None:
    """A block whose largest magnitude is negative, for which there is no code, keeps its values too."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(2))
    x[0] = -9.0
    x = memory.decode(*memory.encode(x, True), True)
    if n > 1:
        assert not torch.equal(memory.decode(*memory.encode(x, True), True), x)
    assert torch.equal(memory.decode(*memory.encode_again(x, True), True), x)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_not_zeroed(bad: float, isa: str) -> None:
    x = torch.ones(600)
    x[300] = bad
    back = memory.decode(*memory.encode(x, True), True)
    assert torch.equal(back.isnan(), (torch.arange(600) // 256) == 1)
    assert memory.decode(*memory.encode(torch.zeros(300), True), True).eq(0).all()


def test_instruction_sets_agree_on_all_values() -> None:
    """Dense in bits, among them subnormals, and scales without a finite inverse."""
    bits = torch.randint(-(2**31), 2**31, (1 << 16,), generator=torch.Generator().manual_seed(1))
    x = bits.to(torch.int32).view(torch.float32).nan_to_num(0.0, 0.0, 0.0)
    x[:512] *= 1e-38
    x[1000:1300] = 1e-42
    found = []
    try:
        for isa in ops.available_isas():
            ops.set_isa(isa)
            parts = [memory.encode(v, s) for v, s in ((x, True), (x.abs(), False))]
            found.append([t for part in parts for t in part])
    finally:
        ops.set_isa(None)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_stochastic_codes_are_right_in_the_mean() -> None:
    """The state of a constant gradient, 8-bit: nearest is off by half a bin, the mean is not."""
    n = 1 << 16
    p = torch.nn.Parameter(torch.zeros(n))
    p.grad = torch.full((n,), 0.123)
    p.grad[::256] = 1.0
    ours = optim.SGD([p], lr=0.0, momentum=0.5, state_dtype="int8", rounding="stochastic")
    ours.step()
    state = ours.state[p]
    buffer = memory.decode(state["momentum_buffer_codes"], state["momentum_buffer_scales"], True)
    rest = buffer.view(-1, 256)[:, 1:]
    assert len(rest.unique()) == 2
    assert float(rest.double().mean()) == pytest.approx(0.123, abs=1e-4)


@pytest.mark.parametrize("is_signed", [True, False])
def test_stochastic_codes_are_neighbours(is_signed: bool) -> None:
    """Over all decades, 0, 1 and values of codes: one of the two codes around, as all instruction sets say."""
    n = 1 << 16
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(n, generator=generator).sign() * 10.0 ** (
        -9 * torch.rand(n, generator=generator).double()
    )
    x[:2048] = values(is_signed).repeat(8)
    x[::256] = 1.0
    x = x.float() if is_signed else x.float().abs()
    known = values(is_signed).double().numpy()
    found = []
    try:
        for isa in ops.available_isas():
            ops.set_isa(isa)
            p = torch.nn.Parameter(torch.zeros(n))
            options = {"state_dtype": "int8", "rounding": "stochastic", "seed": 5}
            if is_signed:
                ours = optim.SGD([p], lr=0.0, momentum=0.5, **options)
                p.grad = x
            else:  # the state is 2^-2 times the square of the gradient
                ours = optim.RMSprop([p], lr=0.0, alpha=0.75, **options)
                p.grad = x.sqrt() * 2
            ours.step()
            name = "momentum_buffer" if is_signed else "square_avg"
            found.append(ours.state[p][f"{name}_codes"].numpy())
    finally:
        ops.set_isa(None)
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)
    want = x.double().numpy() if is_signed else (x.sqrt() ** 2).double().numpy()
    above = np.clip(np.searchsorted(known, want), 1, 255)
    near = np.minimum(np.abs(want - known[above - 1]), np.abs(want - known[above]))
    exact = near <= 1e-6 * np.abs(want)
    codes = found[0].astype(np.int64)
    assert ((codes == above) | (codes == above - 1) | exact).all()
    got = np.abs(known[codes] - want)
    assert (got <= (known[above] - known[above - 1]) * (1 + 1e-5) + 1e-6 * np.abs(want)).all()
