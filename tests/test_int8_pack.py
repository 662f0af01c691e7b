"""int8_pack: the layout as documented, its inverse, registration, bad input."""

from __future__ import annotations

import cases
import pytest
import torch

from trimtab import ops
from trimtab.ops.int8_pack import packed_size

SIZES = [(0, 4), (4, 0), (1, 1), (16, 4), (17, 5), (33, 130), (100, 257)]


@pytest.mark.parametrize("size", SIZES, ids=cases.ident)
def test_layout_and_inverse(size: tuple[int, int], generator) -> None:
    N, K = size
    weight = cases.int8(N, K, generator)
    packed = ops.int8_pack(weight)
    assert packed.numel() == packed_size(N, K)
    rows, steps = (N + 15) // 16 * 16, (K + 3) // 4 * 4
    padded = torch.zeros(rows, steps, dtype=torch.int8)
    padded[:N, :K] = weight
    want = padded.reshape(rows // 16, 16, steps // 4, 4).transpose(1, 2).reshape(-1)
    assert torch.equal(packed[: want.numel()], want)
    assert not packed[want.numel() :].any()
    assert torch.equal(ops.int8_unpack(packed, N, K), weight)


def test_one_copy_and_little_more() -> None:
    for N, K in [(768, 768), (4099, 1001), (1024, 4096)]:
        assert packed_size(N, K) <= 1.05 * N * K


def test_strided_weight(generator) -> None:
    weight = cases.int8(40, 60, generator)
    assert torch.equal(
        ops.int8_pack(weight[::2, :31]), ops.int8_pack(weight[::2, :31].contiguous())
    )
    assert torch.equal(ops.int8_pack(weight.t()), ops.int8_pack(weight.t().contiguous()))


def test_opcheck(generator) -> None:
    weight = cases.int8(20, 9, generator)
    torch.library.opcheck(torch.ops.trimtab.int8_pack.default, (weight,))
    torch.library.opcheck(torch.ops.trimtab.int8_unpack.default, (ops.int8_pack(weight), 20, 9))


def test_bad_input() -> None:
    with pytest.raises(RuntimeError, match=r"int8_pack: expected weight of 2-D int8, got \[3\]"):
        ops.int8_pack(torch.zeros(3, dtype=torch.int8))
    with pytest.raises(RuntimeError, match=r"int8_pack: .*got \[3, 3\] float32"):
        ops.int8_pack(torch.zeros(3, 3))
    with pytest.raises(RuntimeError, match="int8_unpack: expected a packed weight of 1088 bytes"):
        ops.int8_unpack(torch.zeros(99, dtype=torch.int8), 5, 8)
    with pytest.raises(RuntimeError, match="int8_unpack: expected sizes >= 0, got N=-1"):
        ops.int8_unpack(torch.zeros(99, dtype=torch.int8), -1, 8)
