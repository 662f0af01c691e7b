"""Channels, neurons and heads really removed: the outputs of the masked model, smaller layers, saved."""

import copy
import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab import demo_training, optim, prune
from trimtab.nn import Int8Linear, SparseLinear
from trimtab.reference import prune_masks as reference


class Residual(nn.Module):
    """Two blocks that are added, batch norms, a depthwise convolution, one that is joined."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.norm = nn.BatchNorm2d(24)
        self.one = nn.Conv2d(24, 40, 1)
        self.depthwise = nn.Conv2d(40, 40, 3, padding=1, groups=40)
        self.act = nn.PReLU(40)
        self.two = nn.Conv2d(40, 24, 1, bias=False)
        self.side = nn.Conv2d(24, 16, 3, padding=1, stride=2)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(40 * 16, 32)
        self.last = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.two(self.act(self.depthwise(self.one(x))))
        x = torch.cat([self.pool(x), torch.sigmoid(self.side(x))], 1)
        return self.last(F.gelu(self.head(x.flatten(1))))


class Attention(nn.Module):
    """Heads by views, as transformers has them; a token and positions that are bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 48)
        self.position = nn.Parameter(torch.randn(7, 48))
        self.token = nn.Parameter(torch.randn(1, 1, 48))
        self.q, self.k, self.v = (nn.Linear(48, 64) for _ in range(3))
        self.o, self.norm = nn.Linear(64, 48), nn.LayerNorm(48)
        self.qkv, self.mix = nn.Linear(48, 96), nn.Linear(32, 48)
        self.up, self.down = nn.Linear(48, 96), nn.Linear(96, 48)
        self.out = nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.words(x)], 1) + self.position
        q, k, v = (m(x).view(len(x), 7, -1, 8).transpose(1, 2) for m in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = self.norm(x + self.o(mixed.transpose(1, 2).reshape(len(x), 7, -1)))
        q, k, v = self.qkv(x).reshape(len(x), 7, 3, -1, 8).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1)
        x = x + self.mix((weights @ v).transpose(1, 2).flatten(2))
        return self.out((x + self.down(self.up(x).relu())).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 30), nn.Tanh(), nn.Linear(30, 4)
    )


IMAGE = torch.randn(2, 1, 28, 28)
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (mlp, torch.randn(5, 20)),
    "residual": (Residual, torch.randn(2, 3, 8, 8)),
    "attention": (Attention, torch.randint(0, 50, (3, 6))),
    "cnn": (demo_training.Cnn, IMAGE),
    "transformer": (demo_training.Transformer, IMAGE),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, x = MODELS[name]
    model = make().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
            if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
                module.weight.normal_()
                module.bias.normal_()
    return model, x


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_removed_is_masked(name: str, sparsity: float) -> None:
    model, x = build(name)
    masked, dense = copy.deepcopy(model), model(x)
    report = prune.structured_(masked, sparsity, x, remove=False)
    assert report.parameters_after == report.parameters_before
    assert not torch.allclose(masked(x), dense, rtol=1e-3)
    report = prune.structured_(model, sparsity, x)
    assert report.parameters_after < 0.8 * report.parameters_before
    assert not prune.masks(model)
    out, expected = model(x), masked(x)
    assert (out - expected).abs().max() <= 1e-5 * max(float(expected.abs().max()), 1)
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    fresh = build(name)[0]
    prune.load_state_dict_(fresh, torch.load(saved, weights_only=True))
    assert torch.equal(fresh(x), out) and str(fresh) == str(model)
    with torch.device("meta"):
        born = MODELS[name][0]().eval()
    prune.load_state_dict_(born, model.state_dict(), assign=True)
    for twin in (copy.deepcopy(model), born):
        assert torch.equal(twin(x), out)


@pytest.mark.parametrize("name", MODELS)
def test_the_smaller_model_trains(name: str) -> None:
    model, x = build(name)
    prune.structured_(model.train(), 0.5, x)
    assert model.training
    optimizer = optim.AdamW(model.parameters(), lr=1e-3)
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()


