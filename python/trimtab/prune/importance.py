"""Importance from gradients: what the loss would lose (Taylor), and where weights move (movement)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..progress import progress
from .apply import Sparsity, choose, layers_of, scores_, set_masks_, sparsities
from .calibration import evaluating
from .checks import expect, expect_function, expect_optimizer
from .masks import Pattern, check_scores
from .report import PruneReport
from .state import Layers, targets


def taylor_(
    model: nn.Module,
    sparsity: Sparsity | None,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    pattern: str = "unstructured",
    block: tuple[int, int] | None = None,
    scope: str = "global",
    layers: Layers = None,
) -> PruneReport:
    """Prunes by the first-order change of the loss, sum over batches of (sum of w dL/dw)^2.

    The inner sum is over what is pruned together: one weight, a row, a channel, a block (Molchanov et
    al. 2019, https://arxiv.org/abs/1906.10771). The model is in eval mode meanwhile; ``.grad`` is
    neither read nor written.

    Args:
        batches: anything that ``loss`` takes.
        loss: ``loss(model, batch)`` gives a scalar tensor.
        sparsity, pattern, block, scope, layers: as in :func:`magnitude_`.

    Raises:
        ValueError: as magnitude_; no batches; a loss that no weight has a part in, or that gives NaN.
    """
    op = "taylor_"
    kind = Pattern.parse(op, pattern, block)
    chosen = targets(op, model, layers_of(sparsity, layers))
    wanted = sparsities(op, kind, sparsity, chosen)
    good = isinstance(batches, Iterable) and not isinstance(batches, (str, Tensor))
    expect(op, "an iterable of batches", good, batches)
    expect_function(op, "loss(model, batch) -> scalar tensor", loss)
    weights = [target.weight for target in chosen]
    for target in chosen:
        check_scores(op, target.name, target.weight.detach())
    units: list[Tensor] = []
    frozen = [weight for weight in weights if not weight.requires_grad]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        with evaluating(model), torch.inference_mode(False), torch.enable_grad():
            for batch in progress(batches, op):
                value = _scalar(op, loss(model, batch))
                grads = torch.autograd.grad(value, weights, allow_unused=True)
                if all(grad is None for grad in grads):
                    raise ValueError(f"{op}: the loss depends on none of the layers to prune")
                changes = [
                    kind.units(w.detach() * (0 if g is None else g), signed=True).square()
                    for w, g in zip(weights, grads)
                ]
                units = [a + b for a, b in zip(units, changes)] if units else changes
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
    if not units:
        raise ValueError(f"{op}: expected batches, got none")
    for target, own in zip(chosen, units):
        check_scores(op, f"the importance of {target.name}", own)
    return set_masks_(model, chosen, choose(op, chosen, units, kind, wanted, scope), kind)


def _scalar(op: str, loss: Any) -> Tensor:
    expect(op, "loss(model, batch) to give a scalar tensor", isinstance(loss, Tensor), loss)
    if loss.numel() != 1:
        raise ValueError(
            f"{op}: expected loss(model, batch) to give a scalar tensor, got {list(loss.shape)}"
        )
    if not loss.requires_grad:
        raise ValueError(f"{op}: the loss depends on none of the layers to prune")
    return loss


class Movement:
    """Sums -w dL/dw over the steps of an optimizer: positive where a weight moves away from zero.

    (Sanh, Wolf & Rush 2020, https://arxiv.org/abs/2005.07683.) Use as a context or call
    :meth:`remove`; then :func:`movement_` prunes by it. Gradients are taken as ``step()`` finds them.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, layers: Layers = None
    ) -> None:
        expect_optimizer("Movement", optimizer)
        self._targets = targets("Movement", model, layers)
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(target.weight) in owned for target in self._targets):
            raise ValueError(
                "Movement: expected an optimizer of the model's parameters, got "
                f"{type(optimizer).__name__} of {len(owned)} others"
            )
        self.steps = 0
        self.scores = {t.name: torch.zeros_like(t.weight.detach()) for t in self._targets}
        self._handle = optimizer.register_step_pre_hook(self._before)

    @torch.no_grad()
    def _before(self, *_: Any) -> None:
        self.steps += 1
        for target in self._targets:
            if target.weight.grad is not None:
                self.scores[target.name].addcmul_(target.weight, target.weight.grad, value=-1)

    def remove(self) -> None:
        """Stops; the scores stay."""
        self._handle.remove()

    def __enter__(self) -> Movement:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def movement_(
    model: nn.Module,
    sparsity: Sparsity | None,
    movement: Movement,
    *,
    pattern: str = "unstructured",
    block: tuple[int, int] | None = None,
    scope: str = "global",
) -> PruneReport:
    """Prunes the weights that moved towards zero most; see :class:`Movement`.

    Rows, channels and blocks rank by the sum of their scores.

    Raises:
        ValueError: as magnitude_; no steps were watched; a score is NaN.
    """
    expect("movement_", "a Movement", isinstance(movement, Movement), movement)
    if not movement.steps:
        raise ValueError("movement_: expected steps of the optimizer, saw none")
    scores = movement.scores
    return scores_(model, scores, sparsity, pattern=pattern, block=block, scope=scope, signed=True)
