"""Activations fused into the Linear before them, and encoder layers that bypass their Linears."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import trimtab
from trimtab import ops
from trimtab.nn import Int8Linear

ACTIVATIONS = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
}


def swapped(model, **options):
    return trimtab.swap_(model, trimtab.Int8(), **options)


def int8_then(float_linear, x, activation):
    """The activation of the int8 product, by the ops below the layers."""
    weight, scale = ops.quantize_int8(float_linear.weight.detach())
    a, a_scale = ops.quantize_int8(x)
    return ops.int8_mm(
        a, weight, a_scale, scale, float_linear.bias.detach(), activation, out_dtype=x.dtype
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sequential_neighbour_is_fused_bit_for_bit(activation, dtype):
    torch.manual_seed(0)
    act = ACTIVATIONS[activation]()
    model = nn.Sequential(nn.Linear(67, 129), act, nn.Dropout(0.0)).to(dtype).eval()
    linear, x = model[0], torch.randn(5, 67, dtype=dtype)
    with torch.no_grad():
        in_float = model(x)
        report = swapped(model)
        got = model(x)
    assert report["0"].activation == activation and report["1"].status == "fused"
    assert report["1"].reason == "computed by 0 now"
    assert type(model[1]) is nn.Identity and model[0].activation == activation
    assert torch.equal(got, int8_then(linear, x, activation))
    assert (got.float() - in_float.float()).norm() < 0.02 * in_float.float().norm()
    report.undo()
    assert model[0] is linear and model[1] is act
    with torch.no_grad():
        assert torch.equal(model(x), in_float)


class Mlp(nn.Module):
    """fc1, act, fc2; ``forward`` differs below."""

    def __init__(self, act=None):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(64, 96), nn.Linear(96, 64)
        self.act = nn.GELU() if act is None else act
        self.drop = nn.Dropout(0.1)


class Nested(Mlp):
    def forward(self, x):
        return self.fc2(self.drop(self.act(self.fc1(x))))


class Statements(Mlp):
    def forward(self, hidden):
        hidden = self.fc1(hidden)
        hidden = self.act(hidden)
        return self.fc2(hidden)


class OtherName(Mlp):
    def forward(self, x):
        middle = self.fc1(x)
        x = self.act(middle)
        return self.fc2(x)


class InAnotherMethod(Mlp):
    def forward(self, x):
        return self.fc2(self.inner(x))

    def inner(self, x):
        x = self.fc1(x)
        return self.act(x)


class Inherited(Statements):
    pass


FUSABLE = [Nested, Statements, OtherName, InAnotherMethod, Inherited]


class SeenLater(Mlp):
    def forward(self, x):
        middle = self.fc1(x)
        x = self.act(middle)
        return self.fc2(x * middle)


class SeenBefore(Mlp):
    def forward(self, x):
        x = self.fc1(x)
        self.seen = x
        x = self.act(x)
        return self.fc2(x)


class ActTwice(Mlp):
    def forward(self, x):
        return self.act(self.fc2(self.act(self.fc1(x))))


class LinearElsewhere(Mlp):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))

    def features(self, x):
        return self.fc1(x)


class Conditional(Mlp):
    def forward(self, x):
        x = self.fc1(x)
        if self.training:
            x = self.act(x)
        return self.fc2(x)


class ByName(Mlp):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)) + getattr(self, "fc" + "1")(x)[..., :1])


class PassedOn(Mlp):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x))) + self.use(self.fc1)

    def use(self, layer):
        return layer.bias.sum()


NOT_FUSABLE = [SeenLater, SeenBefore, ActTwice, LinearElsewhere, Conditional, ByName, PassedOn]


@pytest.mark.parametrize("cls", FUSABLE, ids=lambda c: c.__name__)
@pytest.mark.parametrize("act", [nn.SiLU(), F.gelu, torch.relu], ids=["module", "gelu", "relu"])
def test_attributes_called_one_on_the_other_are_fused(cls, act):
    model = cls(act).eval()
    linear, x = model.fc1, torch.randn(3, 64)
    with torch.no_grad():
        in_float = model(x)
        report = swapped(model)
        activation = report["fc1"].activation
        hidden = int8_then(linear, x, activation)
        assert torch.equal(model(x), model.fc2(hidden))
    assert report["act"].status == "fused" and activation in ("silu", "gelu", "relu")
    assert model.act is not act
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with torch.no_grad():
        assert all(torch.equal(one(x), model(x)) for one in copies)
        report.undo()
        assert model.act is act and model.fc1 is linear and torch.equal(model(x), in_float)


@pytest.mark.parametrize("cls", NOT_FUSABLE, ids=lambda c: c.__name__)
def test_not_fused_where_the_output_is_seen_elsewhere(cls):
    model = cls().eval()
    act, x = model.act, torch.randn(3, 64)
    with torch.no_grad():
        expected = model(x)
        report = swapped(model)
        assert report["fc1"].status == "swapped" and report["fc1"].activation == "none"
        assert model.act is act and report["act"].status == "left alone"
        assert (model(x) - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("what", ["tanh", "subclass", "hooked", "replaced", "function"])
def test_activation_that_is_none_of_ours(what):
    class Shifted(nn.ReLU):
        def forward(self, x):
            return super().forward(x) + 1

    act = {"tanh": nn.Tanh(), "subclass": Shifted(), "function": torch.sin}.get(what, nn.ReLU())
    if what == "hooked":
        act.register_forward_hook(lambda *_: None)
    if what == "replaced":
        act.forward = torch.sin
    model = Nested(act)
    assert swapped(model)["fc1"].activation == "none" and model.act is act


def test_a_hooked_linear_keeps_its_activation():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    linear, relu = model[0], model[1]
    linear.register_forward_hook(lambda *_: None)
    swapped(model)
    assert model[0] is linear and model[1] is relu


def test_shared_activation_module_is_replaced_in_its_place_only():
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(64, 64), relu, nn.LayerNorm(64), relu)
    report = swapped(model)
    assert type(model[1]) is nn.Identity and model[3] is relu
    assert report["1"].status == "fused"
    report.undo()
    assert model[1] is relu and model[3] is relu
    later = nn.Sequential(relu, nn.Linear(64, 64), relu)
    report = swapped(later)
    assert later[0] is relu and type(later[2]) is nn.Identity
    assert (report["0"].status, report["2"].status) == ("left alone", "fused")


def test_shared_linear_is_not_fused():
    linear = nn.Linear(64, 64)
    model = nn.Sequential(linear, nn.ReLU(), linear, nn.Tanh())
    report = swapped(model)
    assert report["0"].activation == "none" and type(model[1]) is nn.ReLU
    assert model[0] is model[2] and type(model[0]) is Int8Linear


class Indexes(nn.Module):
    """Looks between a Sequential's neighbours, which no source of nn.Sequential shows."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))

    def forward(self, x):
        return self.net(x) + self.net[0](x)


