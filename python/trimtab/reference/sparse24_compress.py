"""sparse24_compress, the obvious way: rank each group of four, write down which two stay."""

from __future__ import annotations

import numpy as np

from .prune_masks import n_of_m


def sparse24_compress(magnitude: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(values [N, K4 / 2], indices uint8 [N, ceil(K4 / 8)]), K4 = K rounded up to 4.

    ``magnitude`` [N, K] is |weight| in any dtype that holds it; ``weight`` may be bfloat16's bits.
    """
    N, K = weight.shape
    lacking = -K % 4
    score = np.pad(magnitude.astype(np.float64), ((0, 0), (0, lacking)), constant_values=-1)
    mask = n_of_m(score, 2, 4)
    values = np.pad(weight, ((0, 0), (0, lacking)))[mask].reshape(N, (K + lacking) // 2)
    low, high = (np.nonzero(mask)[1] % 4).reshape(-1, 2).T
    codes = np.zeros((N, -(-(K + lacking) // 8) * 2), np.uint8)
    codes[:, : (K + lacking) // 4] = (low + 4 * high).reshape(N, (K + lacking) // 4)
    return values, codes[:, ::2] | codes[:, 1::2] << 4


def sparse24_mask(indices: np.ndarray, K: int) -> np.ndarray:
    """The kept positions as bool [N, K4]; ``indices`` as sparse24_compress gives them.

    Four bits a group of four columns, the even group's in the lower half: the first kept position in
    the lower two bits, the second above.
    """
    groups = -(-K // 4)
    codes = np.stack([indices & 15, indices >> 4], -1).reshape(len(indices), -1)[:, :groups]
    column = np.arange(4)
    keep = (column == (codes & 3)[..., None]) | (column == (codes >> 2)[..., None])
    return keep.reshape(len(indices), 4 * groups)
