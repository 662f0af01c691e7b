"""Layers that replace torch.nn's, each a subclass of what it replaces."""

from .linear import Int8Linear

__all__ = ["Int8Linear"]
