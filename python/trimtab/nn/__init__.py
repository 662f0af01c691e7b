"""Layers that replace torch.nn's, each a subclass of what it replaces."""

from .conv import Int8Conv2d
from .embedding import Int8Embedding, Int8EmbeddingBag
from .linear import Int8Linear
from .sparse_conv2d import SparseConv2d
from .sparse_linear import SparseLinear
from .weight_only import Int8WeightOnlyLinear

__all__ = [
    "Int8Conv2d",
    "Int8Embedding",
    "Int8EmbeddingBag",
    "Int8Linear",
    "Int8WeightOnlyLinear",
    "SparseConv2d",
    "SparseLinear",
]
