"""trimtab.numpy's sparse products: against float64, against torch's bits, and clear about bad input."""

from __future__ import annotations

import numpy as np
import pytest

import trimtab.numpy as tn
from trimtab.reference.bitmap_linear import bitmap_linear as reference_bitmap
from trimtab.reference.block_linear import block_linear as reference_block

ml_dtypes = pytest.importorskip("ml_dtypes")
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
EPS = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SHAPES = [(0, 5, 8), (1, 1, 1), (3, 17, 0), (2, 37, 131), (33, 70, 257)]
BLOCK = (16, 32)


@pytest.fixture(params=tn.available_isas())
def isa(request):
    tn.set_isa(request.param)
    yield request.param
    tn.set_isa(None)


def case(shape: tuple[int, int, int], dtype: str):
    """x [M, K], a weight [N, K] with empty rows and a bias [N]."""
    M, N, K = shape
    rng = np.random.default_rng(0)
    x = rng.standard_normal((M, K), dtype=np.float32).astype(DTYPES[dtype])
    kept = rng.random((N, K)) < 0.3
    weight = np.where(kept, rng.standard_normal((N, K), dtype=np.float32), np.float32(0))
    weight[N // 2 :: 7] = 0
    return x, weight.astype(DTYPES[dtype]), rng.standard_normal(N, dtype=np.float32)


def plain(array):
    """For the reference, which keeps bfloat16 as uint16."""
    return array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array


def close(got, x, weight, bias) -> None:
    """NUMERICS.md section 7, and one rounding of the output."""
    K, name = x.shape[1], str(got.dtype)
    x64, w64 = x.astype(np.float64), weight.astype(np.float64)
    want = np.maximum(x64 @ w64.T + bias, 0)
    bound = (
        2 * max(K, 1) ** 0.5 * 2.0**-24 * np.linalg.norm(np.abs(x64) @ np.abs(w64).T + abs(bias))
    )
    bound += EPS[name] * np.linalg.norm(want)
    assert got.shape == want.shape
    assert np.linalg.norm(got.astype(np.float64) - want) <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float_values(isa, dtype: str, shape) -> None:
    x, weight, bias = case(shape, dtype)
    parts = tn.bitmap_pack(weight)
    got = tn.bitmap_linear(x, *parts, bias=bias, activation="relu")
    assert got.dtype == x.dtype
    close(got, x, weight, bias)
    again = tn.bitmap_linear(x, *parts[:2], bias=bias, activation="relu")  # counted by itself
    assert got.tobytes() == again.tobytes()
    values, crow, col = tn.block_pack(weight, BLOCK)
    close(
        tn.block_linear(x, values, crow, col, shape[1], bias=bias, activation="relu"),
        x, weight, bias,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_values_are_exact(isa, dtype: str, shape) -> None:
    x, weight, bias = case(shape, dtype)
    codes, scale = tn.quantize_int8(weight)
    want = tn.int8_linear(x, codes, scale, bias, "gelu")
    values, bitmap, start = tn.bitmap_pack(codes, weight != 0)
    got = tn.bitmap_linear(x, values, bitmap, start, scale, bias, "gelu")
    assert got.tobytes() == want.tobytes()
    expected = reference_bitmap(plain(x), values, bitmap, scale, bias, "gelu")
    assert got.tobytes() == expected.tobytes()
    blocks = tn.block_pack(codes, BLOCK, weight != 0)
    got = tn.block_linear(x, *blocks, shape[1], scale, bias, "gelu")
    assert got.tobytes() == want.tobytes()
    expected = reference_block(plain(x), *blocks, shape[1], scale, bias, "gelu")
    assert got.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packing_is_torchs_and_comes_back(dtype: str, shape) -> None:
    torch = pytest.importorskip("torch")
    from trimtab import ops

    _, weight, _ = case(shape, dtype)
    other = torch.from_dlpack(weight.astype(np.float32)).to(getattr(torch, dtype))
    N, K = weight.shape
    for own, theirs in (
        (tn.bitmap_pack(weight), ops.bitmap_pack(other)),
        (tn.block_pack(weight, BLOCK), ops.block_pack(other, BLOCK, refuse_larger=False)),
    ):
        for one, two in zip(own, theirs):
            assert one.shape == tuple(two.shape)
            assert one.tobytes() == two.reshape(-1).view(torch.uint8).numpy().tobytes()
    values, bitmap, _ = tn.bitmap_pack(weight)
    assert tn.bitmap_unpack(values, bitmap, K).tobytes() == weight.tobytes()
    assert tn.block_unpack(*tn.block_pack(weight, BLOCK), N, K).tobytes() == weight.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bits_of_torchs_ops(isa, dtype: str) -> None:
    """Through DLPack, without a copy, of strided rows and into the caller's memory."""
    torch = pytest.importorskip("torch")
    from trimtab import ops

    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    weight = torch.randn(48, 96).to(kind) * (torch.rand(48, 96) < 0.2)
    x = torch.randn(2, 3, 200).to(kind)[..., 5:101]
    ops.set_isa(isa)
    try:
        want = ops.bitmap_linear(x, *ops.bitmap_pack(weight))
        out = torch.empty_like(want)
        assert tn.bitmap_linear(x, *ops.bitmap_pack(weight), out=out) is out
        assert torch.equal(out, want)
        parts = ops.block_pack(weight, (16, 16), refuse_larger=False)
        want = ops.block_linear(x, *parts, N=48)
        assert torch.equal(tn.block_linear(x, *parts, 48, out=out), want)
    finally:
        ops.set_isa(None)


def test_what_is_pruned_is_not_multiplied() -> None:
    x = np.array([[np.inf, 1.0]], np.float32)
    values, bitmap, start = tn.bitmap_pack(np.array([[0, 2.0]], np.float32))
    assert tn.bitmap_linear(x, values, bitmap, start).tolist() == [[2.0]]


def test_out_dtype() -> None:
    x, weight, bias = case((2, 37, 131), "float16")
    got = tn.bitmap_linear(x, *tn.bitmap_pack(weight), bias=bias, out_dtype="float32")
    assert got.dtype == np.float32
    same = got.astype(np.float16)
    assert same.tobytes() == tn.bitmap_linear(x, *tn.bitmap_pack(weight), bias=bias).tobytes()


def bad_calls() -> dict[str, tuple]:
    x, weight, _ = case((2, 37, 131), "float32")
    values, bitmap, start = tn.bitmap_pack(weight)
    blocks, crow, col = tn.block_pack(weight, BLOCK)
    codes, scale = tn.quantize_int8(weight)
    q = codes[weight != 0]
    past, shared = bitmap.copy(), np.zeros((2, 37), np.float32)
    past[3, -1] |= 128
    wild, down = col.copy(), crow.copy()
    wild[0], down[1] = 5, crow[-1] + 1
    bit, blo = tn.bitmap_linear, tn.block_linear
    return {
        "values-count": (ValueError, "bitmap_linear: expected as many values as bits that are set",
            lambda: bit(x, values[:-1], bitmap)),
        "row_start-count": (ValueError, "bitmap_linear: .*row_start",
            lambda: bit(x, values[:-1], bitmap, start)),
        "bit-past-K": (ValueError, "bitmap_linear: expected no bit past K=131, found one in row 3",
            lambda: bit(x, np.append(values, np.float32(1)), past)),
        "bitmap-width": (ValueError, r"bitmap_linear: expected bitmap \[N, 24\] for K=131, got .*16",
            lambda: bit(x, values, bitmap[:, :16])),
        "bitmap-dtype": (TypeError, "bitmap_linear: expected bitmap of uint8, got .*int8",
            lambda: bit(x, values, bitmap.view(np.int8))),
        "row_start-dtype": (TypeError, "bitmap_linear: expected row_start of int64, got .*int32",
            lambda: bit(x, values, bitmap, start.astype(np.int32))),
        "row_start-length": (ValueError, r"bitmap_linear: expected row_start \[38\], got \[37\]",
            lambda: bit(x, values, bitmap, start[:-1])),
        "other-dtype": (TypeError, "bitmap_linear: expected values of int8 or of x's dtype for x",
            lambda: bit(x.astype(np.float16), values, bitmap)),
        "no-scale": (TypeError, "bitmap_linear: expected weight_scale with int8 values .* got none",
            lambda: bit(x, q, bitmap)),
        "scale": (TypeError, "bitmap_linear: expected weight_scale .* got one for .*float32",
            lambda: bit(x, values, bitmap, weight_scale=scale)),
        "scale-length": (ValueError, r"bitmap_linear: expected weight_scale \[N=37\], got \[36\]",
            lambda: bit(x, q, bitmap, weight_scale=scale[:-1])),
        "bias": (ValueError, r"bitmap_linear: expected bias \[N=37\], got \[3\]",
            lambda: bit(x, values, bitmap, bias=np.zeros(3, np.float32))),
        "activation": (ValueError, "bitmap_linear: expected activation none",
            lambda: bit(x, values, bitmap, activation="tanh")),
        "out": (ValueError, r"bitmap_linear: expected out of shape \[2, 37\], got",
            lambda: bit(x, values, bitmap, out=np.zeros((2, 36), np.float32))),
        "alias": (ValueError, "block_linear: expected out in memory of its own",
            lambda: blo(shared, np.zeros((0, 1, 37), np.float32), np.zeros(38, np.int32),
                np.zeros(0, np.int32), 37, out=shared)),
        "unpack": (ValueError, "bitmap_row_start: expected as many values as bits",
            lambda: tn.bitmap_unpack(values[1:], bitmap, 131)),
        "unpack-K": (ValueError, r"bitmap_row_start: expected bitmap \[N, 32\] for K=200",
            lambda: tn.bitmap_unpack(values, bitmap, 200)),
        "unpack-rank": (ValueError, r"block_unpack: expected values \[blocks, bn, bk\]",
            lambda: tn.block_unpack(blocks[0], crow, col, 37, 131)),
        "unpack-crow": (ValueError, r"block_unpack: expected crow \[.*\] to rise from 0",
            lambda: tn.block_unpack(blocks, down, col, 37, 131)),
        "unpack-col": (ValueError, r"block_unpack: expected col .* in \[0, 5\)",
            lambda: tn.block_unpack(blocks, crow, -wild, 37, 131)),
        "crow-length": (ValueError, r"block_linear: expected crow \[4\], got \[3\]",
            lambda: blo(x, blocks, crow[:-1], col, 37)),
        "crow-rises": (ValueError, r"block_linear: expected crow to rise from 0",
            lambda: blo(x, blocks, down, col, 37)),
        "col-range": (ValueError, r"block_linear: expected col in \[0, 5\), got col\[0\] = 5",
            lambda: blo(x, blocks, crow, wild, 37)),
        "col-dtype": (TypeError, "block_linear: expected col of int32, got .*int64",
            lambda: blo(x, blocks, crow, col.astype(np.int64), 37)),
        "N": (ValueError, "block_linear: expected values .* N >= 0, got .* N=-1",
            lambda: blo(x, blocks, crow, col, -1)),
        "blocks-rank": (ValueError, "block_linear: expected values of rank 3",
            lambda: blo(x, blocks[0], crow, col, 37)),
        "nan": (ValueError, r"bitmap_pack: expected weights without NaN, got weight\[0, 1\]",
            lambda: tn.bitmap_pack(np.array([[0, np.nan]]))),
        "mask": (ValueError, r"block_pack: expected mask of \[37, 131\] bool, got \[3\] int",
            lambda: tn.block_pack(weight, BLOCK, np.ones(3, int))),
        "block": (ValueError, r"block_pack: expected a block of at least 1 x 1, got \(0, 4\)",
            lambda: tn.block_pack(weight, (0, 4))),
        "rank": (ValueError, r"bitmap_pack: expected weight \[N, K\], got \[3\]",
            lambda: tn.bitmap_pack(np.ones(3))),
    }  # fmt: skip


@pytest.mark.parametrize("name", bad_calls())
def test_bad_input(name: str) -> None:
    error, message, call = bad_calls()[name]
    with pytest.raises(error, match=message):
        call()