def test_what_shrinks() -> None:
    model, x = build("residual")
    report = prune.structured_(model, 0.5, x)
    groups = {tuple(group.layers): (group.before, group.after) for group in report.groups}
    assert groups == {
        ("stem", "two"): (24, 16),  # 12 and up to a multiple of 8
        ("one",): (40, 24),
        ("side",): (16, 8),
        ("head",): (32, 16),
        ("last",): (5, 5),
    }
    assert model.depthwise.groups == model.depthwise.in_channels == 24
    assert model.norm.num_features == 16 and model.head.in_features == (16 + 8) * 16
    assert "last: 5 -> 5 channels  left alone: the model's output" in str(report)
    model, x = build("attention")
    report = prune.structured_(model, 0.5, x, round_to=16)
    kinds = {tuple(group.layers): (group.kind, group.after) for group in report.groups}
    assert kinds[("q", "k", "v")] == ("heads of 8", 4) and kinds[("qkv",)] == ("heads of 8", 2)
    assert model.q.weight.shape == (32, 32) and model.token.shape == (1, 1, 32)
    assert isinstance(model.norm, prune.PrunedLayerNorm) and int(model.norm.dense_features) == 48
    model, x = build("transformer")
    prune.structured_(model, 0.5, x)
    attention = model.layers.layers[0].self_attn
    assert attention.num_heads == 2 and attention.embed_dim == 64 and int(attention.head_dim) == 32
    assert attention.in_proj_weight.shape == (192, 64)


def test_the_weakest_go_and_ties_keep_the_lower_index() -> None:
    model, x = build("mlp")
    norms = reference.squared_norms(model[0].weight.detach().numpy(), (1, 20))
    keep = reference.largest(norms[:, 0], 48)  # 41, and up to a multiple of 8
    weight = model[0].weight.detach().clone()
    prune.structured_(model, {"0": 0.36}, x)
    assert torch.equal(model[0].weight, weight[torch.from_numpy(keep)])
    assert model[2].out_features == 30
    model, x = build("mlp")
    model[0].weight.data.fill_(0.25)
    bias = model[0].bias.detach().clone()
    prune.structured_(model, 0.5, x, layers=["0"])
    assert torch.equal(model[0].bias, bias[:32])
    model, x = build("mlp")
    scores = {"0.weight": torch.arange(64.0)[:, None].expand(64, 20)}
    bias = model[0].bias.detach().clone()
    prune.structured_(model, {"0": 0.5}, x, importance=scores)
    assert torch.equal(model[0].bias, bias[32:])


def test_global_is_one_ranking() -> None:
    model, x = build("mlp")
    model[0].weight.data.mul_(100)
    report = prune.structured_(model, 0.25, x, scope="global", round_to=1)
    assert [group.after for group in report.groups] == [64, 30 - round(0.25 * 94), 4]


def test_masks_from_before_shrink_too() -> None:
    model, x = build("mlp")
    prune.magnitude_(model, 0.5)
    prune.structured_(model, 0.5, x)
    for name, mask in prune.masks(model).items():
        weight = model.get_parameter(name).detach()
        assert mask.shape == weight.shape and not weight[~mask].any()
    assert len(prune.masks(model)) == 3
    fresh, _ = build("mlp")
    prune.load_state_dict_(fresh, model.state_dict())
    assert torch.equal(fresh(x), model(x)) and len(prune.masks(fresh)) == 3


