"""Which weights stay: k of n, n of m, blocks (NUMERICS.md section 5; reference/prune_masks.py).

Exactly k stay. Among equal scores the lower index stays, -0.0 counts as 0, NaN raises. Norms of rows,
channels and blocks are compared squared, in float64.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from ..ops.library import FLOAT_DTYPES
from ..ops.sparse24_compress import sparse24_compress, sparse24_mask


def kept(count: int, sparsity: float) -> int:
    """How many of ``count`` stay: count - round(sparsity count), halves to even."""
    return count - round(sparsity * count)


def check_sparsity(op: str, sparsity: object) -> float:
    """``sparsity`` as a float; ValueError outside [0, 1]."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, Real):
        raise TypeError(f"{op}: expected a number as sparsity, got {sparsity!r}")
    share = float(sparsity)
    if not 0 <= share <= 1:
        raise ValueError(f"{op}: expected sparsity in [0, 1], got {sparsity}")
    return share


def check_scores(op: str, name: str, scores: Tensor) -> None:
    """ValueError if there is a NaN, which would rank anywhere."""
    if scores.is_complex() or not scores.is_floating_point():
        raise TypeError(f"{op}: {name}: expected real floating point, got {scores.dtype}")
    if bool(torch.isnan(scores).any()):
        at = torch.isnan(scores).nonzero()[0].tolist()
        raise ValueError(f"{op}: {name} is NaN at {at}; nothing was pruned")


def largest(scores: Tensor, k: int) -> Tensor:
    """bool of ``scores``' shape, True at exactly ``k`` of them, 0 <= k <= n."""
    return largest_of_rows(scores.reshape(1, -1), k).reshape(scores.shape)


def largest_of_rows(scores: Tensor, k: int) -> Tensor:
    """bool [R, n], True at exactly ``k`` of each row's scores [R, n]."""
    count = scores.shape[1]
    if k <= 0 or k >= count:
        return torch.full(scores.shape, k > 0, dtype=torch.bool, device=scores.device)
    if scores.dtype in (torch.bfloat16, torch.float16):
        scores = scores.float()
    # Selection is linear in n, a stable sort is not. What is left is to break the ties.
    at = count - k
    if scores.device.type == "cpu":  # NumPy's is vectorized: 590k scores in 1.3 ms, torch's 35
        found = np.partition(scores.detach().numpy(), at, axis=1)[:, at : at + 1]
        limit = torch.from_numpy(np.ascontiguousarray(found))
    else:
        limit = torch.kthvalue(scores, at + 1, dim=1, keepdim=True).values
    above, ties = scores > limit, scores == limit
    missing = k - above.sum(1, keepdim=True)
    if bool((ties.sum(1, keepdim=True) > missing).any()):
        ties &= ties.cumsum(1) <= missing
    return above | ties


def n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """bool [N, K]: in each group of ``m`` along K the ``n`` largest; of a shorter last one too."""
    rows, count = scores.shape
    if (n, m) == (2, 4) and scores.dtype in FLOAT_DTYPES and bool((scores >= 0).all()):
        _, indices = sparse24_compress(scores.detach())
        return sparse24_mask(indices, count)[:, :count]
    lacking = -count % m
    if lacking:  # what is not there never stays
        scores = torch.nn.functional.pad(scores, (0, lacking), value=-torch.inf)
    groups = scores.reshape(-1, m)
    order = groups.argsort(dim=1, descending=True, stable=True)
    mask = torch.zeros(groups.shape, dtype=torch.bool, device=scores.device)
    mask.scatter_(1, order[:, :n], True)
    return mask.reshape(rows, count + lacking)[:, :count]


