"""Optimizers with torch.optim's signatures, state and checkpoints, whose whole step is one pass.

The classes subclass torch's. Beside torch's arguments they take those of :class:`StepOptions`:
clipping, weight averages, L1 shrinkage, zeroing of gradients and skipping of overflows inside the same
pass.
"""

from .adafactor import Adafactor
from .adagrad import Adagrad
from .adam import Adam, Adamax, AdamW, NAdam, RAdam
from .base import FusedStep, StepOptions
from .gradient import accumulate_, accumulate_main_grads, release_gradients
from .lamb import LAMB
from .lion import Lion
from .muon import Muon, split_muon
from .rmsprop import RMSprop
from .sgd import SGD

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Adagrad",
    "RMSprop",
    "NAdam",
    "RAdam",
    "Adamax",
    "Lion",
    "LAMB",
    "Adafactor",
    "Muon",
    "split_muon",
    "release_gradients",
    "accumulate_",
    "accumulate_main_grads",
    "FusedStep",
    "StepOptions",
]
