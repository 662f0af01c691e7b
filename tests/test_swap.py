"""swap_: what it exchanges, how it is undone, and that a failure leaves the model as it was."""

import copy
import io
import json

import pytest
import torch
from torch import nn

import trimtab
from trimtab import report as report_module
from trimtab import swap_run as swap_module
from trimtab.nn import Int8Linear


def three_layers(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 131), nn.GELU(), nn.Linear(131, 64, bias=False)
    )
    return model.to(dtype).eval()


def slots(model):
    """Every child slot and instance attribute of every module, by identity."""
    return [
        (id(m), list(m._modules.items()), m.training, m.__dict__.get("activation"))
        for m in model.modules()
    ]


def values(model):
    return {k: (v.data_ptr(), v.clone()) for k, v in model.state_dict(keep_vars=True).items()}


def assert_untouched(model, slots_before, values_before):
    now, then = slots(model), slots_before
    assert len(now) == len(then)
    for (a, a_slots, a_train, a_act), (b, b_slots, b_train, b_act) in zip(now, then):
        assert a == b and a_train == b_train and a_act is b_act
        assert [key for key, _ in a_slots] == [key for key, _ in b_slots]
        assert all(x is y for (_, x), (_, y) in zip(a_slots, b_slots))
    assert list(values(model)) == list(values_before)
    for key, (pointer, value) in values(model).items():
        assert pointer == values_before[key][0] and torch.equal(value, values_before[key][1]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_swapped_model_equals_one_built_by_hand_bit_for_bit(dtype):
    model = three_layers(dtype)
    by_hand = nn.Sequential(
        Int8Linear.from_float(model[0]),
        nn.Tanh(),
        Int8Linear.from_float(model[2], activation="gelu"),
        Int8Linear.from_float(model[4]),
    )
    x = torch.randn(7, 64, dtype=dtype)
    with torch.no_grad():
        expected = model(x).float()
        report = trimtab.swap_(model, trimtab.Int8())
        assert torch.equal(model(x), by_hand(x))
        error = (model(x).float() - expected).norm() / expected.norm()
    assert error < 0.02
    assert [row.name for row in report.swapped] == ["0", "2", "4"]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_undo_restores_the_very_same_objects(training):
    model = three_layers().train(training)
    model[2].train(not training)  # a flag of its own
    before = slots(model), values(model)
    x = torch.randn(3, 64)
    expected = model(x)
    report = trimtab.swap_(model, trimtab.Int8())
    assert type(model[0]) is Int8Linear and type(model[3]) is nn.Identity
    assert model[2].training is (not training) and model[3].training is training
    report.undo()
    assert_untouched(model, *before)
    assert torch.equal(model(x), expected)


def test_undo_twice_says_so_and_changes_nothing():
    model = three_layers()
    report = trimtab.swap_(model, trimtab.Int8())
    report.undo()
    before = slots(model), values(model)
    with pytest.raises(RuntimeError, match=r"SwapReport.undo: .* it was undone already"):
        report.undo()
    assert_untouched(model, *before)
    assert "(undone already)" in str(report)


def test_undo_refuses_to_overwrite_what_came_in_between():
    model = three_layers()
    report = trimtab.swap_(model, trimtab.Int8())
    int8, model[4] = model[4], nn.Flatten()
    with pytest.raises(RuntimeError, match="expected 4 to hold the Int8Linear .* got Flatten"):
        report.undo()
    assert type(model[0]) is Int8Linear  # nothing was undone
    model[4] = int8
    report.undo()
    assert type(model[0]) is nn.Linear


def test_release_frees_the_float_modules_and_ends_undo():
    import gc
    import weakref

    model = three_layers()
    float_layer = weakref.ref(model[0])
    report = trimtab.swap_(model, trimtab.Int8())
    assert float_layer() is not None
    report.release()
    gc.collect()
    assert float_layer() is None
    with pytest.raises(RuntimeError, match="it was released"):
        report.undo()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt], ids=lambda e: e.__name__)
@pytest.mark.parametrize("example", [None, torch.randn(2, 64)], ids=["static", "measured"])
def test_failure_at_the_third_layer_leaves_the_model_as_it_was(monkeypatch, error, example):
    model = three_layers()
    before = slots(model), values(model)
    calls, from_float = [], Int8Linear.from_float

    def failing(module, **options):
        calls.append(module)
        if len(calls) == 3:
            raise error("third")
        return from_float(module, **options)

    monkeypatch.setattr(Int8Linear, "from_float", failing)
    with pytest.raises(error, match="third"):
        trimtab.swap_(model, trimtab.Int8(), example_inputs=example)
    assert len(calls) == 3
    assert_untouched(model, *before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt], ids=lambda e: e.__name__)
@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_failure_while_exchanging_puts_everything_back(monkeypatch, error, nth):
    model = three_layers()
    before = slots(model), values(model)
    applied, apply = [], report_module.Patch.apply

    def failing(patch):
        applied.append(patch)
        apply(patch)
        if len(applied) == nth:
            raise error

    monkeypatch.setattr(report_module.Patch, "apply", failing)
    with pytest.raises(error):
        trimtab.swap_(model, trimtab.Int8())
    assert_untouched(model, *before)


def test_failure_of_the_report_puts_everything_back(monkeypatch):
    model = three_layers()
    before = slots(model), values(model)

    def failing(*_):
        raise MemoryError

    monkeypatch.setattr(swap_module, "SwapReport", failing)
    with pytest.raises(MemoryError):
        trimtab.swap_(model, trimtab.Int8())
    assert_untouched(model, *before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(1), trimtab.Int8()), "expected model to be an nn.Module, got Tensor"),
        ((nn.Linear(2, 2), trimtab.Int8), r"expected config such as trimtab.Int8\(\), got Int8"),
        ((nn.Linear(2, 2), "int8"), "expected config such as .* got str"),
        ((nn.Linear(2, 2), trimtab.Int8(), "fc"), "expected filter_fn.* got str"),
    ],
    ids=["model", "config-class", "config-string", "filter"],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(TypeError, match=f"swap_: {message}"):
        trimtab.swap_(*arguments)


