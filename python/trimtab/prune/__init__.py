"""Pruning: which weights go, masks that hold in training, layers made smaller.

A mask is a bool buffer beside its parameter, saved and loaded with the model. A pruned weight is
exactly zero. :func:`hold_` keeps it so under trimtab.optim, inside the step, and under any torch
optimizer. Every function changes the model whole or not at all.
"""

from .apply import scores_
from .attention import PrunedMultiheadAttention
from .importance import Movement, movement_, taylor_
from .magnitude import magnitude_
from .removal import PrunedLayerNorm, load_state_dict_
from .report import PruneReport, report
from .schedule import Cubic, OneShot, Schedule, iterative_, soft_filter_
from .sparsegpt import sparsegpt_
from .state import Hold, finalize_, hold_, masks, set_mask_, targets
from .structured import StructuredReport, structured_
from .wanda import wanda_

__all__ = [
    "magnitude_",
    "wanda_",
    "sparsegpt_",
    "taylor_",
    "Movement",
    "movement_",
    "structured_",
    "StructuredReport",
    "PrunedLayerNorm",
    "PrunedMultiheadAttention",
    "load_state_dict_",
    "soft_filter_",
    "iterative_",
    "Schedule",
    "Cubic",
    "OneShot",
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
