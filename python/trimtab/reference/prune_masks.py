"""Pruning masks, the obvious way: the oracle for NUMERICS.md section 5.

Scores are never negative but for pruned weights (-1) and signed importances. Among equal scores the
lower index stays, in row-major order.
"""

from __future__ import annotations

import numpy as np


def kept(count: int, sparsity: float) -> int:
    """k = n - round(sparsity n), halves to even."""
    return count - round(sparsity * count)


def magnitudes(weight: np.ndarray) -> np.ndarray:
    """|w|, -0.0 as 0; NaN raises."""
    if np.isnan(weight).any():
        raise ValueError("a NaN has no magnitude")
    return np.abs(weight)


def largest(scores: np.ndarray, k: int) -> np.ndarray:
    """True at exactly ``k`` of the scores."""
    flat = scores.reshape(-1)
    order = sorted(range(flat.size), key=lambda i: (-flat[i], i))
    mask = np.zeros(flat.size, bool)
    mask[order[:k]] = True
    return mask.reshape(scores.shape)


def largest_of_rows(scores: np.ndarray, k: int) -> np.ndarray:
    """True at exactly ``k`` of each row's scores; ``scores`` [N, K]."""
    return np.array([largest(row, k) for row in scores], bool).reshape(scores.shape)


def n_of_m(scores: np.ndarray, n: int, m: int) -> np.ndarray:
    """In each group of ``m`` along the rows of [N, K] the ``n`` largest; the last may be shorter."""
    mask = np.zeros(scores.shape, bool)
    for row in range(scores.shape[0]):
        for start in range(0, scores.shape[1], m):
            group = scores[row, start : start + m]
            mask[row, start : start + m] = largest(group, min(n, group.size))
    return mask


def squared_norms(weight: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Squared 2-norms in float64 of the blocks (outputs x inputs) of [N, K], padded with zeros."""
    high, wide = block
    rows, columns = -(-weight.shape[0] // high), -(-weight.shape[1] // wide)
    padded = np.zeros((rows * high, columns * wide))
    padded[: weight.shape[0], : weight.shape[1]] = weight
    norms = np.zeros((rows, columns))
    for i in range(rows):
        for j in range(columns):
            tile = padded[i * high : (i + 1) * high, j * wide : (j + 1) * wide]
            norms[i, j] = tree_sum(np.square(tile).reshape(-1))
    return norms


def tree_sum(values: np.ndarray) -> np.float64:
    """Zeros up to a power of two, then the second half onto the first until one is left."""
    size = 1
    while size < values.size:
        size *= 2
    total = np.zeros(size)
    total[: values.size] = values
    while size > 1:
        size //= 2
        total = total[:size] + total[size:]
    return total[0]


def expand(units: np.ndarray, block: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """The mask of the weights from that of the blocks."""
    return np.repeat(np.repeat(units, block[0], 0), block[1], 1)[: shape[0], : shape[1]]
