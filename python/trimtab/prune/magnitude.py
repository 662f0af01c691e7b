"""Small weights go: a threshold, or exactly k of n stay."""

from __future__ import annotations

import torch
from torch import nn

from .apply import Sparsity, choose, layers_of, set_masks_, sparsities, units_of
from .checks import number
from .masks import Pattern, check_scores
from .report import PruneReport
from .state import Layers, targets


def magnitude_(
    model: nn.Module,
    sparsity: Sparsity | None = None,
    *,
    threshold: float | None = None,
    pattern: str = "unstructured",
    block: tuple[int, int] | None = None,
    scope: str = "layer",
    norm_scaled: bool = False,
    layers: Layers = None,
) -> PruneReport:
    """Prunes weights of small magnitude, in place (Han et al. 2015, https://arxiv.org/abs/1506.02626).

    Exactly k = n - round(sparsity n) stay, those with the largest |w|; of equal ones the lower index.
    Masks go into buffers ``weight_mask``. Weights that were pruned before stay pruned.

    Args:
        sparsity: share of weights (or rows, channels, blocks) to prune, 0 to 1; or one for each layer
            by name, the others being left alone. Not for "n:m", which fixes it.
        threshold: instead of sparsity: whatever is below it goes.
        pattern: "unstructured"; "2:4" or any n of m along the inputs; "block" of ``block`` (outputs,
            inputs), (32, 32) if not given; "rows" (outputs, filters); "channels" (inputs). Rows,
            channels and blocks rank by 2-norm in float64. A convolution's weight is seen as
            [outputs, inputs x taps]. Where a block doesn't divide, the weight is padded with zeros,
            and the report says so.
        scope: "layer": each layer gets this sparsity; "global": one ranking over all of them.
        norm_scaled: magnitudes are divided by the 2-norm of their layer, so that one ranking or
            threshold is fair to layers of different scale.
        layers: see :func:`trimtab.prune.targets`.

    Raises:
        ValueError: sparsity outside [0, 1], a NaN weight (named), nothing to prune. The model is then
            as it was.
    """
    op = "magnitude_"
    kind = Pattern.parse(op, pattern, block)
    chosen = targets(op, model, layers_of(sparsity, layers))
    scores = []
    for target in chosen:
        weight = target.weight.detach()
        score = weight.abs()
        if norm_scaled:
            check_scores(op, target.name, score)
            norm = torch.linalg.vector_norm(score, dtype=torch.float64)
            if bool(torch.isinf(norm)):
                raise ValueError(
                    f"{op}: {target.name}: expected a finite norm to divide by, got inf"
                )
            score = score.double() / torch.where(norm > 0, norm, 1.0)
        scores.append(score)
    units = units_of(op, chosen, scores, kind)
    if threshold is None:
        wanted = sparsities(op, kind, sparsity, chosen)
        masks = choose(op, chosen, units, kind, wanted, scope)
        return set_masks_(model, chosen, masks, kind)
    if sparsity is not None or kind.kind == "n:m":
        raise ValueError(f"{op}: threshold goes with neither sparsity nor n of m")
    threshold = number(op, "threshold", threshold)
    if not threshold >= 0:
        raise ValueError(f"{op}: expected threshold >= 0, got {threshold}")
    limit = threshold**2 if kind.squares else threshold
    masks = [kind.mask(u, u >= limit, t.weight.shape) for u, t in zip(units, chosen)]
    masks = [m if t.mask is None else m & t.mask for m, t in zip(masks, chosen)]
    return set_masks_(model, chosen, masks, kind)
