"""swap_ with example_inputs: what it sees, what it keeps, and that it leaves no trace."""

import random

import numpy as np
import pytest
import torch
from torch import nn

import trimtab
from trimtab import swap_contest as swap
from trimtab import swap_timing
from trimtab.nn import Int8Linear


def swapped(model, example_inputs, **options):
    return trimtab.swap_(model, trimtab.Int8(), example_inputs=example_inputs, **options)


def timings(monkeypatch, decide):
    """Replaces the clock: decide(in_features, rows, fused) -> (before, after) in microseconds."""
    seen = []

    def compare(before, after, cuda, pace):
        cells = dict(zip(before[0].__code__.co_freevars, before[0].__closure__))
        module, (x, *_) = cells["module"].cell_contents, cells["args"].cell_contents
        fused = cells["act"].cell_contents if "act" in cells else None
        assert not torch.is_grad_enabled()
        seen.append((module.in_features, tuple(x.shape), x.stride(), x.dtype, len(before)))
        for call in (*before, *after):
            assert call().shape == (*x.shape[:-1], module.out_features)
        return decide(module.in_features, x.shape[:-1].numel(), fused is not None)

    monkeypatch.setattr(swap, "compare", compare)
    return seen


def test_only_winners_are_kept(monkeypatch):
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 16))
    times = {64: (10.0, 5.0), 32: (10.0, 10.5), 48: (10.0, 9.9)}
    timings(monkeypatch, lambda k, rows, fused: times[k])
    losers = model[1], model[2], model[3]
    report = swapped(model, torch.randn(5, 64))
    assert [row.name for row in report.swapped] == ["0"]
    assert (model[1], model[2], model[3]) == losers  # 1 % faster is within the noise
    row = report["1"]
    assert (row.us_before, row.us_after, row.calls) == (10.0, 10.5, 1)
    assert row.reason == "not faster here: 10.0 µs in float, 10.5 in int8"
    assert row.bytes_after == row.bytes_before and row.activation == "none"
    assert report["2"].status == "left alone"
    text = str(report)
    assert "10.0 -> 5.0" in text and text.splitlines()[0].split()[-2:] == ["µs", "why"]
    assert text.splitlines()[-1].endswith("their calls 10 -> 5 µs (2.00x faster)")


def test_fused_activation_is_part_of_the_measurement(monkeypatch):
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64))
    timings(monkeypatch, lambda k, rows, fused: (10.0, 5.0 if fused else 20.0))
    report = swapped(model, torch.randn(5, 64))
    assert [row.activation for row in report.swapped] == ["relu"]


class Twice(nn.Module):
    """Calls a layer on a few rows and, ten times, on many."""

    def __init__(self):
        super().__init__()
        self.fc, self.unused = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x, scale=1.0):
        y = self.fc(x[:1])
        for _ in range(10):
            y = y + self.fc(x).sum() * scale
        return y


@pytest.mark.parametrize("many", [1.0, 12.0], ids=["wins", "loses"])
def test_calls_of_several_shapes_are_weighed(monkeypatch, many):
    seen = timings(monkeypatch, lambda k, rows, fused: (10.0, 20.0 if rows == 1 else many))
    model = Twice()
    report = swapped(model, {"x": torch.randn(9, 64), "scale": 0.5})
    assert sorted(shape for _, shape, *_ in seen) == [(1, 64), (9, 64)]
    row = report["fc"]
    assert (row.us_before, row.us_after, row.calls) == (110.0, 20.0 + 10 * many, 11)
    assert (row.status == "swapped") == (many == 1.0)


def test_a_module_that_the_example_never_reaches(monkeypatch):
    timings(monkeypatch, lambda k, rows, fused: (2.0, 1.0))
    model = Twice()
    report = swapped(model, (torch.randn(9, 64),))
    assert type(model.unused) is nn.Linear and report["unused"].calls == 0
    assert "example_inputs never called it" in report["unused"].reason