def test_example_inputs_show_that_another_looks_at_the_output(monkeypatch):
    from trimtab import swap_contest as swap

    monkeypatch.setattr(swap, "compare", lambda before, after, cuda, pace: (2.0, 1.0))
    model = Indexes()
    report = swapped(model, example_inputs=torch.randn(4, 256))
    assert report["net.0"].activation == "none" and type(model.net[1]) is nn.ReLU
    assert report["net.0"].calls == 2 and report["net.2"].calls == 1
    straight = Indexes().net
    assert swapped(straight, example_inputs=torch.randn(4, 256))["0"].activation == "relu"


@pytest.mark.parametrize(
    "act", ["gelu", "relu", F.silu, nn.GELU()], ids=["gelu", "relu", "F", "nn"]
)
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
def test_encoder_layer_really_calls_the_int8_linears(act, norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        64, 4, 256, batch_first=True, activation=act, norm_first=norm_first
    ).eval()
    x = torch.randn(3, 10, 64)
    with torch.no_grad():
        expected = layer(x)
    state = dict(layer.__dict__, _modules=None), dict(layer._modules)
    report = swapped(layer)
    assert report["linear1"].activation in ("gelu", "relu", "silu")
    called = []
    for name in ("linear1", "linear2"):
        module = getattr(layer, name)
        forward = module.forward
        # Not a hook: those would turn the fast path off by themselves.
        module.forward = lambda x, name=name, forward=forward: (called.append(name), forward(x))[1]
    with torch.no_grad():
        got = layer(x)
    assert called == ["linear1", "linear2"]
    assert 0 < (got - expected).norm() < 0.03 * expected.norm()
    fast = report["(the model itself)"] if act is not F.silu else None
    assert fast is None or (fast.status == "adjusted" and "fused inference path" in fast.reason)
    report.undo()
    assert (dict(layer.__dict__, _modules=None), dict(layer._modules)) == state
    with torch.no_grad():
        assert torch.equal(layer(x), expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoder_with_padding():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(3, 10, 64)
    padding = torch.zeros(3, 10, dtype=torch.bool)
    padding[1, 6:] = True
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=padding)
        report = swapped(encoder)
        got = encoder(x, src_key_padding_mask=padding)
    assert len(report.swapped) == 4
    assert (got - expected)[~padding].norm() < 0.03 * expected.norm()
    assert report["(the model itself)"].reason.startswith("padded tokens are computed")
    assert encoder.use_nested_tensor is False
    report.undo()
    assert encoder.use_nested_tensor is True
    with torch.no_grad():
        assert torch.equal(encoder(x, src_key_padding_mask=padding), expected)


