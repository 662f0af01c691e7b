"""SparseGPT: what is pruned is made up for by the weights that are left.

Column by column (inputs k), with H = X^T X + damping and U the upper Cholesky factor of H^-1:
score[n, k] = w^2 / U[k, k]^2; a pruned weight's error w / U[k, k] goes, times U[k, k:], to the
columns that are still to come.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .apply import Sparsity, describe, layers_of, sparsities
from .calibration import Parts, each_layer
from .checks import number
from .masks import Pattern, block_sums, check_scores, expand, largest, n_of_m
from .report import PruneReport
from .state import Layers, Target, set_mask_, targets

COLUMNS = 128  # chosen together, by scores that all errors before them have changed
SAMPLES = 4096  # summed in float32, these sums in float64


class Quota:
    """Hands out how many to prune, piece by piece: in all exactly round(sparsity n)."""

    def __init__(self, sparsity: float) -> None:
        self.sparsity, self.seen, self.pruned = sparsity, 0, 0

    def take(self, count: int) -> int:
        self.seen += count
        due = round(self.sparsity * self.seen) - self.pruned
        due = min(max(due, 0), count)
        self.pruned += due
        return due


def sparsegpt_(
    model: nn.Module,
    sparsity: Sparsity | None,
    inputs: Any,
    *,
    pattern: str = "unstructured",
    block: tuple[int, int] | None = None,
    layers: Layers = None,
    damping: float = 0.01,
) -> PruneReport:
    """Prunes and updates the weights that stay (Frantar & Alistarh 2023,
    https://arxiv.org/abs/2301.00774), in place.

    One forward pass; each layer is pruned when it is reached. A layer of K inputs
    takes about 3 K^2 doubles and K^3 + K^2 N operations.

    Args:
        sparsity: share to prune, 0 to 1, or one for each layer; None with "n:m". Each run of 128
            inputs is pruned to it, exactly round(sparsity n) weights in all.
        inputs: calibration data, see :func:`wanda_`.
        pattern: "unstructured", "n:m", "block" or "channels".
        damping: added to the diagonal of H, as a share of its mean.

    Raises:
        ValueError: as wanda_; pattern="rows" (all of an output's weights: nothing is left to make up
            for it). The model is then as it was.
    """
    op = "sparsegpt_"
    kind = Pattern.parse(op, pattern, block)
    if kind.kind == "rows":
        raise ValueError(f'{op}: expected a pattern that leaves weights in each row, got "rows"')
    damping = number(op, "damping", damping)
    if not damping > 0:
        raise ValueError(f"{op}: expected damping > 0, got {damping}")
    chosen = targets(op, model, layers_of(sparsity, layers))
    wanted = dict(zip((t.name for t in chosen), sparsities(op, kind, sparsity, chosen)))
    for target in chosen:
        check_scores(op, target.name, target.weight.detach())

    def prune(target: Target, parts: Parts) -> None:
        weight = target.weight.detach()
        flat = weight.flatten(1)
        high = kind.tile(weight.shape)[0]
        if len(parts) > 1 and kind.squares and any(len(flat[rows]) % high for rows, _ in parts):
            raise ValueError(
                f"{op}: {target.name}: its rows see different inputs, in parts of "
                f"{len(flat[parts[0][0]])}; expected blocks that don't cross them, got {high} rows"
            )
        old = None if target.mask is None else target.mask.reshape(flat.shape)
        quota = Quota(wanted[target.name])
        mask = torch.empty(flat.shape, dtype=torch.bool, device=flat.device)
        updated = torch.empty_like(flat)
        for rows, x in parts:
            factor = inverse_factor(x, damping)
            given = None if old is None else old[rows]
            updated[rows], mask[rows] = solve(
                flat[rows], given, factor, kind, kind.tile(weight.shape), quota
            )
        if not bool(torch.isfinite(updated).all()):
            raise ValueError(f"{op}: {target.name}: the update is not finite; try more damping")
        weight.copy_(updated.reshape(weight.shape))
        set_mask_(target.module, target.key, mask.reshape(weight.shape))

    missed = each_layer(op, model, chosen, inputs, prune)
    result = describe(model, chosen, kind)
    result.notes += [f"{name}: left alone, the forward pass does not reach it" for name in missed]
    return result


def inverse_factor(x: Tensor, damping: float) -> Tensor:
    """U of (X^T X + damping mean(diagonal) I)^-1 = U^T U, float32 [K, K]; ``x`` [samples, K]."""
    hessian = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for chunk in x.split(SAMPLES):
        chunk = chunk.float()
        hessian += chunk.T @ chunk
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0  # an input that is always 0
    diagonal += damping * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True).float()


def solve(
    weight: Tensor,
    old: Tensor | None,
    factor: Tensor,
    pattern: Pattern,
    tile: tuple[int, int],
    quota: Quota,
) -> tuple[Tensor, Tensor]:
    """New weights (float32) and mask, both [N, K]; ``old`` is a mask that stays pruned."""
    w = weight.float().T.contiguous()  # [K, N]: a column of the weight is a row in memory
    count = len(w)
    mask = torch.ones(weight.shape, dtype=torch.bool, device=w.device)
    unit = pattern.m if pattern.kind == "n:m" else tile[1]
    step = -(-COLUMNS // unit) * unit
    for begin in range(0, count, step):
        end = min(begin + step, count)
        now, own = w[begin:end], mask[:, begin:end]
        u = factor[begin:end, begin:end]
        errors = torch.zeros_like(now)
        before = None if old is None else old[:, begin:end]
        if pattern.kind != "n:m":
            own.copy_(selected(scored(now, u, before), pattern, tile, quota))
            if before is not None:
                own &= before
        for k in range(end - begin):
            if pattern.kind == "n:m" and k % pattern.m == 0:
                group = slice(k, min(k + pattern.m, end - begin))
                part = None if before is None else before[:, group]
                choice = scored(now[group], u[group, group], part)
                own[:, group] = n_of_m(choice, pattern.n, pattern.m)
                if part is not None:
                    own[:, group] &= part
            errors[k] = now[k].masked_fill(own[:, k], 0.0) / u[k, k]
            now[k:].addr_(u[k, k:], errors[k], alpha=-1)
        w[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
    return w.T.masked_fill(~mask, 0.0), mask


def scored(weight: Tensor, factor: Tensor, old: Tensor | None) -> Tensor:
    """Of columns ``weight`` [k, N], as [N, k]."""
    score = (weight.T / factor.diagonal()).square()
    return score if old is None else score.masked_fill(~old, -1.0)


def selected(scores: Tensor, pattern: Pattern, tile: tuple[int, int], quota: Quota) -> Tensor:
    """The mask of these columns, by weights or by blocks."""
    if not pattern.squares:
        return largest(scores, scores.numel() - quota.take(scores.numel()))
    units = block_sums(scores, tile)
    keep = largest(units, units.numel() - quota.take(units.numel()))
    return expand(keep, tile, scores.shape)