def test_filter_fn_sees_candidates_only_and_decides():
    model, seen = three_layers(), []

    def not_the_first(module, name):
        seen.append((type(module), name))
        return name != "0"

    report = trimtab.swap_(model, trimtab.Int8(), not_the_first)
    assert seen == [(nn.Linear, "0"), (nn.Linear, "2"), (nn.Linear, "4")]
    assert report["0"].reason == "filter_fn said no" and type(model[0]) is nn.Linear
    assert [row.name for row in report.swapped] == ["2", "4"]


def test_a_module_under_two_names_is_exchanged_once_at_both():
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared, nn.Linear(64, 64)])})
    report = trimtab.swap_(model, trimtab.Int8())
    assert type(model["a"]) is Int8Linear and model["a"] is model["b"][0]
    assert model["b"][1] is not model["a"]
    assert report["a"].also == ("b.0",) and report["b.0"] is report["a"]
    assert "a = b.0" in str(report)
    report.undo()
    assert model["a"] is shared and model["b"][0] is shared


def test_swapping_again_finds_nothing_to_do():
    model = three_layers()
    trimtab.swap_(model, trimtab.Int8())
    layers = list(model)
    again = trimtab.swap_(model, trimtab.Int8())
    assert not again.swapped and again["0"].reason == "int8 already"
    assert all(a is b for a, b in zip(model, layers))
    again.undo()  # nothing to undo is no error
    assert all(a is b for a, b in zip(model, layers))


def test_rows_bytes_and_sqnr():
    model = three_layers()
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    weight = model[2].weight.detach().double()
    report = trimtab.swap_(model, trimtab.Int8())
    row = report["2"]
    assert (row.type, row.shape, row.activation) == ("Linear", (131, 96), "gelu")
    assert row.bytes_before == 4 * (131 * 96 + 131)
    assert row.bytes_after == model[2].resident_bytes()
    noise = weight - model[2].weight.double()
    expected = 10 * torch.log10(weight.square().sum() / noise.square().sum())
    assert row.sqnr_db == pytest.approx(float(expected), abs=1e-3)
    assert report.bytes_before == before
    assert report.bytes_after == sum(model[i].resident_bytes() for i in (0, 2, 4))
    facts = json.loads(report.to_json())
    assert [r["status"] for r in facts["rows"]] == [
        "swapped", "left alone", "swapped", "fused", "swapped",
    ]  # fmt: skip
    assert facts["bytes_after"] == report.bytes_after


def test_an_exact_weight_has_infinite_sqnr():
    model = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight.copy_(torch.randint(-127, 128, (64, 64)))
        model[0].weight[:, 0] = 127
    report = trimtab.swap_(model, trimtab.Int8())
    assert report["0"].sqnr_db == float("inf")
    assert json.loads(report.to_json())["rows"][0]["sqnr_db"] is None


def test_printed_report():
    model = nn.Sequential(three_layers(), nn.LayerNorm(64), nn.Dropout(), nn.Dropout())
    text = str(trimtab.swap_(model, trimtab.Int8()))
    lines = text.splitlines()
    assert lines[0].split() == ["module", "type", "shape", "what", "bytes", "SQNR", "dB", "why"]
    linear = next(line for line in lines if line.startswith("0.2 "))
    assert linear.split()[1:4] == ["Linear", "131x96", "swapped"]
    assert linear.endswith("now Int8Linear, computes 0.3 (gelu) as well")
    assert next(x for x in lines if x.startswith("0.3 ")).endswith("computed by 0.2 now")
    assert "no int8 or sparse form of LayerNorm" in text
    assert "without weights, left alone: 2 Dropout, 1 Tanh" in text
    assert lines[-1].startswith("swapped 3 of 4 modules with weights, 1 activations fused; 0.11 MB")


def test_checkpoint_passes_through_a_second_swapped_model():
    model, other = three_layers(), three_layers()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    for one in (model, other):
        trimtab.swap_(one, trimtab.Int8())
    x = torch.randn(5, 64)
    with torch.no_grad():
        assert not torch.equal(model(x), other(x))
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(model(x), other(x))


def test_swapped_model_copies_and_pickles():
    model = three_layers()
    trimtab.swap_(model, trimtab.Int8())
    x = torch.randn(5, 64)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(x), model(x))
        assert torch.equal(torch.load(file, weights_only=False)(x), model(x))


class LoRA(nn.Module):
    """base(x) + x A B, with a frozen base."""

    def __init__(self, base, rank=4):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(base.in_features, rank) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(rank, base.out_features))

    def forward(self, x):
        return self.base(x) + x @ self.a @ self.b


def test_lora_on_top_of_a_swapped_model_trains():
    torch.manual_seed(0)
    model = three_layers()
    trimtab.swap_(model, trimtab.Int8())
    fixed = model[0].packed.clone()
    model[0], model[4] = LoRA(model[0]), LoRA(model[4])
    model[2].requires_grad_(False)
    x, target = torch.randn(64, 64), torch.randn(64, 64)
    adapters = [p for p in model.parameters() if p.requires_grad]
    assert len(adapters) == 4
    optimizer = torch.optim.Adam(adapters, lr=0.02)
    losses = []
    for _ in range(40):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # The first adapter learns through the int8 layers behind it.
    assert model[0].b.abs().max() > 0
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(model[0].base.packed, fixed)
