"""swap_ on convolutions, embeddings and bags: the same bits as the layers built by hand."""

import pytest
import torch
from torch import nn

import trimtab
from trimtab import nn as layers


def swapped(model, **options):
    return trimtab.swap_(model, trimtab.Int8(), **options)


CONVS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 5, "stride": 2, "dilation": 2},
    "groups": {"kernel_size": 3, "groups": 2},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "same": {"kernel_size": 4, "padding": "same", "bias": False},
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("act", [None, nn.ReLU(), nn.SiLU()], ids=["plain", "relu", "silu"])
@pytest.mark.parametrize("conv", CONVS)
def test_conv2d(conv, act):
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 160, **CONVS[conv])
    model = nn.Sequential(*([plain, act] if act is not None else [plain])).eval()
    activation = "none" if act is None else type(act).__name__.lower()
    by_hand = layers.Int8Conv2d.from_float(plain, activation=activation)
    x = torch.randn(2, 6, 17, 13)
    with torch.no_grad():
        expected = model(x)
        report = trimtab.swap_(model, trimtab.Int8())
        got = model(x)
        assert torch.equal(got, by_hand(x))
    assert (got - expected).norm() < 0.03 * expected.norm()
    row = report["0"]
    assert (row.status, row.activation, row.shape) == ("swapped", activation, plain.weight.shape)
    assert row.sqnr_db > 35 and row.bytes_after < 0.4 * row.bytes_before
    report.undo()
    assert model[0] is plain and (act is None or model[1] is act)


def test_depthwise_convolution_is_too_small():
    model = nn.Sequential(nn.Conv2d(512, 512, 3, groups=512))
    assert swapped(model)["0"].reason == "too small: 1 outputs a group, below 32, gain nothing"


def test_other_convolutions_have_no_int8_form():
    model = nn.Sequential(nn.ConvTranspose2d(32, 32, 3), nn.Conv1d(64, 64, 3))
    assert [row.reason for row in swapped(model).rows] == [
        "no int8 or sparse form of ConvTranspose2d",
        "no int8 or sparse form of Conv1d",
    ]


def test_embedding():
    table = nn.Embedding(300, 50, padding_idx=0)
    model = nn.Sequential(table)
    by_hand = layers.Int8Embedding.from_float(table)
    report = swapped(model)
    indices = torch.randint(0, 300, (3, 7))
    assert type(model[0]) is layers.Int8Embedding
    assert torch.equal(model(indices), by_hand(indices))
    assert report["0"].bytes_after == 300 * 50 + 300 * 4
    report.undo()
    assert model[0] is table


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_embedding_bag(mode):
    bag = nn.EmbeddingBag(300, 50, mode=mode)
    model = nn.Sequential(bag)
    by_hand = layers.Int8EmbeddingBag.from_float(bag)
    swapped(model)
    indices = torch.randint(0, 300, (3, 7))
    assert type(model[0]) is layers.Int8EmbeddingBag
    assert torch.equal(model(indices), by_hand(indices))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Embedding(300, 50, max_norm=1.0), "max_norm rewrites its weight at each call"),
        (nn.EmbeddingBag(300, 50, max_norm=1.0), "max_norm rewrites its weight at each call"),
        (nn.EmbeddingBag(300, 50, mode="max"), "no int8 form of mode='max'"),
    ],
    ids=["embedding-max_norm", "bag-max_norm", "bag-max"],
)
def test_tables_that_stay(module, reason):
    model = nn.Sequential(module)
    assert swapped(model)["0"].reason == reason and model[0] is module


class Recommender(nn.Module):
    def __init__(self):
        super().__init__()
        self.items, self.tags = nn.Embedding(500, 64), nn.EmbeddingBag(300, 64, mode="sum")
        self.score = nn.Linear(128, 64)

    def forward(self, item, tags, offsets):
        return self.score(torch.cat([self.items(item), self.tags(tags, offsets=offsets)], -1))


def test_tables_are_measured_on_the_indices_of_the_example(monkeypatch):
    from trimtab import swap_contest as swap

    torch.manual_seed(0)
    seen = []

    def compare(before, after, cuda, pace):
        a, b = before[0](), after[0]()  # runs, so the indices are in range
        assert (a - b).norm() < 0.02 * a.norm()
        seen.append(tuple(a.shape))
        return 2.0, 1.0

    monkeypatch.setattr(swap, "compare", compare)
    model = Recommender()
    item, tags = torch.randint(0, 500, (4,)), torch.randint(0, 300, (30,))
    report = swapped(model, example_inputs=(item, tags, torch.tensor([0, 5, 9, 20])))
    assert seen == [(4, 64)] * 3 and len(report.swapped) == 3


class AllKinds(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.emb, self.head = nn.Embedding(128, 64), nn.Linear(64, 128, bias=False)
        self.conv = nn.Conv2d(1, 256, 4)
        if tied:
            self.head.weight = self.emb.weight

    def forward(self, ids):
        return self.head(self.emb(ids)), self.conv(ids[:, None].float())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_model_of_all_kinds(tied):
    torch.manual_seed(0)
    model, ids = AllKinds(tied), torch.randint(0, 128, (2, 9, 9))
    expected = model(ids)
    report = swapped(model)
    kinds = [row.type for row in report.swapped]
    assert kinds == (["Conv2d"] if tied else ["Embedding", "Linear", "Conv2d"])
    for a, b in zip(model(ids), expected):
        assert (a - b).norm() < 0.03 * b.norm()
    report.undo()
    assert all(torch.equal(a, b) for a, b in zip(model(ids), expected))


def test_options_reach_from_float_and_a_kind_without_them_stays(monkeypatch):
    got = []
    linear, conv = layers.Int8Linear.from_float, layers.Int8Conv2d.from_float

    def with_option(module, activation="none", weight_only=False):
        got.append((type(module).__name__, activation, weight_only))
        return linear(module, activation=activation)

    def without(module, activation="none"):
        return conv(module, activation=activation)

    monkeypatch.setattr(layers.Int8Linear, "from_float", with_option)
    monkeypatch.setattr(layers.Int8Conv2d, "from_float", without)
    model = nn.Sequential(
        nn.Conv2d(3, 256, 3), nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Embedding(128, 64)
    )
    report = trimtab.swap_(model, trimtab.Int8(weight_only=True))
    assert got == [("Linear", "relu", True)]
    assert report["0"].reason == "Int8Conv2d has no weight_only"
    # A table is only looked up, so its int8 form is weight-only as it is.
    assert [row.name for row in report.swapped] == ["2", "4"]
