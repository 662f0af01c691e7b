"""From scores of weights to masks: what all criteria that rank weights share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .checks import expect
from .masks import Pattern, check_scores, check_sparsity, kept, largest
from .report import PruneReport, report
from .state import Layers, Target, set_mask_, targets
from .undo import Undo

Sparsity = float | Mapping[str, float]


def sparsities(
    op: str, pattern: Pattern, sparsity: Sparsity | None, chosen: Sequence[Target]
) -> list[float]:
    """The sparsity of each target, checked."""
    if pattern.sparsity is not None:
        fixed = pattern.sparsity
        if sparsity is not None and sparsity != fixed:
            raise ValueError(
                f"{op}: {pattern.n}:{pattern.m} is a sparsity of {fixed:g}, got {sparsity}"
            )
        return [fixed] * len(chosen)
    if sparsity is None:
        raise ValueError(f"{op}: expected a sparsity in [0, 1], got None")
    if not isinstance(sparsity, Mapping):
        return [check_sparsity(op, sparsity)] * len(chosen)
    names = {target.layer for target in chosen}
    if unknown := sorted(set(sparsity) - names):
        raise ValueError(f"{op}: sparsity: {unknown} are none of the layers to prune")
    values = [sparsity.get(t.layer, 0.0) for t in chosen]
    return [check_sparsity(op, value) for value in values]


def layers_of(sparsity: Sparsity | None, layers: Layers) -> Layers:
    """A sparsity for each layer also says which layers."""
    if isinstance(sparsity, Mapping) and layers is None:
        return list(sparsity)  # names of layers
    return layers


def units_of(
    op: str,
    chosen: Sequence[Target],
    scores: Sequence[Tensor],
    pattern: Pattern,
    signed: bool = False,
) -> list[Tensor]:
    """Scores of what is kept or pruned together; NaN raises."""
    for target, score in zip(chosen, scores):
        check_scores(op, target.name, score)
    return [pattern.units(score, signed) for score in scores]


def choose(
    op: str,
    chosen: Sequence[Target],
    units: Sequence[Tensor],
    pattern: Pattern,
    sparsity: Sequence[float],
    scope: str,
) -> list[Tensor]:
    """A mask a target; changes nothing. What is pruned already goes first."""
    if scope not in ("layer", "global"):
        raise ValueError(f'{op}: expected scope "layer" or "global", got {scope!r}')
    units = [demoted(target, own, pattern) for target, own in zip(chosen, units)]
    if pattern.kind == "n:m":
        keeps: list[Tensor | None] = [None] * len(units)
    elif scope == "layer":
        keeps = [largest(u, kept(u.numel(), s)) for u, s in zip(units, sparsity)]
    else:
        if len(set(sparsity)) > 1:
            raise ValueError(f'{op}: scope="global" takes one sparsity for all layers')
        wide = torch.float64 if any(u.dtype == torch.float64 for u in units) else torch.float32
        pool = torch.cat([u.reshape(-1).to("cpu", wide) for u in units])
        keep = largest(pool, kept(pool.numel(), sparsity[0]))
        parts = keep.split([u.numel() for u in units])
        keeps = [part.reshape(u.shape).to(u.device) for part, u in zip(parts, units)]
    masks = [pattern.mask(u, k, t.weight.shape) for u, k, t in zip(units, keeps, chosen)]
    # A unit that stays does not bring back its weights that are pruned.
    return [m if t.mask is None else m & t.mask for m, t in zip(masks, chosen)]


def demoted(target: Target, units: Tensor, pattern: Pattern) -> Tensor:
    """Units that are pruned already rank below all others."""
    if target.mask is None:
        return units
    alive = pattern.units(target.mask.float(), signed=True) > 0
    return units.masked_fill(~alive, -torch.inf)


def set_masks_(
    model: nn.Module, chosen: Sequence[Target], masks: Sequence[Tensor], pattern: Pattern
) -> PruneReport:
    """All masks or none; the report says where blocks were padded."""
    with Undo() as undo:
        for target, mask in zip(chosen, masks):
            undo.save(target.module)
            set_mask_(target.module, target.key, mask)
    return describe(model, chosen, pattern)


def describe(model: nn.Module, chosen: Sequence[Target], pattern: Pattern) -> PruneReport:
    result = report(model)
    notes = {target.name: pattern.padding(target.weight.shape) for target in chosen}
    for row in result.rows:
        row.note = notes.get(row.name, "")
    return result


def scores_(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    sparsity: Sparsity | None = None,
    *,
    pattern: str = "unstructured",
    block: tuple[int, int] | None = None,
    scope: str = "layer",
    signed: bool = False,
) -> PruneReport:
    """Prunes by any importance: the weights with the lowest scores go.

    Args:
        scores: name of a parameter ("fc1.weight") and a float tensor of its shape.
        signed: scores may be negative (movement); those of a block are then summed. Else a block's
            is the 2-norm of its scores.
        sparsity, pattern, block, scope: as in :func:`magnitude_`.

    Raises:
        ValueError: as magnitude_; a NaN score; scores of another shape than their parameter.
    """
    op = "scores_"
    kind = Pattern.parse(op, pattern, block)
    expect(op, "a dict of scores by names of parameters", isinstance(scores, Mapping), scores)
    chosen = [t for t in targets(op, model) if t.name in scores]
    if unknown := sorted(set(scores) - {t.name for t in chosen}):
        raise ValueError(f"{op}: expected names of weights that can be pruned, got {unknown}")
    if not chosen:
        raise ValueError(f"{op}: expected scores of at least one weight, got none")
    values = []
    for target in chosen:
        score = scores[target.name]
        expect(op, f"a tensor as scores of {target.name}", isinstance(score, Tensor), score)
        if score.shape != target.weight.shape:
            raise ValueError(
                f"{op}: {target.name}: expected scores of shape {list(target.weight.shape)}, got "
                f"{list(score.shape)}"
            )
        check_scores(op, target.name, target.weight.detach())
        values.append(score.detach())
    wanted = sparsities(op, kind, sparsity, chosen)
    units = units_of(op, chosen, values, kind, signed)
    return set_masks_(model, chosen, choose(op, chosen, units, kind, wanted, scope), kind)