class Strange(nn.Module):
    """Channels that can't be followed are left alone, and the report says why."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.d, self.e, self.f = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4)
        self.rnn = nn.LSTM(32, 32, batch_first=True)
        self.register_buffer("scale", torch.rand(32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) * self.scale
        x = self.rnn(self.b(x))[0]
        x = self.c(x).cumsum(-1)
        x = F.softmax(self.d(x), -1)
        return self.f(self.e(x))


def test_what_cannot_be_followed_is_left_alone() -> None:
    torch.manual_seed(0)
    model, x = Strange(), torch.randn(2, 3, 16)
    report = prune.structured_(model, 0.5, x)
    notes = {group.layers[0]: group.note for group in report.groups}
    assert "fixed tensor" in notes["a"] and "rnn" in notes["b"] and "cumsum" in notes["c"]
    assert "softmax over the channels" in notes["d"] and notes["e"] == ""
    assert model.e.out_features == 16 and model.a.out_features == 32


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in b) and str(one) == str(other)


def test_bad_input() -> None:
    model, x = build("mlp")
    before = copy.deepcopy(model)
    for arguments, error, message in (
        ((1.5, x), ValueError, r"expected sparsity in \[0, 1\], got 1.5"),
        ((0.5, torch.randn(5, 21)), ValueError, r"does not take inputs of shapes \[\[5, 21\]\]"),
        (({"1": 0.5}, x), TypeError, "1: expected a layer out of Linear, .* got ReLU"),
        (({"9": 0.5}, x), ValueError, "got '9', not in the model"),
        (({"4": 0.5}, x), ValueError, "4 can't shrink: the model's output"),
    ):
        with pytest.raises(error, match=f"structured_: .*{message}"):
            prune.structured_(model, *arguments)
    with pytest.raises(ValueError, match="expected round_to >= 1, got 0"):
        prune.structured_(model, 0.5, x, round_to=0)
    with pytest.raises(ValueError, match="nothing can be removed"):
        prune.structured_(nn.Linear(3, 4), 0.5, torch.randn(2, 3))
    assert same(model, before)
    model[2].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="structured_: 2.weight is NaN"):
        prune.structured_(model, 0.5, x)
    assert model[0].out_features == 64 and not prune.masks(model)


class Fixed(nn.Sequential):
    """Needs 64 neurons, and says so only when it runs."""

    def forward(self, x: Tensor) -> Tensor:
        return self[1](self[0](x).view(-1, 64))


def test_a_model_that_does_not_run_smaller_is_as_it_was() -> None:
    model, x = Fixed(nn.Linear(20, 64), nn.Linear(64, 4)), torch.randn(5, 20)
    before = copy.deepcopy(model)
    parameters = list(model.parameters())
    with pytest.raises(ValueError, match="does not run with smaller layers"):
        prune.structured_(model, 0.5, x)
    assert same(model, before)
    assert all(p is q for p, q in zip(model.parameters(), parameters))


@pytest.mark.parametrize("at", [1, 3, 6])
@pytest.mark.parametrize("name", ["residual", "transformer"])
def test_failing_at_the_kth_tensor(name: str, at: int, monkeypatch) -> None:
    model, x = build(name)
    before, calls = copy.deepcopy(model), []
    keep = prune.structured.removal.keep_

    def failing(*arguments) -> None:
        calls.append(arguments)
        if len(calls) == at:
            raise MemoryError("no room")
        keep(*arguments)

    monkeypatch.setattr("trimtab.prune.removal.keep_", failing)
    with pytest.raises(MemoryError, match="no room"):
        prune.structured_(model, 0.5, x)
    assert same(model, before) and not prune.masks(model)
    with torch.no_grad():
        assert torch.equal(model(x), before(x))


def test_wrong_checkpoints() -> None:
    model = build("mlp")[0]
    prune.magnitude_(model, 0.5)
    state, fresh = model.state_dict(), build("mlp")[0]
    before = copy.deepcopy(fresh)
    for key, value, message in (
        ("0.weight_mask", state["0.weight_mask"][:3], r"expected bool \[64, 20\]"),
        ("0.weight_mask", state["0.weight_mask"].float(), "got torch.float32"),
        (
            "2.weight_mask",
            ~state["2.weight_mask"],
            "2.weight: its mask prunes a weight that isn't 0",
        ),
        ("0.weight", torch.zeros(3), "0.weight: expected 2 dimensions"),
        ("4.bias", torch.zeros(5), r"4.bias: expected at most \[4\], got \[5\]"),
        ("4.spare", torch.zeros(3), "Unexpected key"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            prune.load_state_dict_(fresh, {**state, key: value})
        assert same(fresh, before)
    prune.load_state_dict_(fresh, state)
    assert np.array_equal(fresh[0].weight_mask.numpy(), state["0.weight_mask"].numpy())


class Between(nn.Module):
    """Something done to the channels between two convolutions."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


