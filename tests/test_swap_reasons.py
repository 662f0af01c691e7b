"""Every module that swap_ leaves alone, and the reason its report gives."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import trimtab
from trimtab.nn import Int8Linear


def swapped(model, **options):
    return trimtab.swap_(model, trimtab.Int8(), **options)


def assert_left_alone(model, name, *fragments):
    """The one module under ``name`` stays the same object, and the report says why."""
    module = model.get_submodule(name)
    report = swapped(model)
    row = report[name]
    assert row.status == "left alone" and row.bytes_before == row.bytes_after
    for fragment in fragments:
        assert fragment in row.reason, row.reason
        assert fragment in str(report)
    assert model.get_submodule(name) is module
    return report


class Holder(nn.Module):
    """fc among other things."""

    def __init__(self, fc=None, **others):
        super().__init__()
        self.fc = nn.Linear(64, 64) if fc is None else fc
        for name, other in others.items():
            setattr(self, name, other)

    def forward(self, x):
        return self.fc(x)


@pytest.mark.parametrize(
    ("shape", "fragment"),
    [
        ((63, 64), "too small: 64x63 is below 4096 weights"),
        ((15, 1024), "too small: a side of 1024x15 is below 16"),
        ((1024, 15), "too small: a side of 15x1024 is below 16"),
        ((64, 64), ""),
        ((16, 256), ""),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_too_small(shape, fragment):
    model = Holder(nn.Linear(*shape))
    if fragment:
        assert_left_alone(model, "fc", fragment)
    else:
        assert swapped(model)["fc"].status == "swapped"


def test_too_small_is_not_asked_where_it_is_measured(monkeypatch):
    from trimtab import swap_contest as swap

    monkeypatch.setattr(swap, "compare", lambda before, after, cuda, pace: (2.0, 1.0))
    model = Holder(nn.Linear(3, 2))
    assert swapped(model, example_inputs=torch.randn(1, 3))["fc"].status == "swapped"


def test_tied_weight_names_its_partner():
    model = Holder(nn.Linear(64, 100, bias=False), emb=nn.Embedding(100, 64))
    model.fc.weight = model.emb.weight
    report = assert_left_alone(model, "fc", "weight tied with emb.weight, kept tied")
    assert report["emb"].reason == "weight tied with fc.weight, kept tied"
    assert model.fc.weight is model.emb.weight
    # Shared bytes count once.
    assert report.bytes_before == report.bytes_after == 4 * 6400


def test_tied_bias_stays_one_parameter():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].bias = model[0].bias
    report = swapped(model)
    assert len(report.swapped) == 2 and model[0].bias is model[1].bias


@pytest.mark.parametrize("how", ["view", "slice", "data"])
def test_weight_shared_by_view(how):
    model = Holder(nn.Linear(64, 64), other=nn.Linear(64, 64))
    if how == "view":
        model.other.weight = nn.Parameter(model.fc.weight.detach().t())
    elif how == "slice":
        whole = torch.randn(100, 64)
        model.fc.weight = nn.Parameter(whole[:64])
        model.other.weight = nn.Parameter(whole[36:])
    else:
        model.other.weight.data = model.fc.weight.data
    report = assert_left_alone(model, "fc", "weight shares memory with other.weight")
    assert report["other"].reason == "weight shares memory with fc.weight"


def test_disjoint_slices_of_one_storage_are_not_shared():
    model = Holder(nn.Linear(64, 64), other=nn.Linear(64, 64))
    whole = torch.randn(128, 64)
    model.fc.weight, model.other.weight = nn.Parameter(whole[:64]), nn.Parameter(whole[64:])
    assert len(swapped(model).swapped) == 2


@pytest.mark.parametrize(
    "parametrization",
    [parametrizations.weight_norm, parametrizations.orthogonal, parametrizations.spectral_norm],
    ids=lambda f: f.__name__,
)
def test_parametrized(parametrization):
    model = Holder(parametrization(nn.Linear(64, 64)))
    assert_left_alone(model, "fc", "parametrized (weight)")


def keep(*_):
    return None


HOOKS = {
    "forward hook": lambda m: m.register_forward_hook(keep),
    "forward pre-hook": lambda m: m.register_forward_pre_hook(keep),
    "backward hook": lambda m: m.register_full_backward_hook(keep),
    "backward pre-hook": lambda m: m.register_full_backward_pre_hook(keep),
    "state_dict hook": lambda m: m._register_state_dict_hook(keep),
    "state_dict pre-hook": lambda m: m.register_state_dict_pre_hook(keep),
    "load_state_dict pre-hook": lambda m: m.register_load_state_dict_pre_hook(keep),
    "load_state_dict post-hook": lambda m: m.register_load_state_dict_post_hook(keep),
    "hook on its weight": lambda m: m.weight.register_hook(keep),
    "post-accumulate": lambda m: m.weight.register_post_accumulate_grad_hook(keep),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_hooked(hook):
    model = Holder()
    handle = HOOKS[hook](model.fc)
    told = "hook on its weight" if hook == "post-accumulate" else hook
    assert_left_alone(model, "fc", f"hooked ({told})", "would lose the hook")
    if hook in ("forward hook", "hook on its weight"):
        handle.remove()
        assert swapped(model)["fc"].status == "swapped"


def test_old_weight_norm_is_a_hook():
    with pytest.warns(FutureWarning):
        fc = torch.nn.utils.weight_norm(nn.Linear(64, 64))
    assert_left_alone(Holder(fc), "fc", "hooked (forward pre-hook)")


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Same(nn.Linear):
    """Only the name differs."""


class Called(nn.Linear):
    def __call__(self, x):
        return super().__call__(x) + 1


def test_subclasses():
    model = Holder(Doubled(64, 64), called=Called(64, 64), same=Same(64, 64))
    report = assert_left_alone(model, "fc", "subclass Doubled has a forward of its own")
    assert report["called"].reason == "subclass Called has a __call__ of its own"
    assert report["same"].status == "swapped"


def test_forward_replaced_on_the_instance():
    model = Holder()
    model.fc.forward = lambda x: x
    assert_left_alone(model, "fc", "its forward was replaced on the instance")


def test_more_than_weight_and_bias():
    model = Holder()
    model.fc.register_buffer("mask", torch.ones(64))
    assert_left_alone(model, "fc", "holds more than weight and bias: mask")


def test_compiled_in_place():
    model = Holder()
    model.fc.compile()
    assert_left_alone(model, "fc", "compiled already, by module.compile()")


def test_lazy_before_and_after_its_first_call():
    model = Holder(nn.LazyLinear(64))
    assert_left_alone(model, "fc", "lazy, without a weight yet")
    with pytest.raises(
        ValueError, match=r"swap_: expected modules with weights .* got fc still lazy"
    ):
        swapped(model, example_inputs=torch.randn(2, 64))
    model(torch.randn(2, 64))
    assert swapped(model)["fc"].status == "swapped"


def test_meta_device():
    assert_left_alone(Holder(nn.Linear(64, 64, device="meta")), "fc", "on the meta device")


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_wrong_dtype(dtype):
    name = str(dtype).removeprefix("torch.")
    assert_left_alone(
        Holder(nn.Linear(64, 64, dtype=dtype)), "fc", f"weight is {name}, not float32"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite(value):
    model = Holder()
    model.fc.weight.data[3, 5] = value
    assert_left_alone(model, "fc", "weight has NaN or Inf")


def test_rows_too_long_for_an_exact_sum():
    model = Holder(nn.Linear(133_145, 1))
    assert_left_alone(model, "fc", "rows of 133145 exceed the 133144 whose int32 sum is exact")


def test_empty_weight():
    with pytest.warns(UserWarning, match="zero-element"):
        model = Holder(nn.Linear(0, 64))
    assert_left_alone(model, "fc", "weight is empty")


def test_tensor_subclass():
    class Sharded(torch.Tensor):
        pass

    model = Holder()
    model.fc.weight = nn.Parameter(torch.randn(64, 64).as_subclass(Sharded))
    assert_left_alone(model, "fc", "weight is a Sharded: sharded or quantized by another library")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quantized_by_torch():
    from torch.ao.nn.quantized.dynamic import Linear

    assert_left_alone(Holder(Linear(64, 64)), "fc", "quantized by torch already")


def test_multihead_attention_projections():
    model = Holder(attention=nn.MultiheadAttention(64, 4))
    report = assert_left_alone(
        model,
        "attention.out_proj",
        "MultiheadAttention reads this weight without calling the module",
    )
    assert "reads its projections as weights" in report["attention"].reason
    assert report["attention"].shape == (192, 64)
    assert report["fc"].status == "swapped"


class ReadsWeight(Holder):
    def forward(self, x):
        return self.product(x)

    def product(self, x):
        return nn.functional.linear(x, self.fc.weight)


class ReadsWeightElsewhere(Holder):
    def reset(self):
        self.fc.weight.data.zero_()


def test_parent_that_reads_the_weight_instead_of_calling():
    assert_left_alone(ReadsWeight(), "fc", "ReadsWeight reads this weight itself")
    assert swapped(ReadsWeightElsewhere())["fc"].status == "swapped"


def test_model_that_is_a_linear_itself():
    model = nn.Linear(64, 64)
    report = swapped(model)
    assert report["(the model itself)"].status == "left alone"
    assert "swap a wrapper, such as nn.Sequential(model)" in str(report)
    wrapper = nn.Sequential(model)
    assert len(swapped(wrapper).swapped) == 1 and type(wrapper[0]) is Int8Linear


def test_inside_ddp():
    import torch.distributed as dist

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(Holder())
        assert_left_alone(model, "module.fc", "inside DistributedDataParallel", "wrap afterwards")
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inside_torchscript():
    model = torch.jit.trace(Holder(), torch.randn(1, 64))
    report = swapped(model)
    assert not report.swapped and report["fc"].reason.startswith("a TorchScript module")
    scripted = nn.Sequential(model, nn.Linear(64, 64))
    report = swapped(scripted)
    assert [row.name for row in report.swapped] == ["1"]
    scripted(torch.randn(1, 64))


def test_a_row_for_every_leaf_module():
    model = nn.Sequential(
        nn.Conv1d(3, 4, 2), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), nn.LSTM(8, 8), Holder()
    )
    report = swapped(model)
    leaves = {name for name, m in model.named_modules() if not list(m.children())}
    assert {row.name for row in report.rows} == leaves
    assert report["0"].reason == "no int8 or sparse form of Conv1d"
    assert report["2"].reason == "no int8 or sparse form of LSTM"
    assert report["1.1"].reason == "no weights"
    assert all(row.reason for row in report.rows)


def test_unknown_name_in_the_report():
    with pytest.raises(KeyError, match="no module called 'nothing'"):
        swapped(Holder())["nothing"]
