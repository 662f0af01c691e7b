"""What the parts of a step have to agree on before it: its scale, its norm, whether it is skipped.

A call of the kernels knows the gradients of one device in one process. Where a step has more, the
norm over all of them is found here, and every call is given the same numbers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import shards
from .rows import Rows

if TYPE_CHECKING:
    from .base import FusedStep


class Terms(NamedTuple):
    """What every call of a step is given; the rest it finds by itself."""

    scale: Any  # GradScaler's, as a number or a tensor
    found: Any  # nonzero: skip
    norm: Any  # of the gradients, where it is known before
    clips: bool
    skips: bool  # where a gradient is not finite


def terms(optimizer: FusedStep) -> Terms:
    """Before the calls of a step of one process."""
    return Terms(
        getattr(optimizer, "grad_scale", None),
        getattr(optimizer, "found_inf", None),
        None if optimizer.max_grad_norm is None else optimizer.norm_estimate,
        optimizer.max_grad_norm is not None,
        optimizer.skip_nonfinite,
    )


def over_devices(given: Terms, rows: Rows, home: torch.device) -> Terms:
    """Where a step has calls on several devices."""
    if not given.skips and not (given.clips and given.norm is None):
        return given
    whole = _norm_everywhere(given.scale, rows, home)
    found = given.found
    if given.skips:
        worst = (~torch.isfinite(whole)).float()
        found = worst if found is None else torch.maximum(worst, found.to(worst.device))
    norm = whole if given.norm is None else given.norm
    return given._replace(found=found, norm=norm if given.clips else None, skips=False)


def _norm_everywhere(scale: Any, rows: Rows, home: torch.device) -> Tensor:
    """Norm of the gradients on all devices, on that of the first parameter."""
    squares = []
    for at in np.flatnonzero(rows.table["grad"]).tolist():
        grad = rows.grad(rows.params[at])
        assert grad is not None
        if (mask := rows.masks.get(at)) is not None:
            grad = torch.where(mask, grad, torch.zeros((), dtype=grad.dtype, device=mask.device))
        norm = torch.linalg.vector_norm(grad, dtype=torch.float64)
        squares.append(norm.to(home, non_blocking=True))
    norm = torch.linalg.vector_norm(torch.stack(squares))
    if scale is not None:
        norm = norm / torch.as_tensor(scale, device=home).reshape(())
    return norm.float()


def over_shards(optimizer: FusedStep, rows: Rows) -> Terms:
    """For pieces of DTensors, which know neither the whole norm nor the others' NaN.

    Clipping goes into the scale: grad / (scale / clip).
    """
    scale = shards.local(getattr(optimizer, "grad_scale", None))
    found = getattr(optimizer, "found_inf", None)
    if found is not None:
        found = shards.anywhere(found, rows.params)
    grads = []
    for at, param in enumerate(rows.params):
        if (grad := rows.grad(param)) is not None:
            own = shards.piece(grad, param, f"{rows.name}: gradient of {rows.where(at)}")
            grads.append((own, param))
    if optimizer.max_grad_norm is None and not optimizer.skip_nonfinite:
        return Terms(scale, found, None, False, False)
    divisor = 1.0 if scale is None else float(scale)
    norm = shards.total_norm(grads) / divisor
    optimizer._norm.fill_(norm)
    if optimizer.skip_nonfinite and not math.isfinite(norm):
        found = torch.ones(())
    elif optimizer.norm_estimate is not None:
        norm = float(optimizer.norm_estimate)
        optimizer._norm.fill_(norm)
    if optimizer.max_grad_norm is not None:
        factor = optimizer.max_grad_norm / (norm + 1e-6)
        if not factor >= 1.0:
            scale = torch.tensor(divisor / factor if factor else math.inf)
    return Terms(scale, found, None, False, False)
