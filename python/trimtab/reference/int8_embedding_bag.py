"""int8_embedding_bag, the obvious way: one addition after the other, in float32."""

from __future__ import annotations

import numpy as np

from .dtypes import round_to


def int8_embedding_bag(
    bags: list[np.ndarray],
    weight: np.ndarray,
    weight_scale: np.ndarray,
    mode: str = "sum",
    per_sample_weights: list[np.ndarray] | None = None,
    padding_idx: int | None = None,
    out_dtype: str = "float32",
) -> np.ndarray:
    """Sums or means of dequantized rows, one for each array of indices in ``bags``.

    ``weight`` [V, D] int8, ``weight_scale`` [V] float32, ``per_sample_weights`` float32 arrays like
    ``bags`` (mode "sum"). Indices equal to ``padding_idx`` are left out. Returns [bags, D].
    """
    out = np.zeros((len(bags), weight.shape[1]), np.float32)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        for b, bag in enumerate(bags):
            count = 0
            for i, index in enumerate(bag):
                if index == padding_idx:
                    continue
                t = weight[index].astype(np.float32) * weight_scale[index]
                if per_sample_weights is not None:
                    t = t * per_sample_weights[b][i]
                out[b] = out[b] + t
                count += 1
            if mode == "mean" and count:
                out[b] = out[b] / np.float32(count)
    return round_to(out, out_dtype)
