"""Pruning: which weights go, masks that hold in training, layers made smaller.

A mask is a bool buffer beside its parameter, saved and loaded with the model. A pruned weight is
exactly zero. :func:`hold_` keeps it so under trimtab.optim, inside the step, and under any torch
optimizer. Every function changes the model whole or not at all.
"""

from .apply import scores_
from .magnitude import magnitude_
from .report import PruneReport, report
from .state import Hold, finalize_, hold_, masks, set_mask_, targets

__all__ = [
    "magnitude_",
    "scores_",
    "hold_",
    "Hold",
    "masks",
    "set_mask_",
    "finalize_",
    "report",
    "PruneReport",
    "targets",
]