def test_encoder_keeps_its_fast_path_where_nothing_was_swapped():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 256, batch_first=True), 2)
    trimtab.swap_(encoder, trimtab.Int8(), lambda module, name: name == "layers.1.linear2")
    assert encoder.layers[0].activation_relu_or_gelu == 1
    assert encoder.layers[1].activation_relu_or_gelu == 0


def test_encoder_that_is_slower_as_a_whole_is_left_alone(monkeypatch):
    from trimtab import swap_contest as swap

    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 256, batch_first=True), 2)
    model = nn.Sequential(encoder.eval(), nn.Linear(64, 64))
    before = [list(m._modules.items()) for m in model.modules()]
    wholes = []

    def timings(before, after, cuda, pace):
        if len(before) == 1 and before[0].__name__ == "before":
            before[0]()
            after[0]()  # really runs, with the exchange in place only meanwhile
            wholes.append(type(model[0].layers[0].linear1))
            return 1.0, 2.0
        return 2.0, 1.0

    monkeypatch.setattr(swap, "compare", timings)
    report = swapped(model, example_inputs=torch.randn(2, 5, 64))
    assert wholes == [nn.Linear]
    assert [row.name for row in report.swapped] == ["1"]
    assert "0 as a whole is not faster" in report["0.layers.1.linear2"].reason
    assert model[0].use_nested_tensor and model[0].layers[0].activation_relu_or_gelu == 1
    report.undo()
    assert [list(m._modules.items()) for m in model.modules()] == before


def test_decoder_layer_is_fused():
    layer = nn.TransformerDecoderLayer(64, 4, 256, batch_first=True).eval()
    x, memory = torch.randn(2, 5, 64), torch.randn(2, 7, 64)
    with torch.no_grad():
        expected = layer(x, memory)
        report = swapped(layer)
        got = layer(x, memory)
    assert report["linear1"].activation == "relu"
    assert 0 < (got - expected).norm() < 0.03 * expected.norm()


def tiny(transformers, config, **options):
    return getattr(transformers, config)(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=160, **options
    )


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"])
def test_bert_intermediate(act):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = tiny(transformers, "BertConfig", vocab_size=100, hidden_act=act)
    model = transformers.BertForMaskedLM(config).eval()
    ids = torch.randint(0, 100, (3, 9))
    with torch.no_grad():
        expected = model(ids).logits
        before = [(id(m), list(m._modules.items())) for m in model.modules()]
        report = swapped(model)
        got = model(ids).logits
    intermediate = model.bert.encoder.layer[1].intermediate
    ours = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}.get(act, act)
    assert intermediate.dense.activation == ours
    assert type(intermediate.intermediate_act_fn) is nn.Identity
    assert "weight tied with" in report["cls.predictions.decoder"].reason
    assert sum(row.type == "Linear" for row in report.swapped) == 2 * 6 + 1
    assert (got - expected).norm() < 0.05 * expected.norm()
    report.undo()
    assert [(id(m), list(m._modules.items())) for m in model.modules()] == before
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)


def test_vit_mlp():
    transformers = pytest.importorskip("transformers")
    config = tiny(transformers, "ViTConfig", image_size=16, patch_size=8)
    model = transformers.ViTModel(config).eval()
    report = swapped(model)
    fused = [row for row in report.rows if row.status == "fused"]
    assert len(fused) == 2 and all(row.type == "GELUActivation" for row in fused)
    assert sum(row.activation == "gelu" for row in report.swapped) == 2
