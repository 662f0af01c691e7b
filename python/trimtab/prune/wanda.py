"""Wanda: weights by what they carry, |w| times the norm of their input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .apply import Sparsity, demoted, describe, layers_of, sparsities
from .calibration import Parts, each_layer
from .masks import Pattern, check_scores, kept, largest, largest_of_rows
from .report import PruneReport
from .state import Layers, Target, set_mask_, targets


def wanda_(
    model: nn.Module,
    sparsity: Sparsity | None,
    inputs: Any,
    *,
    pattern: str = "unstructured",
    block: tuple[int, int] | None = None,
    layers: Layers = None,
) -> PruneReport:
    """Prunes by |W[n, k]| ||X[:, k]||_2 (Sun et al. 2023, https://arxiv.org/abs/2306.11695), in place.

    One forward pass; each layer is pruned when it is reached, so that the next sees its pruned
    outputs. Unstructured, each row (output) keeps exactly k of its own weights, as in the paper;
    "n:m" chooses in each group along a row, rows, channels and blocks by the norm of their scores.

    Args:
        sparsity: share to prune, 0 to 1, or one for each layer; None with "n:m".
        inputs: calibration data as the model takes it: a tensor, a tuple of arguments, a dict of
            keyword arguments, or a list of such batches, which are joined along dimension 0.
        pattern, block, layers: as in :func:`magnitude_`; not nn.Conv3d.

    Raises:
        ValueError: as magnitude_; calibration data of a shape that the model doesn't take, or that
            gives NaN or Inf. The model is then as it was.
    """
    op = "wanda_"
    kind = Pattern.parse(op, pattern, block)
    chosen = targets(op, model, layers_of(sparsity, layers))
    wanted = dict(zip((t.name for t in chosen), sparsities(op, kind, sparsity, chosen)))
    for target in chosen:
        check_scores(op, target.name, target.weight.detach())

    def prune(target: Target, parts: Parts) -> None:
        score = scores(target, parts)
        check_scores(
            op, f"the score of {target.name}", score
        )  # Inf times an input that is always 0
        units = demoted(target, kind.units(score), kind)
        keep: Tensor | None = None
        if kind.kind == "unstructured":
            keep = largest_of_rows(units, kept(units.shape[1], wanted[target.name]))
        elif kind.kind != "n:m":
            keep = largest(units, kept(units.numel(), wanted[target.name]))
        mask = kind.mask(units, keep, target.weight.shape)
        set_mask_(target.module, target.key, mask if target.mask is None else mask & target.mask)

    missed = each_layer(op, model, chosen, inputs, prune)
    result = describe(model, chosen, kind)
    result.notes += [f"{name}: left alone, the forward pass does not reach it" for name in missed]
    return result


def scores(target: Target, parts: Parts) -> Tensor:
    """|W| times the norm of the inputs, of the weight's shape; float32."""
    weight = target.weight.detach()
    flat = weight.flatten(1).float().abs()
    result = torch.empty_like(flat)
    for rows, x in parts:
        norms = torch.linalg.vector_norm(x, dim=0, dtype=torch.float64).float()
        result[rows] = flat[rows] * norms
    return result.reshape(weight.shape)