def block_sums(values: Tensor, block: tuple[int, int]) -> Tensor:
    """float64 [ceil(N / bn), ceil(K / bk)]: sums over blocks of [N, K], padded with zeros.

    Added as a tree, half onto half, so that all devices round alike.
    """
    high, wide = block
    rows, columns = -(-values.shape[0] // high), -(-values.shape[1] // wide)
    room = (0, columns * wide - values.shape[1], 0, rows * high - values.shape[0])
    padded = torch.nn.functional.pad(values.double(), room)
    total = padded.reshape(rows, high, columns, wide).transpose(1, 2).flatten(2)
    size = 1 << (high * wide - 1).bit_length()
    total = torch.nn.functional.pad(total, (0, size - high * wide))
    while size > 1:
        size //= 2
        total = total[..., :size] + total[..., size:]
    return total[..., 0]


def expand(units: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """The mask [N, K] of the weights from that of the blocks."""
    wide = units.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return wide[: shape[0], : shape[1]].contiguous()


@dataclass(frozen=True)
class Pattern:
    """What is kept or pruned together.

    kind: "unstructured", "n:m", "block", "rows" (outputs, filters) or "channels" (inputs with all
        taps of their kernel).
    """

    kind: str
    n: int = 0
    m: int = 0
    block: tuple[int, int] = (1, 1)

    @staticmethod
    def parse(op: str, text: str, block: tuple[int, int] | None) -> Pattern:
        if text == "block":
            sides = (32, 32) if block is None else block
            pair = isinstance(sides, tuple | list) and len(sides) == 2
            if not pair or not all(type(side) is int and side > 0 for side in sides):
                raise ValueError(f"{op}: expected block=(outputs, inputs), got {block}")
            return Pattern("block", block=(sides[0], sides[1]))
        if block is not None:
            raise ValueError(f'{op}: block={block} goes with pattern="block", got {text!r}')
        if text in ("unstructured", "bitmap"):
            return Pattern("unstructured")
        if text in ("rows", "channels"):
            return Pattern(text)
        found = re.fullmatch(r"(\d+):(\d+)", text) if isinstance(text, str) else None
        if found is None or not 0 < int(found[1]) <= int(found[2]):
            raise ValueError(
                f'{op}: expected pattern "unstructured", "block", "rows", "channels" or n of m as '
                f'"2:4", got {text!r}'
            )
        return Pattern("n:m", int(found[1]), int(found[2]))

    @property
    def sparsity(self) -> float | None:
        """Fixed by the pattern, or None."""
        return 1 - self.n / self.m if self.kind == "n:m" else None

    def tile(self, shape: torch.Size) -> tuple[int, int]:
        """Outputs and inputs of a unit, in a weight of this shape as [N, K]."""
        taps = shape[2:].numel()
        tiles = {
            "block": self.block,
            "rows": (1, shape[1:].numel()),
            "channels": (shape[0], taps),
        }
        return tuple(max(side, 1) for side in tiles.get(self.kind, (1, 1)))  # type: ignore[return-value]

    def padding(self, shape: torch.Size) -> str:
        """Words for a block that doesn't divide the weight; "" where it does."""
        rows, columns = shape[0], shape[1:].numel()
        high, wide = self.tile(shape)
        full = (-(-rows // high) * high, -(-columns // wide) * wide)
        if self.kind == "n:m":
            high, wide, full = 1, self.m, (rows, -(-columns // self.m) * self.m)
        if full == (rows, columns):
            return ""
        whole = f"[{full[0]}, {full[1]}]"
        return f"[{rows}, {columns}] padded with zeros to {whole} for {high}x{wide} blocks"

    def units(self, scores: Tensor, signed: bool = False) -> Tensor:
        """Scores of the units, from those of the weights: squared 2-norms, or sums if signed.

        Squared, in float64: they rank alike, and torch's root of a double may be an ulp off.
        """
        flat = scores.flatten(1)
        if not self.squares:
            return flat
        tile = self.tile(scores.shape)
        if signed:
            return block_sums(flat, tile)
        return block_sums(flat.double().square(), tile)

    @property
    def squares(self) -> bool:
        """Whether units() squares."""
        return self.kind not in ("unstructured", "n:m")

    def mask(self, units: Tensor, keep: Tensor | None, shape: torch.Size) -> Tensor:
        """The weights' mask from which units stay (n:m chooses by itself, by ``units``)."""
        if self.kind == "n:m":
            return n_of_m(units, self.n, self.m).reshape(shape)
        assert keep is not None
        flat = torch.Size((shape[0], shape[1:].numel()))
        return expand(keep, self.tile(shape), flat).reshape(shape)
