"""Masks are exactly those of the NumPy reference: k of n, n of m, blocks, rows, channels, ties, NaN."""

import numpy as np
import pytest
import torch
from torch import nn

from trimtab import prune
from trimtab.nn import SparseLinear
from trimtab.prune.masks import Pattern
from trimtab.reference import prune_masks as reference

SHAPES = [(1, 1), (3, 7), (5, 16), (17, 33), (64, 40)]
SPARSITIES = [0.0, 0.1, 0.5, 0.77, 1.0]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Few different values, so that there are ties everywhere; both zeros among them."""
    generator = torch.Generator().manual_seed(sum(shape))
    values = torch.randint(-4, 5, shape, generator=generator).to(dtype) / 4
    return torch.where(values == 0, -values, values)


def layer(w: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype)
    linear.weight.data.copy_(w)
    return linear


def of(module: nn.Module) -> np.ndarray:
    mask = module.weight_mask
    assert mask.dtype == torch.bool and mask.shape == module.weight.shape
    assert not module.weight.detach()[~mask].any()
    return mask.numpy()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_k_of_n(shape: tuple[int, int], dtype: torch.dtype) -> None:
    w = weight(shape, dtype)
    for sparsity in SPARSITIES:
        module = layer(w)
        prune.magnitude_(module, sparsity)
        k = reference.kept(w.numel(), sparsity)
        expected = reference.largest(reference.magnitudes(w.float().numpy()), k)
        assert expected.sum() == k == w.numel() - round(sparsity * w.numel())
        assert np.array_equal(of(module), expected)
        assert torch.equal(module.weight.detach()[module.weight_mask], w[module.weight_mask])


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "3:5", "4:4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_n_of_m(shape: tuple[int, int], pattern: str) -> None:
    n, m = map(int, pattern.split(":"))
    module = layer(weight(shape))
    scores = np.abs(module.weight.detach().numpy())
    prune.magnitude_(module, pattern=pattern)
    assert np.array_equal(of(module), reference.n_of_m(scores, n, m))


@pytest.mark.parametrize("block", [(1, 16), (4, 4), (3, 5), (32, 32)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks(shape: tuple[int, int], block: tuple[int, int]) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    w[: block[0], : block[1]] = w[-1, -1].clone()
    module = layer(w)
    report = prune.magnitude_(module, 0.4, pattern="block", block=block)
    norms = reference.squared_norms(w.numpy(), block)
    assert np.array_equal(Pattern("block", block=block).units(w.abs()).numpy(), norms)
    keep = reference.largest(norms, reference.kept(norms.size, 0.4))
    assert np.array_equal(of(module), reference.expand(keep, block, shape))
    uneven = shape[0] % block[0] or shape[1] % block[1]
    assert ("padded with zeros" in report.rows[0].note) == bool(uneven)


def test_rows_and_channels_of_a_convolution() -> None:
    conv = nn.Conv2d(6, 10, 3)
    flat = conv.weight.detach().reshape(10, -1).numpy()
    rows = reference.squared_norms(flat, (1, 54))
    prune.magnitude_(conv, 0.3, pattern="rows")
    keep = reference.largest(rows, 7)
    assert np.array_equal(of(conv), np.broadcast_to(keep[:, :, None, None], (10, 6, 3, 3)))
    conv = nn.Conv2d(6, 10, 3)
    flat = conv.weight.detach().reshape(10, -1).numpy()
    keep = reference.largest(reference.squared_norms(flat, (10, 9)), 3)
    prune.magnitude_(conv, 0.5, pattern="channels")
    assert np.array_equal(of(conv), np.broadcast_to(keep[:, :, None, None], (10, 6, 3, 3)))


def test_constant_and_zero_tensors_keep_the_lower_index() -> None:
    for value in (0.0, -0.0, 0.5):
        module = layer(torch.full((4, 8), value))
        prune.magnitude_(module, 0.25)
        assert of(module).reshape(-1).tolist() == [True] * 24 + [False] * 8
        prune.finalize_(module)
        prune.magnitude_(module, 0.5, norm_scaled=True)  # no division by a norm of zero
        assert of(module).sum() == 16


def test_minus_zero_is_zero() -> None:
    module = layer(torch.tensor([[-0.0, 0.0, -0.0, 1.0]]))
    prune.magnitude_(module, pattern="2:4")
    assert of(module).tolist() == [[True, False, False, True]]


def test_threshold_keeps_what_reaches_it() -> None:
    module = layer(torch.tensor([[0.5, -0.25, 0.2499, 0.0, torch.inf]]))
    prune.magnitude_(module, threshold=0.25)
    assert of(module).tolist() == [[True, True, False, False, True]]


def test_global_is_one_ranking_in_the_order_of_the_layers() -> None:
    model = nn.Sequential(layer(weight((8, 8))), nn.ReLU(), layer(weight((8, 4)) * 2))
    scores = np.concatenate([m.weight.detach().abs().numpy().reshape(-1) for m in model[::2]])
    prune.magnitude_(model, 0.6, scope="global")
    expected = reference.largest(scores, reference.kept(96, 0.6))
    assert np.array_equal(np.concatenate([of(m).reshape(-1) for m in model[::2]]), expected)


def test_norm_scaled_ignores_the_scale_of_a_layer() -> None:
    w = torch.rand(8, 8) + 0.5
    model = nn.Sequential(layer(w), layer(w * 1024))
    prune.magnitude_(model, 0.5, scope="global")
    assert not of(model[0]).any()
    prune.finalize_(model)
    for module in model:
        module.weight.data.copy_(w * (1024 if module is model[1] else 1))
    prune.magnitude_(model, 0.5, scope="global", norm_scaled=True)
    assert np.array_equal(of(model[0]), of(model[1]))


def test_a_sparsity_for_each_layer() -> None:
    model = nn.Sequential(layer(weight((8, 8))), layer(weight((8, 8))), layer(weight((8, 8))))
    report = prune.magnitude_(model, {"0": 0.25, "2": 0.5})
    assert [row.masked for row in report.rows] == [True, False, True]
    assert of(model[0]).sum() == 48 and of(model[2]).sum() == 32


def test_pruned_weights_stay_pruned() -> None:
    module = layer(torch.randn(16, 16))
    prune.magnitude_(module, 0.5)
    first = of(module).copy()
    module.weight.data.fill_(3.0)  # nobody held them
    prune.magnitude_(module, 0.75)
    assert of(module).sum() == 64 and not (of(module) & ~first).any()
    prune.magnitude_(module, 0.1)  # less than is pruned already
    assert of(module).sum() == 64


def test_attention_and_shared_weights() -> None:
    model = nn.Module()
    model.attention = nn.MultiheadAttention(8, 2)
    model.first, model.second = nn.Linear(8, 8), nn.Linear(8, 8)
    model.second.weight = model.first.weight
    report = prune.magnitude_(model, 0.5)
    names = ["attention.in_proj_weight", "attention.out_proj.weight", "first.weight"]
    assert list(prune.masks(model)) == [row.name for row in report.rows] == names
    assert report.sparsity == 0.5
    assert "attention.in_proj_weight   24x8" in str(report) and "50.00%" in str(report)


def test_weights_without_values() -> None:
    model = nn.Sequential(layer(weight((4, 4))), nn.Linear(3, 0), nn.Linear(0, 3))
    report = prune.magnitude_(model, np.float32(0.5))
    assert list(prune.masks(model)) == ["0.weight"] and report.sparsity == 0.5
    for module, what in (
        (nn.LazyLinear(3), "is still lazy"),
        (nn.Linear(3, 3, device="meta"), "is on the meta device"),
    ):
        with pytest.raises(ValueError, match=f"magnitude_: 0.weight {what}"):
            prune.magnitude_(nn.Sequential(module), 0.5)


@pytest.mark.parametrize("pattern", ["bitmap", "2:4", "block"])
def test_sparse_layers_are_reported(pattern: str) -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 8))
    options = {} if pattern == "2:4" else {"sparsity": 0.75}
    prune.magnitude_(model, pattern="2:4" if pattern == "2:4" else "block", **options)
    before = prune.report(model).sparsity
    model[0] = SparseLinear.from_float(model[0], pattern=pattern)
    assert prune.report(model).sparsity == before and f"{pattern} layer" in str(prune.report(model))