FOLLOWED: dict[str, Callable[[Tensor], Tensor]] = {
    "hardswish": F.hardswish,
    "rsub": lambda x: 1 - x,
    "pad": lambda x: F.pad(x, (0, 1, 2, 0)),
    "reflect": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "roll": lambda x: x.roll((1, 2), (2, 3)),
    "flip": lambda x: x.flip(-1),
    "std": lambda x: x / (1 + x.std((2, 3), keepdim=True)),
    "bicubic": lambda x: F.interpolate(x, size=(9, 9), mode="bicubic"),
    "masked_fill_": lambda x: (x * 1).masked_fill_(x > 1, 0),
}
MOVED: dict[str, Callable[[Tensor], Tensor]] = {
    "padded": lambda x: F.pad(x, (0, 0, 0, 0, 0, 1))[:, :16],
    "moved by number": lambda x: x.roll(1, 1),
    "moved": lambda x: x.flip(1),
}


@pytest.mark.parametrize("name", [*FOLLOWED, *MOVED])
def test_between_convolutions(name: str) -> None:
    torch.manual_seed(0)
    model, x = Between((FOLLOWED | MOVED)[name]).eval(), torch.randn(2, 3, 8, 8)
    if name in MOVED:
        with pytest.raises(ValueError, match=f"nothing can be removed .*channels are {name}"):
            prune.structured_(model, 0.5, x)
        return
    masked = copy.deepcopy(model)
    prune.structured_(masked, 0.5, x, remove=False)
    prune.structured_(model, 0.5, x)
    assert model.first.out_channels == 8
    torch.testing.assert_close(model(x), masked(x), rtol=0, atol=1e-5)


def test_layers_without_a_weight_to_cut_keep_their_channels() -> None:
    for change in (
        lambda layer: SparseLinear.from_float(layer),
        lambda layer: Int8Linear.from_float(layer),
        nn.utils.parametrizations.weight_norm,
    ):
        model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
        model[1].weight.data[:, 4:] = 0
        model[1] = change(model[1])
        report = prune.structured_(model, 0.5, torch.randn(3, 32))
        notes = {group.layers[0]: group.note for group in report.groups}
        assert "whose weight cannot shrink" in notes["0"] and model[2].out_features == 16


def test_example_inputs_that_prove_nothing() -> None:
    model, x = build("mlp")
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="expected example_inputs of at least one row"):
        prune.structured_(model, 0.5, x[:0])
    with pytest.raises(ValueError, match="expected finite outputs on example_inputs, got nan"):
        prune.structured_(model, 0.5, x * torch.nan)
    assert same(model, before)


@pytest.mark.parametrize("pattern", ["bitmap", "2:4", "block"])
def test_a_checkpoint_of_sparse_layers_too(pattern: str) -> None:
    options = {"pattern": pattern, "block": (2, 4)}
    model, x = build("mlp")
    column = torch.arange(20)
    model[0].weight.data[:, (column % 4 > 1) | (column > 7)] = 0
    prune.magnitude_(model, 0.5, layers=["2"])
    model[0] = SparseLinear.from_float(model[0], **options)
    fresh, _ = build("mlp")
    fresh[0] = SparseLinear(20, 64, **options)
    before = copy.deepcopy(fresh)
    with pytest.raises(RuntimeError, match="Missing key"):
        prune.load_state_dict_(
            fresh, {k: v for k, v in model.state_dict().items() if k != "4.bias"}
        )
    assert same(fresh, before)
    prune.load_state_dict_(fresh, model.state_dict())
    assert torch.equal(fresh(x), model(x)) and list(prune.masks(fresh)) == ["2.weight"]