def test_one_measurement_for_equal_layers_on_equal_inputs(monkeypatch):
    seen = timings(monkeypatch, lambda k, rows, fused: (2.0, 1.0))
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)), nn.Linear(64, 64, bias=False))
    assert len(swapped(model, torch.randn(3, 64)).swapped) == 5
    assert [count for *_, count in seen] == [4, 1]  # all four are cycled through


def test_measured_with_the_strides_and_dtype_it_sees(monkeypatch):
    seen = timings(monkeypatch, lambda k, rows, fused: (2.0, 1.0))
    model = nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16)
    x = torch.randn(64, 5, dtype=torch.bfloat16).t().expand(3, 5, 64)
    swapped(model, x)
    assert seen == [(64, (3, 5, 64), (0, 1, 5), torch.bfloat16, 1)]


def test_measured_under_the_models_own_autocast(monkeypatch):
    class Autocasting(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 64)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.fc(x)

    dtypes = []

    def compare(before, after, cuda, pace):
        dtypes.extend((before[0]().dtype, after[0]().dtype))
        return 2.0, 1.0

    monkeypatch.setattr(swap, "compare", compare)
    swapped(Autocasting(), torch.randn(3, 64))
    assert dtypes == [torch.bfloat16, torch.bfloat16]


def test_the_example_run_leaves_no_trace(monkeypatch):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = nn.BatchNorm1d(64), nn.Linear(64, 64)
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            x = x + random.random() + float(np.random.rand())
            return self.drop(self.fc(self.norm(x)))

    timings(monkeypatch, lambda k, rows, fused: (2.0, 1.0))
    model = Noisy().train()
    mean, buffers = model.norm.running_mean, [b.clone() for b in model.buffers()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    fast = torch.backends.mha.get_fastpath_enabled()
    report = swapped(model, torch.randn(8, 64, generator=torch.Generator().manual_seed(0)))
    assert model.training and model.drop.training
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert torch.backends.mha.get_fastpath_enabled() is fast
    assert model.norm.running_mean is mean
    report.undo()
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_an_example_that_fails_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(65, 64))
    x = torch.randn(2, 64)
    before = list(model), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="65"):
        swapped(model, x)
    assert list(model) == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_example_inputs_of_the_wrong_type():
    with pytest.raises(TypeError, match=r"swap_: expected example_inputs as a tensor, .* got int"):
        swapped(nn.Sequential(nn.Linear(64, 64)), 3)


@pytest.mark.parametrize(
    "example",
    [
        torch.randn(2, 64),
        (torch.randn(2, 64),),
        [torch.randn(2, 64)],
        {"input": torch.randn(2, 64)},
    ],
    ids=["tensor", "tuple", "list", "dict"],
)
def test_forms_of_example_inputs(monkeypatch, example):
    timings(monkeypatch, lambda k, rows, fused: (2.0, 1.0))
    assert len(swapped(nn.Sequential(nn.Linear(64, 64)), example).swapped) == 1


def test_report_marks_times_of_one_thread(monkeypatch):
    monkeypatch.setattr(swap, "compare", lambda *_: swap_timing.Timing(2.0, 1.0, True))
    text = str(swapped(nn.Sequential(nn.Linear(64, 64)), torch.randn(2, 64)))
    assert "2.0 -> 1.0*" in text
    assert text.endswith("* CPU time of one thread, as other processes kept the cores busy")


def test_a_real_measurement_keeps_the_bits_of_the_static_swap():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256)).eval()
    x = torch.randn(32, 256)
    report = swapped(model, x)
    assert all(row.us_before > 0 and row.us_after > 0 for row in report.rows if row.shape)
    measured = model(x).detach()
    layers = [row.name for row in report.swapped]
    report.undo()
    trimtab.swap_(model, trimtab.Int8(), lambda _, name: name in layers)
    assert torch.equal(model(x), measured)
    assert all(type(model.get_submodule(name)) is Int8Linear for name in layers)
